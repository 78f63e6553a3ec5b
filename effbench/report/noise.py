"""How far off the numbers of a table's rows may be, drawn for all rows together.

Items are drawn once for all rows, as all rows were asked the same ones, and so for all metrics of the same items. Seeds
are drawn for rows that have several. Rounds of timing are those of a row's own process. Of a number that says no more
than its interval that is taken. What was measured once has no noise that can be known, and is drawn without any.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Sequence

import numpy as np

from effbench.records.record import Record
from effbench.report.differences import Side
from effbench.report.groups import Row
from effbench.report.metrics import TASKS, get_family, get_task, get_unit
from effbench.stats import resample
from effbench.stats.paired import Floats
from effbench.stats.pareto import DRAWS

TIMED = re.compile(r"(?P<phase>prefill|decode)_(?P<what>speedup|tok_per_s|ms_per_token)_(?P<point>b\d+_c\d+)")
STEPS = "fit_step_ms"  # a metric that is the median of its samples
SCORED = ("perplexity", "accuracy", "distance", "quality")  # kinds whose samples are items, and not steps or rounds
APPLIED = "apply_seconds"
MEASURED = ("s", "ms", "J", "ratio", "tokens/s")  # units of what would come out otherwise if it were measured again
OTHER_ITEMS = "scored on other items or by another protocol"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A metric of some rows: perplexities and timings as logarithms."""

    values: Floats  # [rows]; not a number where a row has none to compare
    draws: Floats  # [draws, rows]
    absent: dict[int, str]  # by row: why it has none
    once: bool  # whether some row was measured once, so that its noise is not known


class Noise:
    """The draws of some rows of a table; each metric's are made once."""

    def __init__(self, rows: Sequence[Row], draws: int = DRAWS) -> None:
        self.rows, self.draws = rows, draws
        self._sides = [Side(row.records) for row in rows]
        self._known: dict[str, Drawn] = {}

    def draw(self, metric: str) -> Drawn:
        """The values of a metric and draws of them."""
        if metric not in self._known:
            self._known[metric] = self._draw(metric)
        return self._known[metric]

    def _draw(self, metric: str) -> Drawn:
        estimates = [None if _is_vain(row, metric) else row.estimate(metric) for row in self.rows]
        values = np.array([math.nan if one is None else one.value for one in estimates])
        absent = {at: _explain(row, metric) for at, row in enumerate(self.rows) if not math.isfinite(values[at])}
        logarithmic = get_family(metric) in ("perplexity", "speed") or metric == STEPS
        values[[*absent]] = math.nan
        logarithmic = logarithmic and bool((values[~np.isnan(values)] > 0).all())
        scaled = np.log if logarithmic else np.asarray
        values = scaled(values)
        deviations, shared, others = self._draw_items(metric, [at for at in range(len(values)) if at not in absent])
        absent |= dict.fromkeys(others, OTHER_ITEMS)
        values[others] = math.nan
        once = False
        for at, (row, estimate) in enumerate(zip(self.rows, estimates, strict=True)):
            if at in absent or estimate is None:
                continue
            rounds = _read_rounds(row.records[0], metric)
            if len(row.records) > 1:
                seeds = scaled(np.array([record.metrics[metric].value for record in row.records]))
                rng = _seed(f"seeds of {row.recipe} {row.steps}", len(seeds))
                deviations[:, at] += resample.reweigh_seeds(seeds, rng, self.draws)
            elif at in shared:
                continue
            elif rounds is not None and resample.has_spread(rounds):
                rng = _seed(f"{_name_timing(metric)} of {row.recipe} {row.steps}", len(rounds))
                deviations[:, at] = resample.resample_rounds(rounds, rng, self.draws)
            elif estimate.low is not None and estimate.high is not None and estimate.low < estimate.high:
                bounds = np.array([estimate.low, estimate.high])
                if logarithmic and estimate.low <= 0:
                    bounds[0] = estimate.value**2 / estimate.high
                low, high = scaled(bounds)
                rng = _seed(f"{metric} of {row.recipe} {row.steps}", 1)
                deviations[:, at] = resample.draw_within(low, values[at], high, rng, self.draws)
            else:
                once = once or (get_unit(metric) in MEASURED and get_family(metric) != "size")
        return Drawn(values, values + deviations, absent, once)

    def _draw_items(self, metric: str, rows: Sequence[int]) -> tuple[Floats, set[int], list[int]]:
        """Deviations, [draws, rows], by the items of a metric; which rows have them, and which have others than these.

        For the mean over tasks, items are drawn within each.
        """
        deviations = np.zeros((self.draws, len(self.rows)))
        asked = {at: parts for at in rows if (parts := self._list_parts(metric, at))}
        if not asked:
            return deviations, set(), []
        common = next(iter(asked.values()))
        alike = [at for at, parts in asked.items() if parts == common]
        for part, items, _ in common:
            values = np.stack([one for at in alike if (one := self._sides[at].average(part)) is not None])
            if (sizes := self._sides[alike[0]].list_sizes(part)) is not None:  # a ratio of sums, by the delta method
                values = values - values.mean(axis=1, keepdims=True) * (sizes - 1)
            if resample.has_spread(values):
                rng = _seed(get_task(part) or "windows", items)
                deviations[:, alike] += resample.resample_items(values, rng, self.draws) / len(common)
        return deviations, set(alike), [at for at in asked if at not in alike]

    def _list_parts(self, metric: str, at: int) -> list[tuple[str, int, str | None]]:
        """What the metric is the mean of: names, how many items each has, and protocols; empty without items."""
        if get_family(metric) not in SCORED:
            return []
        side = self._sides[at]
        names = side.tasks if metric.startswith(TASKS) else [metric]
        found = [(name, side.average(name)) for name in names]
        protocols = side.records[0].protocols
        parts = [(name, len(items), protocols.get(name)) for name, items in found if items is not None]
        return parts if len(parts) == len(names) else []


def _name_timing(metric: str) -> str:
    """What was timed: a ratio, a rate and a time may be of the same rounds."""
    return TIMED.sub(r"\g<phase> \g<point>", metric)


def _read_rounds(record: Record, metric: str) -> Floats | None:
    """Logarithms of what each round of timing gave, up to a constant; None for what is not timed in rounds."""
    samples, match = record.samples, TIMED.fullmatch(metric)
    if metric == STEPS and STEPS in samples:
        return np.log(np.asarray(samples[STEPS], dtype=np.float64))
    if match is None or (name := f"{match['phase']}_seconds_{match['point']}") not in samples:
        return None
    own = np.log(np.asarray(samples[name], dtype=np.float64))
    if match["what"] == "speedup":
        beside = samples.get(f"{match['phase']}_reference_seconds_{match['point']}")
        return None if beside is None else np.log(np.asarray(beside, dtype=np.float64)) - own
    return own if match["what"] == "ms_per_token" else -own


def _is_vain(row: Row, metric: str) -> bool:
    """Whether it is the cost of applying nothing, beside which no other would ever be worth it."""
    return metric == APPLIED and row.is_baseline


def _explain(row: Row, metric: str) -> str:
    """Why a row has no number."""
    if _is_vain(row, metric):
        return "nothing is applied"
    if row.estimate(metric) is not None:
        return "infinite or not a number"
    return row.worst.outcome if row.worst.outcome != "ok" else "simulated" if row.simulated else "not measured"


def _seed(name: str, size: int) -> np.random.Generator:
    """The same numbers for the same thing that is drawn, whatever the row or the metric."""
    return np.random.default_rng([zlib.crc32(name.encode()), size])
