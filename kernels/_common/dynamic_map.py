"""The 8-bit dynamic map (Dettmers, arXiv:1511.04561): levels that are dense at every order of magnitude."""

import torch
from torch import Tensor


def _make(signed: bool) -> Tensor:
    magnitudes = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        magnitudes.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6))
    positive = torch.cat(magnitudes)
    below = [-positive] if signed else []
    return torch.cat([*below, positive, torch.tensor([0.0, 1.0])]).sort().values.float()


# Levels in [-1, 1], or in [0, 1] with as many again in each decade; float32 [256], ascending. Seven decades from 1e-6
# to 1, the next decade with twice the levels, and 0 and 1.
SIGNED, UNSIGNED = _make(signed=True), _make(signed=False)
