"""A frozen copy of the model as it is now, for later steps to learn from or to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run


@dataclass(frozen=True)
class Snapshot(Method):
    """`fit(), snapshot(name="teacher"), student(), kd(teacher="teacher"), fit()` distils from a model of one's own."""

    paper = "unpublished"
    settles = True

    name: str = "teacher"  # the role that the copy takes

    def check(self) -> None:
        self.require(self.name.isidentifier(), "name is a word such as 'teacher'")
        self.require(self.name not in ("reference", "model"), f"the role {self.name!r} is taken")

    @property
    def makes(self) -> str:
        return self.name

    def apply(self, run: Run) -> None:
        run.snapshot(self.name)
