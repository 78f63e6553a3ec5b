"""Launching Triton kernels, or only recording what would be launched, so that it can be compiled and read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One kernel launch: what the compiler has to know, and how much one step of its inner loop decodes."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, kernels are not run; the launches they would have made are in the list."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, **constants: Any
) -> None:
    """Run `kernel` over `grid`; nothing to do where the grid is empty."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants, num_warps))
    elif 0 not in grid:
        kernel[grid](*arguments, **constants, num_warps=num_warps)


def matrix(x: torch.Tensor) -> torch.Tensor:
    """x [..., n] as contiguous [rows, n]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def largest_power(n: int, at_most: int) -> int:
    """The largest power of two that divides n, up to `at_most`."""
    return min(n & -n, at_most)


def covering_power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


