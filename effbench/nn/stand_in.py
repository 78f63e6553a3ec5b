"""One process that stands for one of several, of which the others are not there.

What they would hold and say is taken to be what this one holds and says: collectives are those of torch's fake process
group, which gives each process its own. With hollow tensors (`effbench.nn.hollow`) engines of parallel training run so
as they are, and a process comes to hold what it would.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, distributed

OBJECTS = ("all_gather_object", "broadcast_object_list", "recv")  # which read values that no other process has sent


@contextlib.contextmanager
def stand_for(process: int, processes: int) -> Iterator[None]:
    """Be `process` of so many inside; of one alone, nothing is done. No process group may be there."""
    if processes == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before, hook = {name: getattr(distributed, name) for name in OBJECTS}, sys.excepthook  # which torch replaces
    distributed.init_process_group("fake", store=FakeStore(), rank=process, world_size=processes)
    try:
        for name, replacement in zip(OBJECTS, (_gather, _broadcast, _receive), strict=True):
            setattr(distributed, name, replacement)
        yield
    finally:
        for name, own in before.items():
            setattr(distributed, name, own)
        sys.excepthook = hook
        distributed.destroy_process_group()


def _gather(found: list[Any], value: Any, *_: Any, **__: Any) -> None:
    found[:] = [value] * len(found)


def _broadcast(found: list[Any], *_: Any, **__: Any) -> None:
    """The others have sent what is there."""


def _receive(tensor: Tensor, *_: Any, **__: Any) -> None:
    """Whole numbers that one process passes to the next are votes, and all vote for what this one does."""
    tensor.fill_(1)
