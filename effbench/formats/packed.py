"""What all packed linears share: fixed storage types, checked filling, the bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from effbench.nn.linear import Replaced


class Packed(Replaced):
    """A linear whose matrix is stored as codes. Casting the model leaves the codes and their scales alone."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))

    def absent(self, *names: str) -> None:
        """Declare tensors that this instance may turn out not to store."""
        for name in names:
            self.register_buffer(name, None)

    def reserve(self, name: str, *shape: int, dtype: torch.dtype) -> None:
        """Declare a stored tensor; `fill` gives it its values."""
        self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def fill(self, bias: Tensor | None, **tensors: Tensor | None) -> Self:
        """Set stored tensors; ValueError where a shape differs or a float does not fit the storage type."""
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            target = self.get_buffer(name)
            stored = tensor.detach().to(target.dtype, copy=True).contiguous()
            if stored.shape != target.shape:
                raise ValueError(f"{name} is {list(stored.shape)}, not {list(target.shape)}")
            if stored.is_floating_point() and not stored.float().isfinite().all():
                raise ValueError(f"{name} has values that are not finite in {target.dtype}")
            setattr(self, name, stored)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone())
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = self._buffers[name]
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def product(self, x: Tensor) -> Tensor:
        """x W^T, [..., in] -> [..., out]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def like(self) -> dict[str, Any]:
        """The stored tensors by name, as `fill` takes them."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
