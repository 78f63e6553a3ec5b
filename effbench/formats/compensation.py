"""The loop of GPTQ and SparseGPT: columns are settled one by one, and those that follow compensate each error.

Algorithm 1 of either paper (Frantar et al., 2023; Frantar & Alistarh, 2023). In formulas W are the weights, Q their
final values, E the errors and U the factor, which the papers go on calling H^-1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effbench.core.errors import Unsupported

Settle = Callable[[int, Tensor, Tensor], Tensor]


def compensate(weight: Tensor, factor: Tensor, settle: Settle, block: int = 128) -> None:
    """Settle `weight` [out, in] input by input in the order of its columns: Algorithm 1.

    `factor` [in, in] is upper triangular with U^T U = H^-1. `settle(column, ahead, rest)` gives the final values
    [out] of a column. `ahead` [columns left in its block, out] are the weights from this column on, with all errors
    so far compensated, `rest` [in, out] those with the errors of finished blocks compensated.
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
            # E_:j = (W_:j - Q_:j) / U_jj. With F the columns not yet settled, row j of U is row j of H_F^-1 over the
            # root of its diagonal entry, so that H_F^-1 itself need not be updated from column to column.
            error = torch.sub(work[i], final, out=errors[i]).div_(factor[column, column])
            # W_:k -= E_:j U_jk for the columns k > j of the block.
            work[i + 1 :] -= factor[column, column + 1 : stop, None] * error
        # The lazy batch update: W -= E U for all columns behind the block, by the block's errors at once.
        rest[stop:] -= factor[start:stop, stop:].T @ errors


def neutralize_dead(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
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
                factor: Tensor = upper.to(hessian.dtype)
                return factor
    raise Unsupported(f"{name}: the Hessian is not positive definite at damp={damp}; raise damp")
