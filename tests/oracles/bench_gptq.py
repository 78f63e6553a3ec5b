"""Time of GPTQ on one 4096 x 4096 matrix from a given Hessian: ours beside llm-compressor's, same threads.

Run in the environment of `requirements.txt` with the repository root on PYTHONPATH. Prints seconds (best of
three, the two interleaved) and the ratio ours / theirs, factorisation included in both.
"""

from __future__ import annotations

import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from torch import Tensor

from effbench.methods.quant._common import Grid, inverse_factor
from effbench.methods.quant.gptq import solve


def ours(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    factor = inverse_factor(hessian, 0.01, "matrix")
    grids = [Grid(s.contiguous(), z.contiguous(), 4) for s, z in zip(scale.T, zero.T, strict=True)]
    codes = solve(weight, factor, lambda column, _: grids[column // size])
    return (codes - zero.repeat_interleave(size, 1)) * scale.repeat_interleave(size, 1)


def main(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, n, generator=generator) * 0.02
    inputs = torch.randn(2 * n, n, generator=generator)
    hessian = 2 * inputs.T @ inputs / len(inputs)
    for size, symmetric in ((n, True), (128, False)):
        arguments = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=size)
        parts = weight.unflatten(1, (-1, size))
        scale, signed = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
        zero = signed.float() + 8
        best = {"ours": float("inf"), "theirs": float("inf")}
        for _ in range(3):
            start = time.perf_counter()
            mine = ours(weight, hessian, scale, zero, size)
            best["ours"] = min(best["ours"], time.perf_counter() - start)
            batch = (weight[None].clone(), hessian[None].clone(), scale[None], signed[None])
            start = time.perf_counter()
            theirs, _, _ = quantize_weight(*batch, None, arguments)
            best["theirs"] = min(best["theirs"], time.perf_counter() - start)
        equal = float((((mine - theirs[0]).abs() < scale.repeat_interleave(size, 1) / 2).double()).mean())
        print(
            f"{n} x {n}, 4 bits, {'symmetric' if symmetric else 'affine'}, group {size}, "
            f"{torch.get_num_threads()} threads: ours {best['ours']:.2f} s, llm-compressor {best['theirs']:.2f} s, "
            f"ratio {best['ours'] / best['theirs']:.2f}, equal codes {equal:.6f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
