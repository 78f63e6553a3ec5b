"""What a process holds of tensors, in bytes: what is tied, shared or viewed counts once, by storage."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; changes of it are changes of the tensor."""
    held: Tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # `to_local` would be dispatched
    return held.trigger_wait() if isinstance(held, AsyncCollectiveTensor) else held


def identify(tensor: Tensor) -> int:
    """What tells the storage of a tensor from all others that are alive; hollow ones have no address."""
    return int(local(tensor).untyped_storage()._cdata)


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors occupy in this process: what several of them share or look at counts once, by storage."""
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for tensor in map(local, tensors):
        if not tensor.numel():
            continue
        begin = int(tensor.storage_offset()) * tensor.itemsize
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        spans[identify(tensor)].append((begin, begin + reach * tensor.itemsize))
    total = 0
    for parts in spans.values():
        end = 0
        for first, last in sorted(parts):
            total += max(0, last - max(first, end))
            end = max(end, last)
    return total


class Followed:
    """Bytes of the storages that are followed: `now` those that are still there, `peak` the most at a time."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: set[int] = set()

    def follow(self, tensor: Tensor) -> None:
        """Follow the storage of a tensor from now on."""
        if (key := identify(tensor)) not in self._known:
            storage = local(tensor).untyped_storage()
            self._known.add(key)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Made(Followed, TorchDispatchMode):
    """Follows the tensors that are made inside."""

    def __init__(self) -> None:
        Followed.__init__(self)
        TorchDispatchMode.__init__(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {identify(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and identify(tensor) not in given:
                self.follow(tensor)
        return out
