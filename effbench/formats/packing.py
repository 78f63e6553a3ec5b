"""Packed codes, as the kernels read them."""

from effbench.kernels._common.packing import pack, unpack, word_count

__all__ = ["pack", "unpack", "word_count"]
