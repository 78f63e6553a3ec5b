"""What processes tell each other, counted while they do: calls and bytes by kind of collective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
}  # by how ops of torch's namespaces begin; a receipt is the other side of what was sent
SPACES = ("c10d", "_c10d_functional")


class Collectives(TorchDispatchMode):
    """Counts collectives that are called inside: those of `torch.distributed`, `fully_shard`, `DTensor` and pipelines.

    Bytes of one are those of the whole: what is reduced or sent, what is gathered or scattered by all. Calls from
    within C++ would not be seen; `DistributedDataParallel` makes such, and nothing here does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as what it does with local tensors
        out = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") in SPACES:
            name = func._overloadpacket.__name__.lstrip("_")
            kind = next((kind for begin, kind in KINDS.items() if name.startswith(begin)), None)
            if kind is not None:
                size = max(sum(tensor.nbytes for tensor in _find_tensors(part)) for part in (*args, out))
                self.calls[kind] = self.calls.get(kind, 0) + 1
                self.bytes[kind] = self.bytes.get(kind, 0) + size
        return out


def _find_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _find_tensors(inner)
