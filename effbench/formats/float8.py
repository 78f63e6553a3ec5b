"""8-bit floats (E4M3) with a float32 scale per row or per tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effbench.formats.packed import Packed
from effbench.kernels.fp8_linear.cases import OP
from effbench.kernels.fp8_linear.reference import LARGEST, Fp8Matrix


class FP8Linear(Packed):
    """W = scale * code.

    activations  "none"; "token" or "tensor": inputs are rounded to E4M3 too, each token or all with one factor
    """

    metadata = frozenset({"scale", "mask"})
    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        per_row: bool = True,
        activations: str = "none",
        masked: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, masked)
        if activations not in ("none", "token", "tensor"):
            raise ValueError(f"activations={activations!r}: one of 'none', 'token', 'tensor'")
        self.per_row, self.activations = per_row, activations
        self.reserve("weight", out_features, in_features, dtype=torch.float8_e4m3fn)
        self.reserve("scale", out_features if per_row else 1, 1, dtype=torch.float32)

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, *, activations: str = "none", bias: Tensor | None = None) -> FP8Linear:
        """Hold codes float8_e4m3fn [out, in] and scale [out, 1] or [1, 1]."""
        out_features, in_features = codes.shape
        per_row = scale.shape[0] == out_features
        return cls(in_features, out_features, per_row, activations, bias=bias is not None).fill(
            bias, weight=codes, scale=scale
        )

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        *,
        per_row: bool = True,
        activations: str = "none",
        bias: Tensor | None = None,
    ) -> FP8Linear:
        """Round `weight` [out, in] so that the largest magnitude of each row (or of all) becomes 448."""
        weight = weight.float()
        largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().amax().view(1, 1)
        scale = largest.clamp(min=1e-12) / LARGEST
        codes = (weight / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return cls.of(codes, scale, activations=activations, bias=bias)

    def config(self) -> dict[str, Any]:
        return super().config() | {"per_row": self.per_row, "activations": self.activations}

    @property
    def decodes(self) -> bool:
        return self.activations == "none"

    def product(self, x: Tensor) -> Tensor:
        return OP(x, self.weight, self.scale, self.activations)

    def dense_weight(self) -> Tensor:
        return Fp8Matrix(self.weight, self.scale, self.activations).dense(self.in_features)

    def rebuilt(self, weight: Tensor) -> FP8Linear:
        rounded = FP8Linear.from_weight(
            self.mask_weight(weight), per_row=self.per_row, activations=self.activations, bias=self.bias
        )
        return rounded.hold(self.kept())
