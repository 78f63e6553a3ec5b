"""QuIP#: E8P12 lattice codes of a matrix rotated by randomised Hadamard transforms on both sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effbench.formats.packed import Packed
from effbench.formats.packing import pack, unpack, word_count
from effbench.kernels.e8p_linear.cases import OP, RESIDUAL_SCALE
from effbench.kernels.e8p_linear.codebook import ONE_BIT, ORDER, PATTERNS, decode
from effbench.kernels.e8p_linear.reference import E8PMatrix
from effbench.kernels.hadamard.cases import OP as HADAMARD
from effbench.kernels.hadamard.matrices import factors

CHUNK = 1 << 13  # vectors encoded at a time, so that what is computed of them stays in cache

# All patterns of squared norm up to 10 are the rearrangements of seven; those of norm 12 are not all there.
ORBITS = torch.unique(PATTERNS[:227].sort(1, descending=True).values, dim=0)
LONG = PATTERNS[227:]


def _digits(patterns: Tensor) -> Tensor:
    """Patterns of 1/2, 3/2 and 5/2 [..., 8] as numbers in base three."""
    powers = 3 ** torch.arange(8, device=patterns.device)
    return ((patterns - 0.5).long() * powers).sum(-1)


INDEX = torch.zeros(3**8, dtype=torch.int32).scatter_(0, _digits(PATTERNS), torch.arange(256, dtype=torch.int32))


def nearest(vectors: Tensor) -> Tensor:
    """The E8P12 code nearest to each vector, int16 (read as unsigned) [...], for vectors [..., 8].

    Exact, with 2 x 36 candidates instead of 65,536. For a shift and a pattern of absolute values the best
    signs are those of the vector, but their product is prescribed: when it is wrong, the coordinate that loses
    least is negated. Among the rearrangements of one pattern the best is sorted like the vector, either way.
    """
    flat = vectors.float().reshape(-1, 8)
    if not len(flat):
        return torch.empty(vectors.shape[:-1], dtype=torch.int16, device=vectors.device)
    return torch.cat([_nearest(part) for part in torch.split(flat, CHUNK)]).view(vectors.shape[:-1])


def _nearest(vectors: Tensor) -> Tensor:
    up, down = (_nearest_shifted(vectors, shift) for shift in (0.25, -0.25))
    # |v - p|^2 = |v - shift|^2 - 2 gain, and of the first term only -2 shift sum(v) differs
    is_up = up[0] - down[0] + vectors.sum(1) / 2 >= 0
    pattern = torch.where(is_up, up[1], down[1])
    negative = torch.where(is_up[:, None], up[2], down[2])
    place = torch.tensor(ORDER, device=vectors.device)
    low = (negative[:, place].int() << torch.arange(8, device=vectors.device)).sum(1)
    return (pattern << 8 | low ^ (~is_up).int()).to(torch.int16)  # bit 0 is read inverted below


def _nearest_shifted(vectors: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gain [n], pattern [n] and which coordinates are negated against it (bool [n, 8], an even number)."""
    orbits, long, index = (table.to(vectors.device) for table in (ORBITS, LONG, INDEX))
    target = vectors - shift
    negative = target < 0
    magnitude = target.abs()
    descending, order = magnitude.sort(1, descending=True)
    loss = magnitude[:, :1] * long[:, 0]
    for i in range(1, 8):
        loss = torch.minimum(loss, magnitude[:, i : i + 1] * long[:, i])
    loss = torch.cat([(descending[:, 7:] / 2).expand(-1, len(orbits)), loss], 1)

    candidates = torch.cat([orbits, long])
    odd = candidates.sum(1) % 2 == 1
    gain = torch.cat([descending @ orbits.T, magnitude @ long.T], 1) - candidates.square().sum(1) / 2
    wrong = (negative.sum(1, keepdim=True) % 2 == 1) != odd
    best, choice = torch.where(wrong, gain - 2 * loss, gain).max(1)

    chosen = candidates[choice]
    sorted_like = torch.empty_like(chosen).scatter_(1, order, chosen)
    chosen = torch.where((choice < len(orbits))[:, None], sorted_like, chosen)
    flip = (magnitude * chosen).argmin(1, keepdim=True)
    negative = negative.scatter(1, flip, negative.gather(1, flip) ^ wrong.gather(1, choice[:, None]))
    negative[:, 7] ^= odd[choice]  # the sign that an odd pattern carries already
    return best, index[_digits(chosen)], negative


def nearest_one_bit(vectors: Tensor) -> Tensor:
    """The nearest of the 256 points of the third bit, uint8 [...], for vectors [..., 8]."""
    points = ONE_BIT.to(vectors.device)
    return (vectors.float() @ points.T - points.square().sum(1) / 2).argmax(-1).to(torch.uint8)


def encode(vectors: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes of vectors [..., 8] already divided by the scale, and of what is left over (None for 2 bits)."""
    codes = nearest(vectors)
    if bits == 2:
        return codes, None
    left = (vectors - decode(codes)) * RESIDUAL_SCALE[bits]
    return codes, nearest_one_bit(left) if bits == 3 else nearest(left)


def rotate(weight: Tensor, signs_in: Tensor, signs_out: Tensor) -> Tensor:
    """H_out S_out W S_in H_in^T for W [out, in] and signs of +-1: the matrix that is encoded."""
    half = HADAMARD(weight.float() * signs_in)
    return HADAMARD((half.T * signs_out).contiguous()).T


def rotate_back(rotated: Tensor, signs_in: Tensor, signs_out: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    half = HADAMARD(rotated.T.contiguous(), transpose=True) * signs_out
    return HADAMARD(half.T.contiguous(), transpose=True) * signs_in


class E8PLinear(Packed):
    """W = S_out H_out^T (scale * points) H_in S_in, points of 2, 3 or 4 bits a weight.

    Both sizes need a Hadamard matrix, `in_features` divisible by 8; ValueError otherwise.
    """

    metadata = frozenset({"scale", "signs_in", "signs_out"})
    maskable = False  # rotated weights cannot be held at zero
    weight: Tensor
    residual: Tensor | None
    scale: Tensor
    signs_in: Tensor
    signs_out: Tensor

    def __init__(self, in_features: int, out_features: int, bits: int = 2, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        if bits not in RESIDUAL_SCALE:
            raise ValueError(f"bits={bits}: one of 2, 3, 4")
        if in_features % 8:
            raise ValueError(f"{in_features} inputs are not a multiple of 8")
        factors(in_features), factors(out_features)
        self.bits = bits
        codes = (out_features, in_features // 8)
        self.reserve("weight", *codes, dtype=torch.int16)
        self.declare_optional("residual")
        if bits > 2:
            self.reserve("residual", *codes, dtype=torch.uint8 if bits == 3 else torch.int16)
        self.reserve("scale", dtype=torch.float32)
        self.reserve("signs_in", word_count(in_features, 1), dtype=torch.int32)
        self.reserve("signs_out", word_count(out_features, 1), dtype=torch.int32)

    @classmethod
    def of(
        cls,
        codes: Tensor,
        scale: Tensor,
        signs_in: Tensor,
        signs_out: Tensor,
        residual: Tensor | None = None,
        *,
        bias: Tensor | None = None,
    ) -> E8PLinear:
        """Hold codes int16 [out, in / 8] of `rotate(W, signs_in, signs_out) / scale`, with signs of +-1 [in], [out].

        residual: None (2 bits), uint8 (3 bits) or int16 (4 bits) [out, in / 8], as `encode` returns them.
        """
        bits = 2 if residual is None else 3 if residual.dtype == torch.uint8 else 4
        module = cls(codes.shape[1] * 8, codes.shape[0], bits, bias is not None)
        return module.fill(
            bias,
            weight=codes,
            residual=residual,
            scale=scale.reshape(()),
            signs_in=pack(signs_in < 0, 1),
            signs_out=pack(signs_out < 0, 1),
        )

    def config(self) -> dict[str, Any]:
        return super().config() | {"bits": self.bits}

    def signs(self) -> tuple[Tensor, Tensor]:
        """The sign vectors, +-1 float32 [in] and [out]."""
        return (
            1.0 - 2.0 * unpack(self.signs_in, 1, self.in_features),
            1.0 - 2.0 * unpack(self.signs_out, 1, self.out_features),
        )

    def product(self, x: Tensor) -> Tensor:
        signs_in, signs_out = (signs.to(x.dtype) for signs in self.signs())
        rotated = HADAMARD(x * signs_in)
        y = OP(rotated, self.weight, self.scale, self.residual, RESIDUAL_SCALE[self.bits])
        return HADAMARD(y, transpose=True) * signs_out

    def dense_weight(self) -> Tensor:
        matrix = E8PMatrix(self.weight, self.scale, self.residual, RESIDUAL_SCALE[self.bits])
        rotated = matrix.dense(self.in_features)
        return rotate_back(rotated, *self.signs())

    def rebuilt(self, weight: Tensor) -> E8PLinear:
        """The same scale and signs; every 8 rotated weights go to the nearest points (4 bits: stage by stage)."""
        rotated = rotate(weight, *self.signs()) / self.scale
        codes, residual = encode(rotated.reshape(self.out_features, -1, 8), self.bits)
        return E8PLinear.of(codes, self.scale, *self.signs(), residual, bias=self.bias)
