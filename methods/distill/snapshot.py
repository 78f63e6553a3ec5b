"""A frozen copy of the model as it is now, or another model, for later steps to learn from or to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effbench import sources
from effbench.core.errors import Usage
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.files.load import open_beside


@dataclass(frozen=True)
class Snapshot(Method):
    """`fit(), snapshot(name="teacher"), student(), kd(teacher="teacher"), fit()` distils from a model of one's own.

    `snapshot(model="gguf:large.gguf"), kd(teacher="teacher"), fit()` distils from another one.
    """

    paper = "unpublished"
    settles = True

    name: str = "teacher"  # the role that it takes
    model: str | None = None  # tiny, smollm2, a folder, gguf:FILE or org/name@COMMIT; None: a copy of the model

    def check(self) -> None:
        self.require(self.name.isidentifier(), "name is a word such as 'teacher'")
        self.require(self.name not in ("reference", "model"), f"the role {self.name!r} is taken")
        self.require(not (self.model or "").startswith("shape:"), "a shape has random weights: there is nothing in it")

    @property
    def makes(self) -> str:
        return self.name

    def files(self) -> tuple[Path, ...]:
        return () if self.model is None else self._find(self.model).files

    def _find(self, model: str) -> sources.Source:
        try:
            return sources.fixed_model(model)
        except Usage as error:
            raise Usage(f"{self}: {error}") from None

    def apply(self, run: Run) -> None:
        if self.model is None:
            run.snapshot(self.name)
        else:
            run.shelve(self.name, *open_beside(self._find(self.model), run.device, run.model.dtype))
