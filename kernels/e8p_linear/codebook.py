"""The E8P12 codebook of QuIP# (Tseng et al., 2024, arXiv:2402.04396): 65,536 points of E8 + 1/4.

A code is 16 bits. The high byte picks one of 256 patterns of absolute values; bit p of the low byte negates
coordinate `ORDER[p]`; its parity says which way the point is shifted (even +1/4, odd -1/4), and when it is odd
bit 0 is read inverted. A pattern of odd sum carries a minus on coordinate 7, so that every point before the shift
lies in D8 + 1/2 (even sum).
"""

import functools
import itertools

import torch
from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # coordinate that each sign bit negates

# 29 of the 56 patterns with five 3/2 and three 1/2 (squared norm 12) fill the 227 up to 256; the choice is part
# of the published format. Digits are the positions of 1/2.
_NORM_12 = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 "
    "045 067 057 047 056 046 014 237"
)


def _build_patterns() -> Tensor:
    """Absolute values, float32 [256, 8]: the 227 of squared norm up to 10, sorted, then the 29."""
    short = [
        values
        for values in itertools.product((0.5, 1.5, 2.5), repeat=8)
        if sum(value * value for value in values) <= 10
    ]
    long = [[0.5 if str(i) in halves else 1.5 for i in range(8)] for halves in _NORM_12.split()]
    return torch.tensor([*short, *long])


def _build_one_bit() -> Tensor:
    """Points of the third bit, float32 [256, 8]: E8 up to squared norm 2 (241), then 15 of norm 4."""
    integers = [
        point
        for point in itertools.product((-1.0, 0.0, 1.0), repeat=8)
        if sum(map(abs, point)) in (0, 2)  # squared norm equals the sum of magnitudes
    ]
    halves = [point for point in itertools.product((-0.5, 0.5), repeat=8) if sum(point) % 2 == 0]
    doubled = torch.cat([2 * torch.eye(8), -2 * torch.eye(8)[:7]])
    return torch.cat([torch.tensor(integers), torch.tensor(halves), doubled])


PATTERNS = _build_patterns()
ONE_BIT = _build_one_bit()


def decode(codes: Tensor) -> Tensor:
    """Points of 16-bit codes (any integer dtype; int16 is read as unsigned), float32 [..., 8]."""
    codes = codes.int()
    patterns = PATTERNS.to(codes.device)
    low = codes & 255
    parity = low ^ low >> 4
    parity = (parity ^ parity >> 2 ^ parity >> 1 ^ parity >> 3) & 1
    position = torch.tensor([ORDER.index(i) for i in range(8)], device=codes.device)
    negative = (low ^ parity).unsqueeze(-1) >> position & 1
    pattern = codes >> 8 & 255
    negative[..., 7] ^= (patterns.sum(1) % 2).int()[pattern]
    return patterns[pattern] * (1 - 2 * negative) + (0.25 - 0.5 * parity).unsqueeze(-1)


@functools.cache
def points(device: torch.device) -> Tensor:
    """All 65,536 points in the order of their codes, float32 [65536, 8]."""
    return decode(torch.arange(1 << 16, device=device))


def decode_one_bit(codes: Tensor) -> Tensor:
    """Points of the 8-bit codes, float32 [..., 8]."""
    return ONE_BIT.to(codes.device)[codes.long()]
