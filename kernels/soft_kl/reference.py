"""Divergence of a student from a teacher whose logits are softened by a temperature, token by token."""

import torch
from torch import Tensor


def soft_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / tau) || softmax(student / tau)) of logits [N, V], in nats [N].

    Computed in float32 (float64 for float64 logits). A token that the teacher rules out (minus infinity) adds nothing.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_p = (teacher.to(wide) / temperature).log_softmax(-1)
    log_q = (student.to(wide) / temperature).log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == float("-inf"), 0.0, terms).sum(-1)


def soft_kl_gradient(grad_out: Tensor, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The gradient in the student's logits: (softmax(student / tau) - softmax(teacher / tau)) / tau, row by row."""
    wide = torch.promote_types(student.dtype, torch.float32)
    p = (teacher.to(wide) / temperature).softmax(-1)
    q = (student.to(wide) / temperature).softmax(-1)
    return (grad_out.unsqueeze(-1) * (q - p) / temperature).to(student.dtype)
