"""E4M3 weights of torchao, a scale per row and one for a matrix, decoded."""

from __future__ import annotations

import torch
from golden import write
from torchao.quantization.quant_primitives import (
    _choose_scale_float8,
    _dequantize_affine_float8,
    _quantize_affine_float8,
)

if __name__ == "__main__":
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[5, 7] = 3.0
    tensors = {"weight": weight}
    for name, block in {"row": (1, 100), "tensor": (24, 100)}.items():
        scale = _choose_scale_float8(weight, list(block), float8_dtype=torch.float8_e4m3fn)
        codes = _quantize_affine_float8(weight, scale, torch.float8_e4m3fn)
        tensors |= {f"{name}.codes": codes.view(torch.uint8), f"{name}.dense": _dequantize_affine_float8(codes, scale)}
    write("fp8", __file__, ["torchao"], tensors, seed=0)
