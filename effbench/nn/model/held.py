"""What a process holds of tensors, in bytes: what is tied, shared or viewed counts once, by storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor


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
