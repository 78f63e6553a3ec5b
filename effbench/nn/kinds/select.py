"""Select: the train set becomes the best of what it was; the pool stays whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effbench.core.errors import Unsupported

if TYPE_CHECKING:
    from effbench.core.kinds import Select
    from effbench.core.run import Run


def apply(run: Run, method: Select) -> None:
    """Rank the train set and cut it. Raises `Unsupported` where nothing is left."""
    examples = run.data.train
    order = list(method.order(examples, run))
    if not order:
        raise Unsupported(f"{method}: nothing was selected")
    run.data.train = [examples[i] for i in order]
    run.log.selected[method.label] = len(order)
