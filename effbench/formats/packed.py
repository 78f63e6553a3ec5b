"""What all packed linears share: fixed storage types, checked filling, the bias, which weights were pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from effbench.formats.packing import pack, unpack, word_count
from effbench.nn.model.linear import Replaced


class Packed(Replaced):
    """A linear whose matrix is stored as codes. Casting the model leaves the codes and their scales alone.

    masked  which weights were pruned before is stored, so that `rebuilt` keeps them at zero
    """

    maskable: ClassVar[bool] = True  # whether single weights can be held at zero by a mask
    mask: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False, masked: bool = False) -> None:
        super().__init__(in_features, out_features)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))
        self.declare_optional("mask")
        if masked:
            self.reserve("mask", out_features, word_count(in_features, 1), dtype=torch.int32)

    def config(self) -> dict[str, Any]:
        return super().config() | ({} if self.mask is None else {"masked": True})

    def kept(self) -> Tensor | None:
        return None if self.mask is None else unpack(self.mask, 1, self.in_features).bool()

    def hold(self, keep: Tensor | None) -> Self:
        """The same codes, with the knowledge that they are zero where `keep` [out, in] is False."""
        if keep is None:
            return self
        module = type(self)(**self.config() | {"masked": True}).to(self.device)
        return module.fill(self.bias, **self.like() | {"mask": pack(keep, 1)})

    def mask_weight(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] in float32, zero where weights were pruned."""
        keep = self.kept()
        return weight.float() if keep is None else weight.float() * keep

    @property
    def decodes(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return next(buffer.device for buffer in self.buffers())

    def declare_optional(self, *names: str) -> None:
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
