"""The clipped objective of policy gradients (PPO) on given samples, token by token, with importance weights."""

import torch
from torch import Tensor


def clipped_policy(
    logits: Tensor, tokens: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, clip: float, temperature: float
) -> Tensor:
    """max(-A r, -A min(max(r, 1 - clip), 1 + clip)) of N sampled tokens (arXiv:1707.06347, equation 7, negated), [N].

    r = weight q(y) / q_old(y), where q is the softmax of logits [N, V] over the temperature, y the tokens [N], and
    `old` [N] the logarithms of q_old(y). A is the advantage [N], and the weight [N] that of importance sampling, as in
    MiniLLM (arXiv:2306.08543). Computed in float32 (float64 for float64 logits).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logprob = (logits.to(wide) / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ratio = weight.to(wide) * (logprob - old.to(wide)).exp()
    gain = advantage.to(wide)
    return torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - clip, 1 + clip))


def clipped_policy_gradient(
    grad_out: Tensor,
    logits: Tensor,
    tokens: Tensor,
    old: Tensor,
    advantage: Tensor,
    weight: Tensor,
    clip: float,
    temperature: float,
) -> Tensor:
    """The gradient in the logits: -A r (1[y] - q) / tau, and 0 where a clipped ratio is what counts."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q = (logits.to(wide) / temperature).log_softmax(-1)
    ratio = weight.to(wide) * (log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - old.to(wide)).exp()
    gain = advantage.to(wide)
    # A ratio that has gone too far in the direction of its advantage is held where it is.
    held = torch.where(gain > 0, ratio > 1 + clip, (gain < 0) & (ratio < 1 - clip))
    slope = torch.where(held, 0.0, -gain * ratio) * grad_out.to(wide) / temperature
    step = -log_q.exp()
    step.scatter_add_(-1, tokens.unsqueeze(-1), torch.ones_like(step[..., :1]))
    return (slope.unsqueeze(-1) * step).to(logits.dtype)
