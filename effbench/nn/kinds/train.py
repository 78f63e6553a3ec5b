"""Train: hooks and slots go into the plan of the next fit, see `effbench.nn.train.fit` for where each acts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effbench.core.kinds import Train
    from effbench.core.run import Run


def apply(run: Run, method: Train) -> None:
    """Put the method into the plan, whose fit undoes it."""
    run.attach(method)
