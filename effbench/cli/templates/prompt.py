"""Example: drops the end of every context."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.kinds import Prompt
from effbench.core.run import Run
from effbench.core.views import Segments


@dataclass(frozen=True)
class Example(Prompt):
    """What a reader of the paper should know first."""

    paper = "unpublished"  # or "arXiv:NNNN.NNNNN", and then published = "example()" or caveats = ("what differs",)
    identity = {"fraction": 1.0}  # settings at which prompts stay what they are

    fraction: float = 0.5  # of the words of the context that are kept

    def check(self) -> None:
        self.require(0 < self.fraction <= 1, "fraction must be in (0, 1]")

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        """The prompt's parts with fewer words; instruction and question stay."""
        words = [text.split() for text in segments.contexts]
        return segments.with_contexts([" ".join(part[: round(self.fraction * len(part))]) for part in words])
