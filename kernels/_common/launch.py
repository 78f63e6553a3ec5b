"""Launching Triton kernels, or only recording what would be launched, so that it can be compiled and read."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Launch(NamedTuple):
    """One kernel launch, and how many numbers a step of its main loop processes (all of a program without a loop)."""

    kernel: Any
    numbers: int
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int


_recorded: list[Launch] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside, kernels are not run; the launches they would have made are in the list."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    numbers: int,
    num_warps: int,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid`; nothing to do where the grid is empty."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, numbers, grid, arguments, constants, num_warps))
    elif 0 not in grid:
        kernel[grid](*arguments, **constants, num_warps=num_warps)


class Tile(NamedTuple):
    """Rows of x, rows of the matrix and warps of one program of a linear op."""

    block_m: int
    block_n: int
    num_warps: int


def choose_tile(batch: int) -> Tile:
    """One vector: many small programs without barriers, as reading the matrix is what takes time."""
    return Tile(1, 4, 1) if batch == 1 else Tile(16, 32, 4)


def launch_linear(
    kernel: Any,
    x: torch.Tensor,
    out_features: int,
    *arguments: Any,
    block_k: int,
    tile: Tile | None = None,
    operand: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    **constants: Any,
) -> torch.Tensor:
    """y [..., out] of a kernel over blocks of rows of x and of the matrix, `kernel(x, *arguments, y, rows of x, ...)`.

    tile       what one program works on; by default `choose_tile`
    operand    x as the kernel reads it, where that is not [rows, in]
    dtype      of y, where that is not the dtype of x
    constants  of the kernel beside IN, OUT and the BLOCK sizes
    """
    batch, in_features = count_rows(x), x.shape[-1]
    block_m, block_n, num_warps = tile or choose_tile(batch)
    y = torch.empty(batch, out_features, dtype=dtype or x.dtype, device=x.device)
    launch(
        kernel,
        (-(-out_features // block_n), -(-batch // block_m)),
        flatten_rows(x) if operand is None else operand,
        *make_contiguous(*arguments),
        y,
        batch,
        IN=in_features,
        OUT=out_features,
        **constants,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        numbers=block_n * block_k,
        num_warps=num_warps,
    )
    return y.view(*x.shape[:-1], out_features)


def make_contiguous(*arguments: Any) -> Iterator[Any]:
    """The arguments, tensors among them contiguous, as kernels index them. For what a kernel reads, not writes."""
    return (value.contiguous() if isinstance(value, torch.Tensor) else value for value in arguments)


def count_rows(x: torch.Tensor) -> int:
    """Rows of x [..., n] seen as a matrix."""
    return x.shape[:-1].numel()


def flatten_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., n] as contiguous [rows, n]."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def largest_power(n: int, at_most: int) -> int:
    """The largest power of two that divides n, up to `at_most`."""
    return min(n & -n, at_most)


def covering_power(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
