"""Prompt: every prompt passes through the methods of the chain, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effbench.core.kinds import Prompt
    from effbench.core.run import Run


def apply(run: Run, method: Prompt) -> None:
    """Have `run.rewrite` call the method."""
    run.infer.chain("prompt").append(method)
