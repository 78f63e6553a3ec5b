"""Scales and zero-points of compressed-tensors, for ordinary and one-signed groups."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from golden import write

if __name__ == "__main__":
    weight = torch.randn(24, 6, 32, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:, 1] = weight[:, 1].abs() + 0.01  # all positive
    weight[:, 2] = -weight[:, 2].abs() - 0.01  # all negative
    tensors = {"weight": weight}
    for bits in (2, 3, 4, 8):
        for symmetric in (False, True):
            arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
            scale, zero = calculate_qparams(weight.amin(-1), weight.amax(-1), arguments)
            name = f"b{bits}_{'sym' if symmetric else 'asym'}"
            tensors |= {f"{name}.scale": scale, f"{name}.zero": zero.float() + 2 ** (bits - 1)}
    write("rtn", __file__, ["compressed-tensors"], tensors, seed=0)
