"""Random projections of long vectors, such as gradients of single examples, that about keep their inner products."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor

ROWS = 2**12  # of a projection that are drawn together
HELD = 2**30  # signs of a projection that are kept, at most; more are drawn again for each batch


class Signs:
    """A matrix [numbers, size] of random signs over sqrt(size); none where there are no more numbers than that."""

    def __init__(self, numbers: int, size: int, seed: str) -> None:
        self.numbers, self.size, self.seed = numbers, min(numbers, size), seed
        self._held: dict[int, Tensor] = {}

    def project(self, vectors: Tensor) -> Tensor:
        """[B, size] of vectors [B, numbers]."""
        if self.size == self.numbers:
            return vectors
        total = torch.zeros(len(vectors), self.size, dtype=vectors.dtype, device=vectors.device)
        for start in range(0, self.numbers, ROWS):
            total += vectors[:, start : start + ROWS] @ self._draw(start, vectors.device).to(vectors)
        return (2 * total - vectors.sum(1, keepdim=True)) / math.sqrt(self.size)  # signs are kept as 0 and 1

    def _draw(self, start: int, device: torch.device) -> Tensor:
        if start in self._held:
            return self._held[start]
        chance = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{start}".encode()))
        rows = min(ROWS, self.numbers - start)
        drawn = torch.randint(0, 2, (rows, self.size), generator=chance, dtype=torch.int8).to(device)
        if self.numbers * self.size <= HELD:
            self._held[start] = drawn
        return drawn
