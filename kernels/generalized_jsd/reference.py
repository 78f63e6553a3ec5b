"""The generalized Jensen-Shannon divergence of GKD, and the two divergences at its ends, token by token."""

import torch
from torch import Tensor

NEVER = float("-inf")


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """D_beta(P || Q) of logits [N, V] softened by a temperature, in nats [N]: P is the teacher's, Q the student's.

    beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q (arXiv:2306.13649, equation 1). That is 0 at
    both ends of beta, where its limits over beta, or over 1 - beta, stand instead: KL(P || Q) at 0, KL(Q || P) at 1.
    Computed in float32 (float64 for float64 logits). A token that a distribution rules out adds nothing to its terms.
    """
    log_p, log_q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = _mix(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def generalized_jsd_gradient(
    grad_out: Tensor, student: Tensor, teacher: Tensor, beta: float, temperature: float
) -> Tensor:
    """The gradient in the student's logits: q (g - sum q g) / tau with g = (1 - beta) (log q - log m).

    At the ends of beta (q - p) / tau, and the same rule with g = log q - log p.
    """
    log_p, log_q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
    q = log_q.exp()
    if beta == 0:
        slope = q - log_p.exp()
    else:
        g = log_q - log_p if beta == 1 else (1 - beta) * (log_q - _mix(log_p, log_q, beta))
        g = torch.where(log_q == NEVER, 0.0, g)
        slope = q * (g - (q * g).sum(-1, keepdim=True))
    return (grad_out.unsqueeze(-1) * slope / temperature).to(student.dtype)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


def _mix(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(beta p + (1 - beta) q)."""
    shares = torch.tensor([beta, 1 - beta], dtype=log_p.dtype, device=log_p.device).log()
    return torch.logaddexp(log_p + shares[0], log_q + shares[1])


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [N]."""
    return torch.where(log_p == NEVER, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
