"""Columns of tables, declared once: their headers, what they show of a row, what they mean, which are for which detail.

Columns stand in the order of their importance: where room is short, those at the end go first. A summary has at most
eight, the names of the recipes among them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from effbench.records.definitions import FIELDS, PEAKS, Definition
from effbench.report.differences import LEVEL, Test
from effbench.report.groups import Row, get_machine
from effbench.report.metrics import (
    TASKS,
    find_definition,
    get_family,
    get_limits,
    get_scale,
    get_title,
    get_unit,
    natural_key,
    select,
    select_headlines,
    select_perplexities,
    select_tasks,
)
from effbench.report.text import DASH, bytes_text, rounded, with_interval
from effbench.stats.components import Components

Tests = Mapping[tuple[str, str], Test]  # (recipe, metric): difference from the baseline
Show = Callable[[Row, Tests], str]

DETAILS = {
    "summary": "Size and quality",
    "quality": "Quality in detail",
    "front": "Fronts: quality against what it costs",
    "inference": "Inference: what was left of prompts and caches, and what of drafts was taken",
    "speed": "Speed, as a ratio to the baseline of the same run",
    "memory": "Memory; peaks are above what was resident before",
    "compute": "Operations and energy",
    "training": "Training: what was learned, and what the last fit cost",
    "selection": "Data: what selections kept of the pool, how rightly, and what they cost beside a forward pass",
    "tuning": "Tuning: the row's own setting, the best of those tried, and what they cost together",
    "replication": "Replication: which differences from the baseline can be seen, and what narrows their intervals",
    "methods": "Methods and the cost of applying them",
    "published": "Beside the published results",
    "chosen": "Chosen columns",
}
MOST = 8  # columns of a summary
UNMET = "∅"  # behind a number of a task that met nothing of what the recipe changes
UNITS = {  # sentences for units that are not said by their own name
    "": "Without a unit.",
    "fraction": "In percent.",
    "%": "In percent.",
    "ratio": "As a ratio.",
    "s": "In seconds.",
    "ms": "In milliseconds.",
    "µs": "In microseconds.",
    "FLOP": "In floating-point operations.",
    "FLOP/s": "In floating-point operations per second.",
    "J": "In joules.",
    "W": "In watts.",
}
ANSWERS = ("completion_nll", "completion_exact", "completion_gain_nats")  # what tables of a learned task are about
# Beside tasks: the gap to the model that taught, and what is right without a look at the prompt.
OF_ANSWERS = r"answer_acceptance|(answer_)?block_tokens_k\d+|completion_constant_exact"
LEFT = r"(.*_)?(cache|prompt)_kept|(sampled_)?(accepted_.*|tokens_per_pass)"  # of caches, prompts and drafts
STEP = "fit_step_ms"
PHASES = ("decode", "prefill")
CACHE = "cache_bytes_per_token"
KEPT = "prompt_kept"
# What tables of inference are about, beside quality and speed, in the order of their importance.
SERVED = (
    *(CACHE, "tasks_over_random", KEPT, "drafted_speedup", "prompt_saved_ms", "compressor_ms_per_prompt"),
    "accepted_per_pass",
)
# What tables of training are about where no other speed is measured, in the order of their importance.
TRAINED = (
    *("fit_loss_last", STEP, "fit_activation_bytes", "fit_step_peak_bytes"),
    *("fit_parameter_bytes", "fit_gradient_bytes", "fit_optimizer_bytes"),
)
COSTS = (
    *("fit_trained_parameters", "fit_trained_share", "fit_tok_per_s", "fit_tokens", "fit_seconds"),
    *("fit_loss_first", *(f"fit_loss_quarter_{quarter}" for quarter in (1, 2, 3, 4)), "fit_loss_last", "fit_skipped"),
    *("fit_flops_per_token", "fit_flops_rule", "fit_energy_j", "merge_lost"),
    *(f"plan_{part}_off" for part in ("training", "weights", "gradients", "optimizer", "activations")),
)
# What tables of selections are about; quantiles of lengths other than the median are among the others.
SELECTED = (
    *("select_kept", "select_in_kept", "select_noise_kept", "select_duplicate_kept", "select_off_kept"),
    *("select_noise_last", "select_rightly", "select_pairs_kept", "select_turned_away"),
    *("select_sources_covered", "select_skills_covered", "select_kept_length_q50", "select_pool_length_q50"),
    *("select_kept_topics_nats", "select_pool_topics_nats", "select_kept_label_balance", "select_pool_label_balance"),
    *("select_s_per_1000", "select_forward_s_per_1000", "select_seconds"),
)
ABSOLUTE = {"tok_per_s": "tok/s", "ms_per_token": "ms"}  # what stands in brackets beside a ratio of speeds


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table."""

    header: str
    show: Show
    metrics: tuple[str, ...] = ()  # what it shows, and what stands in brackets beside that
    meaning: str = ""  # of a column that shows no metric

    @property
    def keys(self) -> frozenset[str]:
        """The names by which it can be chosen: its header, with and without the unit, and its metrics."""
        return self.header_keys | {name.casefold() for name in self.metrics}

    @property
    def header_keys(self) -> frozenset[str]:
        """Its header, with and without the unit."""
        return frozenset(name.casefold() for name in (self.header, self.header.partition(",")[0]))

    def explain(self) -> str:
        """What it means, in sentences; empty where that is not known to this version."""
        if self.meaning:
            return self.meaning
        definitions = [one for one in map(find_definition, self.metrics) if one is not None]
        if not definitions:
            return ""
        first, *others = definitions
        unit = UNITS.get(first.unit, f"In {first.unit}.")
        match = first.regex.fullmatch(self.metrics[0])
        peak = match.groupdict().get("peak") if match else None
        counted = f" Counted is {PEAKS[peak]}." if peak else ""
        better = "" if first.better == "neither" else f" The {first.better}, the better."
        beside = "; ".join(one.meaning[:1].lower() + one.meaning[1:].rstrip(".") for one in others)
        return f"{first.meaning}{counted} {unit}{better}" + (f" In brackets: {beside}." if beside else "")


def make_columns(measured: Sequence[str], placed: bool = True) -> dict[str, list[Column]]:
    """The columns of each detail of a table in which these metrics were measured.

    `placed` says whether it is known on what machine: without one, times and rates mean nothing.
    """
    ppls = select_perplexities(measured)
    ratios = [name for name in select(measured, "speed", "ratio") if name.startswith(PHASES)]
    speeds = sorted(ratios, key=lambda name: name.startswith("prefill"))
    operations = [*select(measured, "compute"), *select(measured, "energy", "J")]
    peaks = [name for name in measured if re.fullmatch("(score|generate)_peak_.*_bytes", name)]
    bits = Column("bits", _show_value("bits_per_weight", "{:.2f}".format), ("bits_per_weight",))
    zeros = Column("zeros, %", _show_sparsity, ("sparsity", "sparsity_asked"))
    learned = [name for name in (*ANSWERS, STEP) if name in measured]
    asked = "sparsity_asked" in measured
    answers = learned if {*ANSWERS} & {*learned} else []
    gap = [name for name in measured if name == "acceptance"]  # to the model that taught
    summary = [
        *map(measure, (*answers, *ppls[:1], "kl_nats_per_token", *gap, *([] if answers else [TASKS]))),
        Column("stored", _show_stored, ("stored_bytes", "compression")),
    ]
    served = [name for name in SERVED if name in measured]
    if served:
        quality = (*ppls[:1], "kl_nats_per_token", *gap, "answer_kl_nats_per_token")
        summary = [*map(measure, (*quality, *(name for name in measured if name.startswith(TASKS))))]
        shared = {CACHE: _measure_cache, KEPT: _measure_kept}
        summary += [shared[name]() if name in shared else measure(name) for name in served]
    for phase in PHASES:
        of_phase = [name for name in speeds if name.startswith(phase)]
        summary += [_time(phase, name, measured, placed) for name in of_phase[:1]]
    beside = MOST - 1  # the recipe
    if served:
        summary = [column for column in summary if {*column.metrics} & {*measured}][:beside]
    elif answers:
        summary = [*([zeros] if asked else []), *summary, bits][:beside]
    elif asked:
        summary[:0] = [zeros, bits] if len(summary) + 2 <= beside else [zeros]
    else:
        summary.insert(0, bits)
        if STEP in measured and not speeds:  # how the model was trained is what the table is about
            summary = [column for column in summary if {*column.metrics} & {*measured}]
            trained = [name for name in TRAINED if name in measured]
            summary += [_size(name) if name.endswith("_bytes") else measure(name) for name in trained]
            summary = summary[:beside]
    return {
        "summary": summary,
        "quality": [
            *map(measure, (*ppls[1:], "top1_agreement", *select_tasks(measured))),
            *map(measure, [name for name in measured if re.fullmatch(OF_ANSWERS, name)]),
        ],
        "inference": [
            *map(measure, [name for name in measured if re.fullmatch(LEFT, name)]),
            *map(measure, [name for name in measured if re.fullmatch(r".*cache_bytes_per_token|.*drafted_.*", name)]),
            *map(
                measure,
                [name for name in measured if re.fullmatch(r".+_over_random(_evict.*)?|prompt_over_asked", name)],
            ),
            *map(measure, [name for name in measured if name in ("prompt_saved_ms", "compressor_ms_per_prompt")]),
        ],
        "speed": [_time(get_title(name), name, measured, placed) for name in speeds],
        "memory": [
            bits,
            _size("weight_bytes", "weights"),
            _size("metadata_bytes", "metadata"),
            _size("resident_bytes", "resident"),
            *map(_size, peaks),
        ],
        "compute": [*map(measure, sorted(operations, key=natural_key))],
        "training": [
            *map(measure, [*learned, *(name for name in COSTS if name in measured)]),
            *map(measure, (name for name in measured if re.fullmatch("fit_comm_.*_calls", name))),
            *(_size(name) for name in measured if re.fullmatch("fit_.*_bytes", name)),
        ],
        "selection": [*map(measure, (name for name in SELECTED if name in measured))],
        "tuning": [*map(measure, (name for name in measured if name.startswith("tuned_")))],
        "replication": [column for name in select_headlines(measured) for column in _replicate(name)],
        "methods": [*METHODS, *(_size(name) for name in measured if re.fullmatch("apply_peak_.*_bytes", name)), STEPS],
    }


def make_others(measured: Sequence[str], columns: Iterable[Column]) -> list[Column]:
    """A column for each metric that none of these columns shows."""
    shown = {metric for column in columns for metric in column.metrics}
    names = sorted((name for name in measured if name not in shown), key=natural_key)
    return [_size(name) if get_unit(name) == "bytes" else measure(name) for name in names]


# ---- kinds of columns ---------------------------------------------------------------------------


def measure(metric: str) -> Column:
    """A value with its interval, and an arrow where the row differs from the baseline beyond chance."""
    scale, limits = get_scale(metric), get_limits(metric)
    # Rows differ by less than their own intervals: they are paired.
    digits = 4 if get_family(metric) == "perplexity" else 3

    def show(row: Row, tests: Tests) -> str:
        test = tests.get((row.recipe, metric))
        arrow = "" if test is None or test.p > LEVEL else " ↑" if test.value > 0 else " ↓"
        mark = f" {UNMET}" if row.found(metric, "not_exercised") else ""
        return with_interval(row.estimate(metric), scale, digits, limits) + arrow + mark

    return Column(get_title(metric), show, (metric,))


def _time(label: str, metric: str, measured: Sequence[str], placed: bool) -> Column:
    """A ratio of speeds, and the rate and time behind it. A row that only simulates has none, and one whose kernels
    fell back has none above 1: what was timed is not what the row claims.
    """
    limits = get_limits(metric)
    names = {metric.replace("speedup", part): unit for part, unit in ABSOLUTE.items()}
    beside = {name: unit for name, unit in names.items() if placed and name in measured}

    def show(row: Row, tests: Tests) -> str:
        estimate = row.estimate(metric)
        if row.verdict == "fallback" and estimate is not None and estimate.value > 1:
            return DASH
        ratio = with_interval(estimate, limits=limits)
        if row.simulated or ratio == DASH or not all(map(get_machine, row.records)):
            return DASH if row.simulated else ratio
        values = [estimate.value for name in beside if (estimate := row.estimate(name))]
        return f"{ratio} ({', '.join(map(rounded, values))})" if values else ratio

    units = f" ({', '.join(beside.values())})" if beside else ""
    return Column(f"{label}, ×{units}", show, (metric, *beside))


def _size(metric: str, header: str | None = None) -> Column:
    return Column(header or get_title(metric), _show_value(metric, bytes_text), (metric,))


def _show_value(metric: str, text: Callable[[float], str]) -> Show:
    """A value alone."""

    def show(row: Row, tests: Tests) -> str:
        estimate = row.estimate(metric)
        return DASH if estimate is None else text(estimate.value)

    return show


def _show_stored(row: Row, tests: Tests) -> str:
    size, ratio = row.estimate("stored_bytes"), row.estimate("compression")
    return DASH if size is None else bytes_text(size.value) + (f" ({ratio.value:.2f}×)" if ratio else "")


def _measure_cache() -> Column:
    """Bytes that the cache holds per token offered, and in brackets the share of the tokens that it holds."""

    def show(row: Row, tests: Tests) -> str:
        each, kept = row.estimate(CACHE), row.estimate("cache_kept")
        return DASH if each is None else rounded(each.value) + (f" ({100 * kept.value:.0f})" if kept else "")

    return Column("cache, B/token (kept, %)", show, (CACHE, "cache_kept"))


def _measure_kept() -> Column:
    """The share of the tokens of prompts that is left, and in brackets that which was asked for."""

    def show(row: Row, tests: Tests) -> str:
        kept, asked = row.estimate(KEPT), row.estimate("prompt_asked")
        return DASH if kept is None else f"{100 * kept.value:.1f}" + (f" ({100 * asked.value:g})" if asked else "")

    return Column("prompt kept, % (asked)", show, (KEPT, "prompt_asked"))


def _show_sparsity(row: Row, tests: Tests) -> str:
    """The share of zeros of the linears, and in brackets that which was asked for."""
    found, asked = row.estimate("sparsity"), row.estimate("sparsity_asked")
    return DASH if found is None else f"{100 * found.value:.1f}" + (f" ({100 * asked.value:g})" if asked else "")


def _replicate(metric: str) -> Iterator[Column]:
    """What the differences of a metric from the baseline are uncertain by, and of what."""
    title = get_title(metric)
    logarithm = get_family(metric) == "perplexity"

    def show_detectable(spread: Components) -> str:
        least = spread.detectable
        return rounded(100 * math.expm1(least) if logarithm else get_scale(metric) * least, 2) if least else DASH

    def show_seeds(spread: Components) -> str:
        return f"{100 * spread.from_seeds:.0f}" if spread.runs > 1 and spread.detectable else DASH

    def show_narrowed(spread: Components) -> str:
        if spread.runs < 2 or not spread.detectable:
            return DASH
        return f"{100 * spread.narrow(seeds=2):.0f}, {100 * spread.narrow(items=2):.0f}"

    def make(header: str, show: Callable[[Components], str], meaning: str) -> Column:
        def show_row(row: Row, tests: Tests) -> str:
            test = tests.get((row.recipe, metric))
            return DASH if test is None or test.spread is None else show(test.spread)

        return Column(f"{title.partition(',')[0]}: {header}", show_row, meaning=meaning)

    unit = "in % of a perplexity" if logarithm else "in the unit of the metric"
    yield make(
        "seen from",
        show_detectable,
        f"The smallest difference from the baseline that a test at 5 % would see in four of five repeats, {unit}; "
        "of one seed, were all seeds alike.",
    )
    yield make(
        "of seeds, %",
        show_seeds,
        "The share of the variance of the difference from the baseline that more seeds would take away: other "
        "calibration texts, other orders, other draws. The rest is that of the items.",
    )
    yield make(
        "twice the seeds or items, −%",
        show_narrowed,
        "By how much an interval over seeds and items would become shorter with twice the seeds, and with twice the "
        "items.",
    )


def _tell(header: str, fact: str, meaning: str) -> Column:
    """What the methods of a recipe declare."""
    return Column(header, lambda row, tests: row.fact(fact), meaning=meaning)


METHODS = (
    _tell("type", "type", "What kind of method it is, such as PTQ: quantization of a trained model."),
    _tell("calibration data", "calibration_data", "What text the methods of the recipe take statistics from."),
    _tell("weight update", "weight_update", "By what the weights that stay are changed."),
    _tell("multi-task", "multi_task", "Whether what was trained for several tasks can be swapped on one model."),
    _tell("composition", "composition", "Whether what was trained twice can count together on one model."),
    _tell("merge", "merge", "Whether what was trained can be absorbed by the weights and costs nothing to run."),
    Column(
        "learning rate",
        lambda row, tests: ", ".join(f"{rate:g}" for rate in row.learning_rates) or DASH,
        meaning="The peak of the learning rate; where a fit tried several, the one with the least validation loss.",
    ),
    Column(
        "kernels",
        lambda row, tests: row.verdict or DASH,
        meaning="Whether the kernels that ran are those that the row claims, by dispatch and a trace: proven, fallback "
        "to a reference or to torch, or simulated.",
    ),
    Column("seeds", lambda row, tests: str(len(row.records)), meaning="How many seeds the row is a mean over."),
    Column("apply, s", _show_value("apply_seconds", rounded), ("apply_seconds",)),
    Column("calibration tokens", _show_value("calibration_tokens", "{:,.0f}".format), ("calibration_tokens",)),
)
STEPS = Column(
    "steps",
    lambda row, tests: row.steps if row.steps and row.recipe != row.steps else DASH,
    meaning="The recipe of the row, where the row has a name of its own.",
)


# ---- all that there can be ----------------------------------------------------------------------


def list_columns() -> dict[str, list[Column]]:
    """Every column that a table can have, by detail, and as `chosen` those that must be asked for by their names; names
    of tasks and sizes of batches are examples.
    """
    from effbench.records.definitions import DEFINITIONS

    names = sorted({name for one in DEFINITIONS for name in _give_examples(one)}, key=natural_key)
    shapes = [
        make_columns([name for name in names if name not in {*sparsity, *answers, *served}])
        for sparsity in (("sparsity_asked",), ())
        for answers in (ANSWERS, ())
        for served in (SERVED, ())
    ]
    listed = {
        detail: list({column.header: column for shape in shapes for column in shape[detail]}.values())
        for detail in shapes[0]
    }
    return listed | {"chosen": make_others(names, itertools.chain(*listed.values()))}


def _give_examples(definition: Definition) -> Iterator[str]:
    """Names of metrics as the pattern has them: every choice of a field, else its own name or a number."""
    names = [definition.pattern]
    for field, values in FIELDS.items():
        given = values.split("|") if re.fullmatch(r"[a-z_|]+", values) else [field if re.match(values, field) else "1"]
        names = [name.replace(f"{{{field}}}", value) for name in names for value in given]
    yield from dict.fromkeys(names)
