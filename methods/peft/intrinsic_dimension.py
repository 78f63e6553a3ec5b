"""Intrinsic dimension: all weights are moved by a few numbers through a random projection (Aghajanyan et al., 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effbench import ops
from effbench.core.errors import Unsupported
from effbench.core.kinds import Swap
from effbench.core.run import Run
from effbench.core.views import Site
from effbench.nn.model.beside import Beside
from effbench.nn.model.blocks import Blocks


def draw(seed: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """B, Pi and G of one matrix: signs, a permutation and normal numbers [size], the same for the same seed."""
    on: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(seed)}
    signs = 2.0 * torch.randint(2, (size,), **on) - 1
    return signs, torch.randperm(size, **on), torch.randn(size, **on)


class Fastfood(torch.autograd.Function):
    """P phi [out, in] = H G Pi H B phi, padded to a power of two: nothing is stored of P, which is drawn when needed.

    Columns of P have unit norm on average: with H orthonormal, size n and N = out * in, it is scaled by
    n / (|G| sqrt(N)), which is the authors' 1 / (sqrt(n sum(G^2)) sqrt(N / n)) for an H of +-1.
    """

    @staticmethod
    def forward(context: Any, phi: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        context.shape, context.seed, context.dim = shape, seed, len(phi)
        signs, order, normal, factor = Fastfood.parts(context, phi.device)
        padded = nn.functional.pad(phi, (0, len(signs) - len(phi)))
        with torch.autocast(phi.device.type, enabled=False):
            mixed = ops.load("hadamard")(signs * padded)[order]
            made: Tensor = ops.load("hadamard")(normal * mixed)
        return (factor * made[: math.prod(shape)]).view(shape)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        signs, order, normal, factor = Fastfood.parts(context, gradient.device)
        padded = nn.functional.pad(factor * gradient.flatten().float(), (0, len(signs) - gradient.numel()))
        with torch.autocast(gradient.device.type, enabled=False):
            mixed = torch.empty_like(padded)
            mixed[order] = normal * ops.load("hadamard")(padded)  # H is symmetric
            back = signs * ops.load("hadamard")(mixed)
        return back[: context.dim], None, None

    @staticmethod
    def parts(context: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
        """B, Pi, G and the factor."""
        count = math.prod(context.shape)
        size = 1 << (max(count, context.dim) - 1).bit_length()
        signs, order, normal = draw(context.seed, size, device)
        return signs, order, normal, size / (float(normal.norm()) * math.sqrt(count))


class Subspace(nn.Module):
    """What all linears share: phi [dim], zero at the start, and for SAID a scale for each group, one at the start."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(dim, dtype=torch.float32))
        self.scales = nn.Parameter(torch.ones(groups, dtype=torch.float32)) if groups else None


class IntrinsicLinear(Beside):
    """D = scale P phi, P drawn by `seed`."""

    def __init__(
        self, in_features: int, out_features: int, subspace: Subspace, group: int, seed: int, **common: Any
    ) -> None:
        super().__init__(in_features, out_features, **common)
        self.subspace, self.group, self.seed = subspace, group, seed

    def delta(self) -> Tensor:
        made: Tensor = Fastfood.apply(self.subspace.phi, (self.out_features, self.in_features), self.seed)  # type: ignore[no-untyped-call]
        return made if self.subspace.scales is None else self.subspace.scales[self.group] * made


@dataclass(frozen=True)
class IntrinsicDimension(Swap):
    """theta = theta_0 + P phi (equation 2 of the paper): phi is all that is trained, and is merged after the fit.

    SAID has a learned scale per block besides (equation 3). They count: phi has as many numbers less than `dim`. The
    smallest `dim` that reaches 90 % of full fine-tuning is d90.
    """

    paper = "arXiv:2012.13255"
    caveats = (
        "moves the linears of the blocks; Aghajanyan et al. move embeddings, norms and biases as well",
        "no setting for language models in the paper, which sweeps dim on RoBERTa and sentence pairs",
    )
    type = "PEFT"
    weight_update = "random projection"
    merges = True
    tuned = {"dim": (100, 1000, 10000)}
    trials = ({"dim": 50}, {"variant": "did"})

    dim: int = 1000  # numbers that are trained, all in all
    variant: Literal["said", "did"] = "said"  # with a scale per block, structure-aware; or direct, phi alone
    merge: Literal["masked", "dense"] = "masked"  # into what stood there, zeros and codes kept, or into a dense matrix

    def check(self) -> None:
        self.require(self.dim > 0, "dim must be at least 1")

    def prepare(self, run: Run) -> tuple[Subspace, dict[int | None, int]]:
        view = Blocks(run.model)
        blocks = list(dict.fromkeys(view.number(path) for path in run.linears()))
        groups = len(blocks) if self.variant == "said" else 0
        if self.dim <= groups:
            raise Unsupported(
                f"the scales of {groups} blocks leave nothing of dim={self.dim}: give more, or variant='did'"
            )
        return Subspace(self.dim - groups, groups), {block: place for place, block in enumerate(blocks)}

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        subspace, places = site.prepared
        masked = self.merge == "masked"
        group = places[site.block]
        return IntrinsicLinear.of(module, subspace=subspace, group=group, seed=site.seed, masked=masked)

    def settle(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, IntrinsicLinear)
        return module.settle(self.merge)
