"""n:m sparsity: of every m consecutive inputs of a row n are stored, each with its place among the m.

Places are packed like any codes (`packing`), in `place_bits(m)` bits each: 2 for 2:4.
"""

import torch
from torch import Tensor

from effbench.kernels._common.packing import pack, unpack, word_count


def place_bits(m: int) -> int:
    """Bits that name one of m places."""
    return max(1, (m - 1).bit_length())


def columns(index: Tensor, in_features: int, n: int, m: int) -> Tensor:
    """The input that every stored value belongs to, int64 [out, in / m * n]."""
    stored = in_features // m * n
    place = unpack(index, place_bits(m), stored).long()
    return place + torch.arange(stored, device=index.device) // n * m


def scatter(values: Tensor, column: Tensor, in_features: int) -> Tensor:
    """The matrix [out, in] with `values` at `column` [out, stored] and zero elsewhere."""
    return values.new_zeros(len(values), in_features).scatter_(1, column, values)


def random_index(
    out: int, in_features: int, n: int, m: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Packed places of a random n:m matrix, int32 [out, words]."""
    order = torch.rand(out, in_features // m, m, device=device, generator=generator).argsort(-1)
    return pack(order[..., :n].sort(-1).values.flatten(1), place_bits(m))


def index_words(in_features: int, n: int, m: int) -> int:
    """Words of a row of packed places."""
    return word_count(in_features // m * n, place_bits(m))
