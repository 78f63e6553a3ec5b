"""The row that is better than all others beside it, as far as that is sure."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.report.differences import LEVEL, TESTED, estimate_difference
from effbench.report.groups import Row
from effbench.report.metrics import find_definition, get_family
from effbench.stats.paired import holm


def find_best(rows: Sequence[Row], metric: str) -> Row | None:
    """The row with the best value of a metric, where it is better than each of the others, paired by item, at 5 % after
    Holm over these. The baseline is not among them: what is compressed is compared with its like.

    None where no row is, or where the metric has no items or no direction.
    """
    definition = find_definition(metric)
    if definition is None or definition.better == "neither" or get_family(metric) not in TESTED:
        return None
    found = [(estimate.value, row) for row in rows if not row.is_baseline and (estimate := row.estimate(metric))]
    if len(found) < 2:
        return None
    sign = 1 if definition.better == "higher" else -1
    found.sort(key=lambda pair: -sign * pair[0])
    best = found[0][1]
    tests = [estimate_difference(row.records, best.records, metric) for _, row in found[1:]]
    if any(test is None or sign * test.value <= 0 for test in tests):
        return None
    sure = max(holm([test.p for test in tests if test is not None])) <= LEVEL
    return best if sure else None
