"""Select: the train set becomes the best of what it was, or its order; what is ranked behind waits in reserve."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from effbench.core.errors import Unsupported
from effbench.nn.train.composition import report_selection
from effbench.nn.train.unlabelled import withhold

if TYPE_CHECKING:
    from effbench.core.kinds import Select
    from effbench.core.run import Run
    from effbench.core.views import Example

    Show = Callable[[list[Example]], list[Example]]


def apply(run: Run, method: Select) -> None:
    """Rank what earlier selections left and cut it. Raises `Unsupported` where nothing is left, `Refused` for a
    selection that looks at held-out text, or at answers where it chooses by prompts alone."""
    data, number = run.data, method.count(run)
    found, reserve = data.train, data.reserve
    show: Show = withhold if method.blind else list
    begun, before = time.perf_counter(), run.recovered
    with data.asking(number) if method.blind else data.closed():
        chosen, rest, turned = _choose(run, method, number, found, reserve, show)
        if not chosen:
            raise Unsupported(f"{method}: nothing was selected")
        weights = method.weigh(show(chosen), run)
    seconds = time.perf_counter() - begun + run.recovered - before
    if weights is not None:
        chosen = [dataclasses.replace(e, weight=float(w)) for e, w in zip(chosen, weights, strict=True)]
    data.train, data.reserve = chosen, rest
    run.log.selected[method.label] = len(chosen)
    run.log.chosen[method.label] = [[example.id, example.weight] for example in chosen]
    run.log.selections.append(report_selection(run, method, chosen, rest, turned) | {"seconds": seconds})


def _choose(
    run: Run, method: Select, number: int, found: list[Example], reserve: list[Example], show: Show
) -> tuple[list[Example], list[Example], list[Example] | None]:
    """So many examples, what is ranked behind them, and what was turned away; None where none is judged by itself.

    The method sees what `show` makes of them.
    """
    if not method.admits:
        more = max(0, number - len(found))  # it is told to keep more than there is: the next of the earlier ranking
        found, reserve = [*found, *reserve[:more]], reserve[more:]
        ranked = [found[place] for place in method.order(show(found), run)]
        return ranked[:number], [*ranked[number:], *reserve], None
    examples = [*found, *reserve]  # what is turned away is filled up from the reserve
    places = list(itertools.islice(method.admit(show(examples), run), number))
    judged = places[-1] + 1 if len(places) == number else len(examples)
    turned = [examples[place] for place in sorted({*range(judged)} - {*places})]
    return [examples[place] for place in places], examples[judged:], turned
