"""Codes that look their values up: one table for all rows in blocks (NF4) or one per row (SqueezeLLM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effbench.formats.packed import Packed
from effbench.formats.packing import pack, word_count
from effbench.kernels._common.csr import positions
from effbench.kernels._common.dynamic_map import SIGNED
from effbench.kernels.lut_linear.cases import OP
from effbench.kernels.lut_linear.reference import LutMatrix

ABSMAX_BLOCK = 256  # factors that share a second-level factor


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level, int64 like `values`; levels [k], or [rows, k] for values [rows, n].

    Ties go to the lower level.
    """
    order = levels.argsort(-1)
    ascending = levels.gather(-1, order)
    midpoints = ((ascending[..., 1:] + ascending[..., :-1]) / 2).contiguous()
    place = torch.searchsorted(midpoints, values.contiguous())
    return order[place] if levels.dim() == 1 else order.gather(1, place)


def block_absmax(weight: Tensor, block: int) -> Tensor:
    """Largest magnitude of each `block` weights of the flattened matrix, float32 [ceil(numel / block)]."""
    flat = weight.float().flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block).abs().amax(1)


def spread(absmax: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """The factor of every weight, [out, in]."""
    return absmax.repeat_interleave(block)[: shape[0] * shape[1]].view(shape)


class LutLinear(Packed):
    """W = lut[code] * absmax of its block + outliers.

    per_row       a table of 2^bits float16 values per row; otherwise one float32 table
    block         weights of the flattened matrix that share a factor; 0: no factors
    double_quant  factors stored as 8-bit codes about their mean, with a float32 factor per 256 of them
    outliers      number of float16 values that are added at CSR positions
    """

    metadata = frozenset(
        {"lut", "absmax", "absmax_code", "absmax_map", "absmax_scale", "absmax_mean", "crow", "col", "mask"}
    )
    weight: Tensor
    lut: Tensor
    absmax: Tensor | None
    absmax_code: Tensor
    absmax_map: Tensor
    absmax_scale: Tensor
    absmax_mean: Tensor
    crow: Tensor | None
    col: Tensor | None
    values: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        per_row: bool = False,
        block: int = 0,
        double_quant: bool = False,
        outliers: int = 0,
        masked: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, masked)
        if bits not in (2, 3, 4):
            raise ValueError(f"bits={bits}: one of 2, 3, 4")
        if double_quant and not block:
            raise ValueError("double quantization needs blocks")
        self.bits, self.per_row, self.block, self.double_quant = bits, per_row, block, double_quant
        self.reserve("weight", out_features, word_count(in_features, bits), dtype=torch.int32)
        if per_row:
            self.reserve("lut", out_features, 2**bits, dtype=torch.float16)
        else:
            self.reserve("lut", 2**bits, dtype=torch.float32)
        self.declare_optional("absmax", "crow", "col", "values")
        blocks = -(-in_features * out_features // block) if block else 0
        if double_quant:
            self.reserve("absmax_code", blocks, dtype=torch.uint8)
            self.reserve("absmax_map", 256, dtype=torch.float32)
            self.reserve("absmax_scale", -(-blocks // ABSMAX_BLOCK), dtype=torch.float32)
            self.reserve("absmax_mean", dtype=torch.float32)
        elif block:
            self.reserve("absmax", blocks, dtype=torch.float32)
        if outliers:
            self.reserve("crow", out_features + 1, dtype=torch.int32)
            self.reserve("col", outliers, dtype=torch.int16 if in_features <= 2**15 else torch.int32)
            self.reserve("values", outliers, dtype=torch.float16)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        lut: Tensor,
        *,
        bits: int,
        block: int = 0,
        absmax: Tensor | None = None,
        double_quant: bool = False,
        outliers: Tensor | None = None,
        bias: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> LutLinear:
        """Pack codes [out, in] with their table lut [2^bits] or [out, 2^bits].

        absmax    float32 [ceil(out * in / block)], required with `block`; `double_quant` quantizes it
        outliers  [out, in], added to the looked-up matrix; what is not zero is stored
        keep      bool [out, in], which weights a pruning method left; the others must look up zero
        """
        if not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
            raise ValueError(f"codes do not fit in {bits} bits")
        if (absmax is None) != (block == 0):
            raise ValueError("block and absmax come together")
        out_features, in_features = codes.shape
        tensors = {"weight": pack(codes, bits), "lut": lut}
        number = 0
        if absmax is not None:
            tensors |= quantize_factors(absmax) if double_quant else {"absmax": absmax}
        if outliers is not None:
            row, col = outliers.nonzero(as_tuple=True)
            number = len(row)
            counts = torch.bincount(row, minlength=out_features).cumsum(0)
            if number:
                crow = torch.cat([counts.new_zeros(1), counts])
                tensors |= {"crow": crow, "col": col, "values": outliers[row, col]}
        module = cls(
            in_features, out_features, bits, lut.dim() == 2, block, double_quant, number, bias=bias is not None
        )
        return module.fill(bias, **tensors).hold(keep)

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "bits": self.bits,
            "per_row": self.per_row,
            "block": self.block,
            "double_quant": self.double_quant,
            "outliers": 0 if self.values is None else len(self.values),
        }

    def factors(self) -> Tensor | None:
        """The factor of every block, float32 [blocks]; None without blocks."""
        if not self.double_quant:
            return self.absmax
        codes = self.absmax_code
        scale = self.absmax_scale.repeat_interleave(ABSMAX_BLOCK)[: len(codes)]
        return self.absmax_map[codes.long()] * scale + self.absmax_mean

    def product(self, x: Tensor) -> Tensor:
        sparse = (self.crow, self.col, self.values)
        return OP(x, self.weight, self.lut, self.factors(), *sparse, self.bits, self.block)

    def dense_weight(self) -> Tensor:
        sparse = (self.crow, self.col, self.values)
        return LutMatrix(self.weight, self.lut, self.factors(), *sparse, self.bits, self.block).dense(self.in_features)

    def rebuilt(self, weight: Tensor) -> LutLinear:
        """The same tables and outlier positions. Factors are those of the new matrix, so that none of it is cut off;
        where there are outliers they stay, and outliers take up what their codes leave over."""
        weight = self.mask_weight(weight)
        absmax, scaled, tensors = self.factors(), weight, self.like()
        if absmax is not None:
            if self.crow is None:
                absmax = block_absmax(weight, self.block)
                tensors |= quantize_factors(absmax) if self.double_quant else {"absmax": absmax}
            factor = spread(absmax, self.block, (self.out_features, self.in_features))
            scaled = torch.where(factor == 0, 0, weight / factor)
        tensors |= {"weight": pack(nearest(scaled, self.lut.float()), self.bits)}
        module = LutLinear(**self.config()).to(self.weight.device)
        if self.crow is None or self.col is None:
            return module.fill(self.bias, **tensors)
        matrix = LutMatrix(tensors["weight"], self.lut, absmax, bits=self.bits, block=self.block)
        rounded = matrix.dense(self.in_features)
        left = (weight - rounded)[positions(self.crow, self.col)]
        return module.fill(self.bias, **tensors | {"values": left})


def quantize_factors(absmax: Tensor) -> dict[str, Tensor]:
    """QLoRA's double quantization: 8-bit dynamic codes of absmax - mean, in blocks of 256 factors."""
    mean = absmax.mean()
    centred = absmax - mean
    scale = block_absmax(centred, ABSMAX_BLOCK)
    spread_scale = scale.repeat_interleave(ABSMAX_BLOCK)[: len(absmax)]
    levels = SIGNED.to(absmax.device)
    codes = nearest(torch.where(spread_scale == 0, 0, centred / spread_scale), levels)
    return {"absmax_code": codes, "absmax_map": levels, "absmax_scale": scale, "absmax_mean": mean}
