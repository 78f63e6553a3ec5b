"""E4M3 weights and inputs of torchao, a scale per row or token and one for all, decoded, and their product."""

from __future__ import annotations

import torch
from golden import write
from torch import Tensor
from torchao.quantization.quant_primitives import (
    _choose_scale_float8,
    _dequantize_affine_float8,
    _quantize_affine_float8,
)


def quantize(matrix: Tensor, block: list[int]) -> tuple[Tensor, Tensor]:
    """Codes, and what they stand for; a block shares a scale."""
    scale = _choose_scale_float8(matrix, block, float8_dtype=torch.float8_e4m3fn)
    codes = _quantize_affine_float8(matrix, scale, torch.float8_e4m3fn)
    return codes.view(torch.uint8), _dequantize_affine_float8(codes, scale)


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 100, generator=generator) * 0.02
    weight[5, 7] = 3.0
    x = torch.randn(40, 100, generator=generator) * (0.1 + torch.rand(40, 1, generator=generator) * 4)
    tensors = {"weight": weight, "x": x}
    for name in ("row", "tensor"):
        codes, dense = quantize(weight, [1 if name == "row" else 24, 100])
        _, rounded = quantize(x, [1 if name == "row" else 40, 100])
        tensors |= {f"{name}.codes": codes, f"{name}.dense": dense, f"{name}.y": rounded @ dense.T}
    write("fp8", __file__, ["torchao"], tensors, seed=0)
