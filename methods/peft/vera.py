"""VeRA: one frozen random pair of matrices for all linears, two trained vectors for each (Kopiczko et al., 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from effbench.core.run import Run
from effbench.core.views import Site
from effbench.methods.peft._lowrank import LowRankLinear, Product
from effbench.nn.model.linear import matrix_shape

PAIRS: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()  # what linears share, by device and dtype


def draw_pair(seed: int, rank: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    """A [rank, width] and B [height, rank], Kaiming-uniform over what they read, as the authors draw them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rank, width), (height, rank))
    a, b = (torch.empty(size, device="cpu", dtype=torch.float32) for size in sizes)
    for matrix in (a, b):
        bound = math.sqrt(6 / matrix.shape[1])
        matrix.uniform_(-bound, bound, generator=generator)
    return a, b


def shared_pair(numbers: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The pair that `draw_pair` draws, the same tensors for all who ask while somebody holds them."""
    keys = [(*numbers, str(device), dtype, name) for name in "ab"]
    pair = [matrix for matrix in map(PAIRS.get, keys) if matrix is not None]
    if len(pair) < len(keys):
        pair = [matrix.to(device, dtype) for matrix in draw_pair(*numbers)]
        PAIRS.update(zip(keys, pair, strict=True))
    return pair


class VeRALinear(LowRankLinear):
    """D = diag(b) B diag(d) A (equation 2), b [out], d [rank].

    A and B are parts of the pair of `seed`, [rank, width] and [height, rank] for the widest linears of the model. They
    are no part of a saved model: the seed draws them again, once for all linears of a device.
    """

    shared_a: Tensor
    shared_b: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        seed: int,
        width: int,
        height: int,
        initial: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(in_features, out_features, **common)
        self.pair = (seed, rank, width, height)
        self.b = nn.Parameter(torch.zeros(out_features, dtype=torch.float32))
        self.d = nn.Parameter(torch.full((rank,), initial, dtype=torch.float32))
        self._hold(torch.device("cpu"), torch.float32)

    def delta(self) -> Tensor:
        return (self.b.unsqueeze(1) * self.shared_b[: self.out_features]) @ (
            self.d.unsqueeze(1) * self.shared_a[:, : self.in_features]
        )

    def add(self, x: Tensor) -> Tensor:
        inner = self.d * nn.functional.linear(x, self.shared_a[:, : self.in_features])
        return self.b * nn.functional.linear(inner, self.shared_b[: self.out_features])

    def config(self) -> dict[str, Any]:
        return super().config() | dict(zip(("seed", "rank", "width", "height"), self.pair, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._hold(self.shared_a.device, self.shared_a.dtype)  # one pair there too, not a copy for each linear
        return self

    def _hold(self, device: torch.device, dtype: torch.dtype) -> None:
        for name, matrix in zip(("shared_a", "shared_b"), shared_pair(self.pair, device, dtype), strict=True):
            self.register_buffer(name, matrix, persistent=False)


@dataclass(frozen=True)
class VeRA(Product):
    """Trains out + rank numbers for each linear; the pair is drawn from the seed of the run."""

    paper = "arXiv:2310.11454"
    caveats = ("on every linear; Kopiczko et al. adapt queries and values, at a rate of its own for each task",)
    weight_update = "scales of a random product"
    tuned = {"rank": (64, 256)}

    rank: int = 256  # of the shared pair
    initial: float = 0.1  # what d starts from; b starts from 0

    def check(self) -> None:
        super().check()
        self.require(self.initial != 0, "initial must not be 0: b is, and no gradient would ever reach b or d")

    def prepare(self, run: Run) -> dict[str, int]:
        shapes = [matrix_shape(module) for path, module in run.linears().items() if self.wants(path)]
        height, width = (max(sizes) for sizes in zip(*shapes, strict=True))
        return {"seed": run.seed, "width": width, "height": height}

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        return VeRALinear.of(module, rank=self.rank, initial=self.initial, **site.prepared, **self.beside)
