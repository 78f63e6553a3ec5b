"""A step of AdamW whose moments are stored in 8 bits, block by block."""

import math

import torch
from torch import Tensor

from effbench.kernels._common.dynamic_map import SIGNED, UNSIGNED

BLOCK = 256  # numbers of the flattened tensor that share a factor


def adamw8bit(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    m_absmax: Tensor,
    v: Tensor,
    v_absmax: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW, in place, with the moments of arXiv:2110.02861; `step` counts from 1.

    m and v are uint8 codes in the shape of the parameter, of the signed and of the unsigned dynamic map;
    their factors float32 [ceil(numel / 256)] are the largest magnitudes of blocks. The update is computed from the new
    moments in float32, before they are rounded to the nearest level.
    """
    gradient = gradient.float()
    mean = decode(m, m_absmax, SIGNED).mul_(beta1).add_(gradient, alpha=1 - beta1)
    square = decode(v, v_absmax, UNSIGNED).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (square.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    decayed = parameter.float() * (1 - lr * weight_decay)
    parameter.copy_(decayed.addcdiv_(mean, root, value=-lr / (1 - beta1**step)))
    for codes, absmax, values, levels in ((m, m_absmax, mean, SIGNED), (v, v_absmax, square, UNSIGNED)):
        encode(codes, absmax, values, levels)


def decode(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """What codes [...] stand for, float32."""
    factors = absmax.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return levels.to(codes.device)[codes.int()] * factors


def encode(codes: Tensor, absmax: Tensor, values: Tensor, levels: Tensor) -> None:
    """Write the codes of values [...], and the factors of their blocks; a tie goes to the lower level."""
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    absmax.copy_(blocks.abs().amax(1))
    levels = levels.to(values.device)
    scaled = (blocks * (1 / absmax).unsqueeze(1)).nan_to_num_(0.0)  # a block of zeros
    found = torch.searchsorted((levels[1:] + levels[:-1]) / 2, scaled)
    codes.copy_(found.flatten()[: len(flat)].view(codes.shape))
