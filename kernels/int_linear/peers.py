"""Kernels of others for `int_linear`: torch's 4-bit product (tinygemm) and gemlite."""

from collections.abc import Callable

import torch
from torch import Tensor

from effbench.kernels._common.launch import flatten_rows
from effbench.kernels._common.packing import unpack
from effbench.kernels.int_linear.reference import IntMatrix, zero_points
from effbench.ops import Declined

INNER_TILES = 8  # tiles of 16 inputs that tinygemm keeps together


def tinygemm(x: Tensor, matrix: IntMatrix) -> Callable[[], Tensor]:
    """torch's product with W = (code - 8) * scale + shift; scales and shifts are rounded to the type of x."""
    weight, scale, zero, g_idx, bits, group = matrix
    outputs, inputs = weight.shape[0], x.shape[-1]
    if bits != 4 or g_idx is not None or scale.shape[0] == 1:
        raise Declined("takes 4 bits and scales by row and group")
    if group not in (32, 64, 128, 256) or inputs % group:
        raise Declined("takes whole groups of 32, 64, 128 or 256")
    if inputs % (16 * INNER_TILES) or outputs % 16:
        raise Declined("takes inputs in multiples of 128 and outputs in multiples of 16")
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise Declined("takes bfloat16")
    codes = unpack(weight, bits, inputs)
    shift = scale.float() * (8 - zero_points(scale, zero, bits))
    grid = torch.stack([scale.float(), shift], dim=-1).transpose(0, 1).to(x.dtype).contiguous()  # [groups, out, 2]
    flat, shape = flatten_rows(x), (*x.shape[:-1], outputs)
    aten = torch.ops.aten
    if x.is_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)  # the earlier code is the higher half
        packed = aten._convert_weight_to_int4pack(pairs, INNER_TILES)
        return lambda: aten._weight_int4pack_mm(flat, packed, group, grid).view(shape)
    packed = aten._convert_weight_to_int4pack_for_cpu(codes, INNER_TILES)
    return lambda: aten._weight_int4pack_mm_for_cpu(flat, packed, group, grid).view(shape)


def gemlite(x: Tensor, matrix: IntMatrix) -> Callable[[], Tensor]:
    """gemlite's product, chosen and tuned by its first call; scales and zeros are rounded to the type of x."""
    weight, scale, zero, g_idx, bits, group = matrix
    outputs, inputs = weight.shape[0], x.shape[-1]
    if bits == 3 or g_idx is not None or 1 in scale.shape or x.dtype not in (torch.bfloat16, torch.float16):
        raise Declined("takes 2, 4 or 8 bits, scales by row and group, and 16-bit x")
    if group is None or inputs % group:
        raise Declined("takes whole groups")
    try:
        import gemlite as package
    except Exception as error:  # it asks for a GPU while it is imported
        raise Declined(f"cannot be imported: {error}") from None
    kind = package.DType.BF16 if x.dtype == torch.bfloat16 else package.DType.FP16
    layer = package.GemLiteLinear(bits, group, inputs, outputs, input_dtype=kind, output_dtype=kind)
    codes = unpack(weight, bits, inputs).to(torch.uint8)
    layer.pack(codes, scale.to(x.dtype), zero_points(scale, zero, bits).to(x.dtype))
    return lambda: layer(x)
