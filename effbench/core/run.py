"""A run: what a recipe changes, and the services that kinds ask of it.

`Run` is the contract between methods and the machinery; `effbench.nn.run.ModelRun` implements it with torch.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from effbench.core.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from effbench.core.kinds import Select, Swap, Weights
    from effbench.core.method import Method
    from effbench.nn.data import Data


class Plan:
    """Slots have exactly one writer, chains are ordered; closing the plan undoes everything."""

    name = ""
    slots: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._slots: dict[str, tuple[Any, str]] = {}
        self._chains: dict[str, list[Any]] = {name: [] for name in self.chains}
        self._undo = contextlib.ExitStack()

    def claim(self, slot: str, value: Any, owner: Method) -> None:
        """Write a slot, or raise `Conflict` naming both writers."""
        if slot not in self.slots:
            raise KeyError(f"{self.name} has no slot {slot!r}; it has {', '.join(self.slots)}")
        if slot in self._slots:
            raise Conflict(conflict(f"{self.name}.{slot}", self._slots[slot][1], str(owner)))
        self._slots[slot] = (value, str(owner))

    def slot(self, slot: str, default: Any = None) -> Any:
        """The value in a slot, or `default`."""
        return self._slots[slot][0] if slot in self._slots else default

    def chain(self, name: str) -> list[Any]:
        """An ordered chain; methods append to it."""
        return self._chains[name]

    def on_exit(self, undo: Callable[[], Any]) -> None:
        """Have `undo` called when the plan is closed."""
        self._undo.callback(undo)

    def close(self) -> None:
        """Undo and forget everything, latest first."""
        self._undo.close()
        self.__init__()  # type: ignore[misc]


class TrainPlan(Plan):
    """The plan of the next `fit`, which uses it up."""

    name = "train"
    slots = ("precision", "optimizer", "activations", "parallel", "sampler")
    chains = ("batch", "loss", "param_groups", "optimizer_wrap", "context", "on_step")


class InferPlan(Plan):
    """How scoring and generation go; lives until the probes are done."""

    name = "infer"
    slots = ("decoder", "rope", "encoder")
    chains = ("cache_keep", "prompt", "attend_mask", "attend_extra", "attend_observe")

    @property
    def streams(self) -> bool:
        """Whether cached tokens are evicted or encoded, so that scoring has to go token by token."""
        return bool(self.chain("cache_keep")) or self.slot("encoder") is not None


def conflict(slot: str, first: str, second: str) -> str:
    """The one wording of a `Conflict`."""
    return f"Conflict: {slot} is already set by {first}, {second} cannot also set it; leave one of them out"


class Run:
    """One recipe on one model: everything a method may touch."""

    model: nn.Module  # being changed
    reference: nn.Module  # the unchanged original; probes compare with it, distillation may name it
    data: Data  # pool, train, calibration and held-out sets, tasks
    train: TrainPlan
    infer: InferPlan
    seed: int
    device: torch.device
    log: dict[str, Any]  # what happened, for the record

    def stream(self, method: Weights) -> None:
        """Compress layer by layer with streamed statistics."""
        raise NotImplementedError

    def swap(self, method: Swap) -> None:
        """Replace the target modules and freeze the rest."""
        raise NotImplementedError

    def settle(self) -> None:
        """Give replaced modules that have seen a fit their final form."""
        raise NotImplementedError

    def select(self, method: Select) -> None:
        """Rank the pool and cut the train set."""
        raise NotImplementedError

    def attach(self, method: Method) -> None:
        """Put a method's hooks and slots into the train plan."""
        raise NotImplementedError

    def fit(self, **settings: Any) -> dict[str, Any]:
        """Train what is trainable by the train plan, use the plan up, return what happened."""
        raise NotImplementedError

    def snapshot(self, name: str) -> None:
        """Put a frozen copy of the model on the shelf under `name`."""
        raise NotImplementedError

    def role(self, name: str) -> nn.Module:
        """The model of a role: `reference`, `model`, or the name of a snapshot."""
        raise NotImplementedError
