"""What the references of the linear ops share: the product with a decoded matrix, and random arguments."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, accumulated in float32 (float64 for float64 x); weight [out, in] float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ weight.to(wide).T).to(x.dtype)


def adjoint(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gradient of x for an op that multiplies by `dense(in_features, <arguments after x>)`."""

    def gradient(grad: Tensor, in_features: int, *rest: Any) -> Tensor:
        return multiply(grad, dense(in_features, *rest).T)

    return gradient


def activations(
    case: Mapping[str, Any], device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Normal x [*batch, in_features]; `batch` is a number or a list of leading dimensions."""
    batch = case["batch"]
    lead = [batch] if isinstance(batch, int) else batch
    x = torch.randn(*lead, case["in_features"], device=device, generator=generator)
    return x.to(dtype)


def words(*shape: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random int32: valid packed codes of any width."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)


def scales(*shape: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random positive float32 in [0.5, 1.5)."""
    return torch.rand(*shape, device=device, generator=generator) + 0.5
