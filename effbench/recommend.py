"""`effbench recommend`: what to run on a device, from measured quality and predicted bytes, cheapest first.

Quality is that of published records: of the model itself where there are any, else of another model, and the answer
says so. Bytes are predicted for the model that was asked for. Speed is told where it was measured on that very model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from effbench.cells.predict import parse_memory
from effbench.core.errors import Outcome, Usage, first_line
from effbench.core.recipe import parse
from effbench.core.usage import Count, matches_any, nearest
from effbench.records.imported import is_imported
from effbench.records.record import Record
from effbench.report.differences import estimate_difference
from effbench.report.groups import Row, Table, get_machine, group_records
from effbench.report.metrics import TASKS, get_family, select_perplexities

if TYPE_CHECKING:
    from effbench.core.method import Method
    from effbench.sources import Source

PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%?")
NEAR = 3  # rows beyond the quality budget that are worth naming


@dataclasses.dataclass
class RecommendOptions:
    """What `effbench recommend` can be told."""

    model: str | None = None  # as in `effbench run`; shape:NAME needs no weights
    memory: str | None = None  # of the device, such as 24GB (10^9 bytes) or 80GiB (2^30)
    quality_drop: str = "1%"  # most that perplexity may rise, in percent, and accuracy of tasks may fall, in points
    context: Count = 4096  # tokens of each sequence in the cache
    batch: Count = 1  # sequences in the cache
    device: str | None = None  # part of the name of the machine on which speed was measured, such as h100; or any
    measured_on: str | None = None  # model whose records tell quality; by default this one, else a real one, else tiny
    rows: str | None = None  # only these recipes: names or patterns, separated by commas
    results: str | None = None  # folder of records; by default the published ones


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a row loses against the baseline of its table, in percent of a perplexity and points of accuracy."""

    row: Row
    drop: float  # the larger of the two
    most: float | None  # the same at the far end of the 95 % interval; None without one
    metric: str  # the one that decides

    @property
    def sure(self) -> float:
        return math.inf if self.most is None else self.most


@dataclasses.dataclass(frozen=True)
class Speed:
    """What was timed of a recipe on the very model."""

    tokens_per_s: float  # of decoding, all sequences
    first_token_ms: float | None
    point: str  # batch and context
    machine: str


@dataclasses.dataclass(frozen=True)
class Advice:
    """One recipe with what it needs and loses."""

    recipe: str
    steps: str
    drop: float
    most: float | None
    sure: bool  # whether the far end of the interval is within the budget too
    weights: int = 0  # bytes, as held for computing
    cache: int = 0  # bytes
    fits: bool = False
    outcome: str = ""  # why bytes cannot be foretold
    speed: Speed | None = None  # where it was measured on this model

    @property
    def total(self) -> int:
        """Bytes of weights and cache."""
        return self.weights + self.cache


@dataclasses.dataclass(frozen=True)
class Answer:
    """All that can be said to the question."""

    model: str
    measured_on: str
    tables: tuple[str, ...]  # where their quality was measured
    memory: int
    budget: float  # percent
    advice: tuple[Advice, ...]  # within the quality budget, cheapest first
    beyond: tuple[Quality, ...]  # the nearest that are not
    timed: bool  # whether any speed was measured on the model and the device


def recommend(options: RecommendOptions, records: Sequence[Record]) -> Answer:
    """The answer from records. Raises `Usage`."""
    from effbench import sources

    if options.model is None or options.memory is None:
        raise Usage("name the model and the memory: model=shape:llama-3.1-8b memory=24GB")
    memory, budget = parse_memory(options.memory), parse_drop(options.quality_drop)
    source = sources.model(options.model)
    tables = group_records(record for record in records if not is_imported(record))
    chosen = _choose_tables(tables, options, source.name)
    found = sorted(_list_quality(chosen, options.rows), key=lambda one: (one.drop, one.sure))
    if not found:
        which = f" of rows={options.rows}" if options.rows else ""
        raise Usage(f"no row{which} of {chosen[0].cell.model} without training has quality beside its baseline")
    within = [one for one in found if one.drop <= budget]
    beyond = found[len(within) :][:NEAR]
    timed = [record for record in records if _is_timed(record, source.name, options.device)]
    rows: list[tuple[str, str, Quality | None]] = [("16 bits", "", None)]
    rows += [(one.row.recipe, one.row.steps, one) for one in within]
    advice = [_advise(source, options, memory, budget, row, timed) for row in rows]
    return Answer(
        source.name,
        chosen[0].cell.model,
        tuple(dict.fromkeys(map(_name_table, [*within, *beyond]))),
        memory,
        budget,
        tuple(sorted(advice, key=lambda one: (bool(one.outcome), not one.fits, one.total))),
        tuple(beyond),
        any(one.speed is not None for one in advice),
    )


def _name_table(quality: Quality) -> str:
    cell = quality.row.records[0].cell
    return f"{cell.suite} v{cell.suite_version} {cell.tier}"


def parse_drop(text: str) -> float:
    """Percent of a text such as 1%. Raises `Usage`."""
    match = PERCENT.fullmatch(text.strip())
    if match is None:
        raise Usage(f"quality_drop={text}: must be a share in percent, such as 1%")
    return float(match[1])


# ---- quality ------------------------------------------------------------------------------------


def _choose_tables(tables: Sequence[Table], options: RecommendOptions, model: str) -> list[Table]:
    """Tables of the model whose records tell quality. Raises `Usage` where there is none."""
    telling = [table for table in tables if table.baseline is not None and _list_metrics(table.baseline)]
    known = dict.fromkeys(table.cell.model for table in telling)
    if options.measured_on is not None and options.measured_on not in known:
        hint = nearest(options.measured_on, known)
        raise Usage(f"measured_on={options.measured_on}: no quality of it in the records{hint}")
    real = [table.cell.model for table in telling if table.cell.tier == "real"]
    order = [options.measured_on] if options.measured_on else [model, *real, *known]
    name = next((one for one in order if one in known), None)
    if name is None:
        raise Usage("no record tells quality: run a suite first, such as `effbench run suite=quant`")
    return [table for table in telling if table.cell.model == name]


def _list_metrics(row: Row) -> list[str]:
    """The metrics that are held against the budget: perplexity of held-out text, and the mean over tasks."""
    metrics = row.records[0].metrics
    return [*select_perplexities(metrics)[:1], *([TASKS] if TASKS in metrics else [])]


def _list_quality(tables: Sequence[Table], rows: str | None) -> Iterator[Quality]:
    """Each recipe once, as the first table has it: those of full tiers come first."""
    patterns = [name.strip() for name in rows.split(",")] if rows else []
    seen: set[str] = set()
    for table in tables:
        for row in table.rows:
            chosen = not patterns or row.recipe in patterns or matches_any(row.recipe, patterns)
            if row.is_baseline or row.steps in seen or row.worst.outcome != "ok" or row.simulated or not chosen:
                continue
            if row.records[0].cell.settings.get("skip") or not _applies_alone(row.steps):
                continue
            quality = _compare(table, row)
            if quality is not None:
                seen.add(row.steps)
                yield quality


def _applies_alone(steps: str) -> bool:
    """Whether a recipe needs no training, and is one of this version's."""
    try:
        return not any(step.consumes for step in parse(steps).steps)
    except (Usage, ImportError):
        return False


def _compare(table: Table, row: Row) -> Quality | None:
    """The loss of a row in the metric in which it is largest; None where none can be paired."""
    assert table.baseline is not None
    found: list[Quality] = []
    for metric in _list_metrics(table.baseline):
        test = estimate_difference(table.baseline.records, row.records, metric)
        if test is None:
            continue
        if get_family(metric) == "perplexity":
            drop, most = 100 * math.expm1(test.value), None if test.high is None else 100 * math.expm1(test.high)
        else:
            drop, most = -100 * test.value, None if test.low is None else -100 * test.low
        found.append(Quality(row, drop, most, metric))
    return max(found, key=lambda one: one.drop, default=None)


# ---- bytes and speed ----------------------------------------------------------------------------


def _advise(
    source: Source,
    options: RecommendOptions,
    memory: int,
    budget: float,
    row: tuple[str, str, Quality | None],
    timed: Sequence[Record],
) -> Advice:
    recipe, steps, quality = row
    made = Advice(recipe, steps, 0.0, 0.0, True)
    if quality is not None:
        made = Advice(recipe, steps, quality.drop, quality.most, quality.sure <= budget)
    made = dataclasses.replace(made, speed=_find_speed(steps, options.batch, options.context, timed))
    try:
        weights, cache = foretell(source, parse(steps).steps if steps else (), options.batch, options.context)
    except Outcome as error:
        return dataclasses.replace(made, outcome=f"{error.name}: {first_line(error)}")
    except Exception as error:  # of a step that needs values, and says so in a way of its own
        return dataclasses.replace(made, outcome=f"cannot be foreseen: {type(error).__name__}: {first_line(error)}")
    return dataclasses.replace(made, weights=weights, cache=cache, fits=weights + cache <= memory)


def foretell(source: Source, steps: Sequence[Method], batch: int, context: int) -> tuple[int, int]:
    """Bytes of the weights as computed with, and of keys and values at a batch and a context."""
    from effbench.nn.rehearse import Batch, Rehearsals, make_case

    held = Rehearsals(make_case(source, steps, None, Batch(batch, context), ())).take(None)
    return held.resident, held.cache


def _is_timed(record: Record, model: str, device: str | None) -> bool:
    """Whether a record has speeds of this model, of real kernels, on a device of that name."""
    here = device is None or device.casefold() in get_machine(record).casefold()
    return record.cell.model == model and record.outcome == "ok" and not record.simulated and here


def _find_speed(steps: str, batch: int, context: int, timed: Sequence[Record]) -> Speed | None:
    """Tokens a second and time to the first token at the measured point nearest to a batch and a context."""
    points = []
    for record in timed:
        if record.cell.steps != steps:
            continue
        for name, metric in record.metrics.items():
            if match := re.fullmatch(r"decode_tok_per_s_b(\d+)_c(\d+)", name):
                at = int(match[1]), int(match[2])
                points.append((abs(at[0] - batch), abs(at[1] - context), at, metric.value, record))
    if not points:
        return None
    *_, (given, length), rate, record = min(points, key=lambda point: point[:2])
    prefill = record.metrics.get(f"prefill_tok_per_s_b{given}_c{length}")
    first = 1000 * given * length / prefill.value if prefill is not None and prefill.value > 0 else None
    return Speed(rate, first, f"b{given} c{length}", get_machine(record))
