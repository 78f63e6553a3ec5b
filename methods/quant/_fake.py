"""Training with rounded weights and inputs: what quantization-aware training methods share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from effbench import ops
from effbench.formats.grid import Grid, GridName, fit_grid, round_linear, split_groups
from effbench.nn.model.linear import MaskedLinear, Replaced, Storage, dense_weight, kept, make_linear, rebuilt

if TYPE_CHECKING:
    from effbench.core.run import Run


class Stood(NamedTuple):
    """What a packed linear takes over of the one that was trained."""

    bias: Tensor | None  # [out]
    kept: Tensor | None  # bool [out, in]


def round_tokens(x: Tensor, bits: int) -> Tensor:
    """x [..., n] on the symmetric grid of each token, whose largest magnitude is 2^(bits-1) - 1 steps: nothing is
    clamped. The step is rounded to the type of x, in which it would be stored. Gradients pass as they are."""
    top = 2 ** (bits - 1) - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = (x.detach().abs().amax(-1, keepdim=True).to(wide) / top).to(x.dtype)
    scale = scale.clamp(min=torch.finfo(x.dtype).tiny)  # of a token of zeros
    rounded: Tensor = ops.load("fake_quantize")(x, scale, torch.zeros_like(scale), -top - 1, top)
    return rounded


class FakeQuantLinear(Replaced):
    """y = x Q(W)^T + b with Q(W) anew in each pass: W is trained, and packed in the end as the last pass rounded it.

    group_size  inputs that share a grid, fitted to their least and largest weight; None: all of an output
    activation_bits  of the inputs, token by token; 16: as they come
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None,
        symmetric: bool,
        grid: GridName,
        activation_bits: int = 16,
        bias: bool = False,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.base: Any = nn.Linear(in_features, out_features, bias=False) if base is None else base  # holds W
        self.bits, self.group_size, self.symmetric, self.grid = bits, group_size, symmetric, grid
        self.activation_bits = activation_bits
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))

    @classmethod
    def of(cls, linear: nn.Module, **settings: Any) -> Self:
        """Train from the matrix of `linear`, in float32; weights that it holds at zero stay there."""
        weight, keep = dense_weight(linear), kept(linear)
        base = make_linear(weight.clone(), None) if keep is None else MaskedLinear.of(weight, keep)
        module = cls(weight.shape[1], weight.shape[0], base=base, **settings)
        module.bias = linear.bias  # type: ignore[assignment]
        return module.train(linear.training)

    def share(self) -> tuple[list[Tensor], list[Grid]]:
        """W in parts [out, groups, n] of one width, and the grids of their groups as they are stored."""
        weight: Tensor = self.base.weight.float()
        sharing = [weight.unsqueeze(1)] if self.group_size is None else split_groups(weight, self.group_size)
        grids = [fit_grid(part.detach(), self.bits, self.symmetric, self.grid).as_stored() for part in sharing]
        return sharing, grids

    def rounded(self) -> Tensor:
        """Q(W) float32 [out, in], through which gradients reach W."""
        quantize, top = ops.load("fake_quantize"), 2**self.bits - 1
        parts = [quantize(part, grid.scale, grid.zero, 0, top) for part, grid in zip(*self.share(), strict=True)]
        return torch.cat([part.flatten(1) for part in parts], 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits < 16:
            x = round_tokens(x, self.activation_bits)
        y = nn.functional.linear(x, self.rounded().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        return self.rounded().detach()

    def kept(self) -> Tensor | None:
        return kept(self.base)

    def rebuilt(self, weight: Tensor) -> FakeQuantLinear:
        config = self.config() | {"bias": False}
        module = FakeQuantLinear(**config, base=rebuilt(self.base, weight))
        module.bias = self.bias
        return module

    @torch.no_grad()
    def pack(self, storage: torch.dtype | Storage) -> nn.Module:
        """Q(W) in its codes; with a rounding of the inputs in front, if there is one."""
        sharing, grids = self.share()
        joined = torch.cat([part.flatten(1) for part in sharing], 1)
        rounds = self.activation_bits < 16
        stood = Stood(None if rounds else self.bias, self.kept())
        packed = round_linear(stood, joined, sharing, grids, self.symmetric, self.group_size)
        if not rounds:
            return packed
        module = RoundedInputs(self.in_features, self.out_features, self.activation_bits, base=packed)
        module.bias = self.bias
        return module

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "bits": self.bits,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "grid": self.grid,
            "activation_bits": self.activation_bits,
        }


class RoundedInputs(Replaced):
    """y = A(x) W^T + b: inputs are rounded token by token, to numbers that no kernel multiplies by as integers."""

    simulated = True

    def __init__(
        self, in_features: int, out_features: int, bits: int, bias: bool = False, base: nn.Module | None = None
    ) -> None:
        super().__init__(in_features, out_features)
        self.base = nn.Linear(in_features, out_features, bias=False) if base is None else base
        self.bits = bits
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(round_tokens(x, self.bits))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        return dense_weight(self.base)

    def kept(self) -> Tensor | None:
        return kept(self.base)

    def rebuilt(self, weight: Tensor) -> RoundedInputs:
        module = RoundedInputs(self.in_features, self.out_features, self.bits, base=rebuilt(self.base, weight))
        module.bias = self.bias
        return module

    def config(self) -> dict[str, Any]:
        return super().config() | {"bits": self.bits}


@contextlib.contextmanager
def training_all(run: Run) -> Iterator[None]:
    """Have all that could be trained before still be trained beside what is put in place inside."""
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    yield
    for parameter in trained:
        parameter.requires_grad_(True)
    run.waiting |= set(trained) & set(run.model.parameters())
