"""What selectors that aim at something share: the examples that the model is to become good at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effbench.core.kinds import Select
from effbench.core.run import Run
from effbench.core.views import Example


@dataclass(frozen=True)
class Aimed(Select):
    """A selector that scores examples by what they do for those of a part of the data."""

    aim: Literal["target", "validation"] = "target"  # the part of the data that the model is to become good at

    @property
    def needs_part(self) -> str:
        return self.aim

    def find_target(self, run: Run) -> list[Example]:
        """The examples of the part aimed at. Raises `Usage` where the data has none."""
        examples: list[Example] = getattr(run.data, self.aim)
        self.require_part(bool(examples), run.data.name)
        return examples
