"""A step of AdamW on a projection of the gradient, whose result is projected back (GaLore)."""

import math

from torch import Tensor


def galore_adamw(
    parameter: Tensor,
    gradient: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    m: Tensor,
    v: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float,
    decay_first: bool,
) -> None:
    """One step in place of a parameter [m, n] with the bases left [m, r] and right [r, n]; `step` counts from 1.

    R = left^T G right^T, N = m / (sqrt(v) + eps) with the moments of R, W <- W - lr' scale left N right, where a basis
    that is None is left out; without either it is AdamW as GaLore's authors write it, eps beside the uncorrected root.
    Moments are in the shape of R, and their type is what is computed in. The weight decays before or after the update.
    """
    low = gradient.to(m.dtype)
    low = low if left is None else left.T @ low
    low = low if right is None else low @ right.T
    m.mul_(beta1).add_(low, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(low, low, value=1 - beta2)
    update = m / (v.sqrt() + eps)
    update = update if left is None else left @ update
    update = update if right is None else update @ right
    weight = parameter.to(m.dtype)
    if decay_first:
        weight.mul_(1 - lr * weight_decay)
    weight.add_(update * scale, alpha=-lr * math.sqrt(1 - beta2**step) / (1 - beta1**step))
    if not decay_first:
        weight.mul_(1 - lr * weight_decay)
    parameter.copy_(weight)
