"""Remarks in the log that no file can hold."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("not today")


@dataclass(frozen=True)
class Scribbles(Method):
    """For tests of the runner."""

    def apply(self, run: Run) -> None:
        run.log.notes.update(
            {1: "a", (2, 3): float("nan"), "mute": Mute(), "work": lambda: None, "self": run.log.notes}
        )
        run.log.layers["a"] = {7: float("inf")}
