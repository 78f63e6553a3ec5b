"""Column by column, every error made up for by the columns that follow: the loop of GPTQ and of SparseGPT."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effbench.core.errors import Unsupported

Settle = Callable[[int, Tensor, Tensor], Tensor]


def compensate(weight: Tensor, factor: Tensor, settle: Settle, block: int = 128) -> None:
    """Settle `weight` [out, in] input by input in the order of its columns.

    `factor` [in, in] is upper triangular with U^T U = H^-1. `settle(column, ahead, rest)` gives the final values
    [out] of a column. `ahead` [columns left in its block, out] are the weights from this column on with all errors
    so far made up for, `rest` [in, out] those with the errors of finished blocks only.
    """
    rest = weight.T.clone(memory_format=torch.contiguous_format)  # columns become rows, together in memory
    width = len(rest)
    for start in range(0, width, block):
        stop = min(start + block, width)
        work = rest[start:stop].clone()
        errors = torch.empty_like(work)
        for column in range(start, stop):
            i = column - start
            final = settle(column, work[i:], rest)
            error = torch.sub(work[i], final, out=errors[i]).div_(factor[column, column])
            work[i + 1 :] -= factor[column, column + 1 : stop, None] * error
        rest[stop:] -= factor[start:stop, stop:].T @ errors


def without_dead(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of `weight` [out, in] and `hessian` [in, in] in which inputs that are always zero do no harm."""
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    return weight.masked_fill(dead, 0), hessian


def inverse_factor(hessian: Tensor, damp: float, name: str) -> Tensor:
    """U [in, in], upper triangular, with U^T U = (H + damp * mean(diag H) * I)^-1.

    The factorisations are those of the authors, in the precision of `hessian`; where float32 cannot do them
    float64 does. Raises `Unsupported` if neither can.
    """
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        lower, failed = torch.linalg.cholesky_ex(damped.to(dtype))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                found: Tensor = upper.to(hessian.dtype)
                return found
    raise Unsupported(f"{name}: the Hessian is not positive definite at damp={damp}; raise damp")
