"""Random parts of stored matrices."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effbench.kernels._common.packing import word_count


def random_words(*shape: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random int32: valid packed codes of any width."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)


def random_scales(*shape: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random positive float32 in [0.5, 1.5)."""
    return torch.rand(*shape, device=device, generator=generator) + 0.5


def random_grid(case: Mapping[str, Any], on: dict[str, Any]) -> dict[str, Any]:
    """bits, group_size, and random scale, zero and g_idx of integer codes, as in `IntMatrix`.

    Fields of a case: bits; group_size (or None), per_tensor, zero, g_idx (or False).
    """
    columns, size, bits = case["in_features"], case.get("group_size"), case["bits"]
    groups = -(-columns // (size or columns))
    rows = 1 if case.get("per_tensor") else case["out_features"]
    return {
        "scale": random_scales(rows, groups, **on).half(),
        "zero": random_words(word_count(rows, bits), groups, **on) if case.get("zero") else None,
        "g_idx": (torch.randperm(columns, **on) % groups).to(torch.int32) if case.get("g_idx") else None,
        "bits": bits,
        "group_size": size,
    }
