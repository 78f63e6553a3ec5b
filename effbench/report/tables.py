"""Tables from records, and nothing but records: the same records always give the same bytes.

What may be compared stands in one table: equal suite version, tier, model, data, settings and machine.
Everything else gets a table of its own. A row that is not `ok` on every seed says so, and shows a number only
where every seed has it: never a mean over the rest.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effbench.core.errors import Usage
from effbench.core.usage import nearest
from effbench.records.record import OUTCOMES, Record
from effbench.records.store import Store, latest
from effbench.report import kernels as timings
from effbench.report.text import DASH, bytes_text, markdown, markdown_table, numeric_column, rounded
from effbench.stats.paired import Estimate, Floats, holm, mcnemar, mean_interval, over_seeds

FORMATS = ("md", "csv", "tex", "rich")
WRITTEN = ("md", "csv", "tex")
ADHOC = "adhoc"  # recipes from the command line; their tables are written only when asked for by name
CSV_START = (
    "suite", "suite_version", "recipe", "steps", "model", "seed", "outcome", "reason", "simulated", "machine",
)  # fmt: skip
CSV_END = ("tier", "record")
BLOCK = re.compile(r"(<!-- effbench:table ([\w.-]+) -->\n).*?(<!-- /effbench:table -->)", re.DOTALL)

PPL = re.compile(r"(^|_)ppl$")
ACCURACY = re.compile(r"_(acc|exact_match)$")
SPEED = re.compile(r"(prefill|decode)_speedup_b(\d+)_c(\d+)")
COMPUTE = re.compile(r"_flops_per_token_|^flops_2d$|_energy_j_per_token_")
LEVEL = 0.05
OWN_DIGESTS = ("method", "methods", "files")  # of a row, not of its table

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


# ---- the command ---------------------------------------------------------------------------------


def main(options: Mapping[str, Any]) -> int:
    """`effbench report [suite=NAME] [results=DIR] [format=md|csv|tex|rich] [--write] [--check]`.

    Prints the tables. With `write`, writes results/tables and the blocks of the README beside the results
    folder; with `check`, compares those files with the records and returns 1, naming file and line, where
    they differ. Without a suite these are all suites with records. Raises `Usage`.
    """
    results = Path(options.get("results") or "results")
    suite = options.get("suite")
    style = options.get("format") or ("rich" if sys.stdout.isatty() else "md")
    if style not in FORMATS:
        raise Usage(f"unknown format {style!r}{nearest(style, FORMATS)}")
    if suite is not None and not re.fullmatch(r"[\w.-]+", suite):
        raise Usage(f"suite={suite}: not the name of a suite")
    if options.get("check"):
        return check(results, suite)
    if options.get("write"):
        for path in write(results, suite):
            print(f"wrote {path}")
        return 0
    records = load(results, suite)
    if style == "csv":
        sys.stdout.write(_csv(groups(records)))
    else:
        names = sorted({record.cell.suite for record in records})
        sys.stdout.write("\n".join(render(records, name, style) for name in names))
    return 0


def load(results: Path, suite: str | None = None) -> list[Record]:
    """The last attempt at every cell of a suite, or of all suites. Raises `Usage` when there is none."""
    found, notes = Store(results).read(suite)
    for note in notes:
        print(note, file=sys.stderr)
    if not found:
        what = f"records of suite {suite!r}" if suite else "records"
        raise Usage(f"no {what} in {results / 'records'}; run `effbench run suite={suite or 'quant'}` first")
    return list(latest(found).values())


def write(results: Path, suite: str | None = None) -> list[Path]:
    """Bring the generated files of a suite, or of all of them, up to date; returns those that changed."""
    changed = [(path, text) for path, text in pages(results, suite).items() if difference(path, text)]
    for path, text in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    return [path for path, _ in changed]


def check(results: Path, suite: str | None = None) -> int:
    """1 when a generated file differs from what the records say, each named with its first differing line."""
    stale = list(filter(None, (difference(path, text) for path, text in pages(results, suite).items())))
    if stale:
        print("\n".join([*stale, "regenerate with `effbench report --write`"]), file=sys.stderr)
    return int(bool(stale))


def pages(results: Path, suite: str | None = None) -> dict[Path, str]:
    """Every generated file with the text it should have: tables of the suite, or of all and of kernels, and the README.

    Raises `Usage` without records.
    """
    by_suite: dict[str, list[Record]] = {}
    for record in load(results, suite):
        by_suite.setdefault(record.cell.suite, []).append(record)
    if suite is None:
        by_suite.pop(ADHOC, None)
    found = {name: groups(records) for name, records in sorted(by_suite.items())}
    wanted = {
        results / "tables" / f"{name}.{style}": _rendered(tables, name, style)
        for name, tables in found.items()
        for style in WRITTEN
    }
    if suite is None:
        wanted |= timings.tables(results)
    readme = results.resolve().parent / "README.md"
    if readme.is_file():

        def block(match: re.Match[str]) -> str:
            begin, name, end = match.groups()
            if suite not in (None, name):
                return match[0]
            if name not in found:
                raise Usage(f"{readme}: no records of suite {name!r}{nearest(name, found)}")
            return f"{begin}{headline(found[name][0])}{end}"

        wanted[readme] = BLOCK.sub(block, readme.read_text(encoding="utf-8"))
    return wanted


def difference(path: Path, wanted: str) -> str:
    """Empty when the file has the wanted text, else its name and the first line that differs."""
    if not path.is_file():
        return f"{path}: missing"
    found = path.read_bytes().decode(errors="replace")
    if found == wanted:
        return ""
    is_, should = found.split("\n"), wanted.split("\n")
    both = min(len(is_), len(should))
    first = next((i for i in range(both) if is_[i] != should[i]), both)
    here, there = (lines[first] if first < len(lines) else "(no such line)" for lines in (is_, should))
    return f"{path}: line {first + 1} differs\n  found:  {here}\n  wanted: {there}"


# ---- what may be compared ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe: its records, one per seed."""

    records: tuple[Record, ...]

    @property
    def recipe(self) -> str:
        """Its name, the latest one where it was renamed between seeds."""
        return max(self.records, key=lambda record: record.started).cell.recipe

    @property
    def steps(self) -> str:
        return self.records[0].cell.steps

    @property
    def is_baseline(self) -> bool:
        return not self.steps

    @property
    def simulated(self) -> bool:
        return any(record.simulated for record in self.records)

    @property
    def densified(self) -> bool:
        """Whether a merge gave up zeros that pruning had made."""
        return any("densified" in record.log for record in self.records)

    @property
    def worst(self) -> Record:
        """The record whose outcome the row shows: last in the order of OUTCOMES, so `ok` only if all are."""
        return max(self.records, key=lambda record: OUTCOMES.index(record.outcome))

    def estimate(self, metric: str) -> Estimate | None:
        """The metric over the seeds, or None where any seed lacks it: no mean over a shrunken set.

        A single seed has the interval of its own items; several have that of the seeds.
        """
        found = [record.metrics[metric] for record in self.records if metric in record.metrics]
        if len(found) < len(self.records):
            return None
        if len(found) == 1:
            return Estimate(found[0].value, found[0].low, found[0].high)
        return over_seeds([one.value for one in found])

    def fact(self, name: str) -> str:
        """What the methods of the recipe declare."""
        return _line(self.records[0].facts.get(name) or "") or DASH


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that may be compared, baseline first."""

    rows: tuple[Row, ...]
    older: int = 0  # records left out because newer ones took their place

    @property
    def records(self) -> list[Record]:
        return [record for row in self.rows for record in row.records]

    @property
    def baseline(self) -> Row | None:
        return self.rows[0] if self.rows[0].is_baseline else None

    def metrics(self, pattern: str | re.Pattern[str]) -> list[str]:
        """Names of measured metrics in which the pattern is found, in natural order."""
        names = {name for record in self.records for name in record.metrics}
        return sorted((name for name in names if re.search(pattern, name)), key=natural)

    @functools.cached_property
    def tests(self) -> dict[tuple[str, str], tuple[float, float]]:
        """(recipe, metric): difference from the baseline and its p after Holm over all rows and metrics."""
        found: dict[tuple[str, str], Estimate] = {}
        for metric in [*self.metrics(PPL), *tasks(self.metrics(ACCURACY)), "tasks_acc"]:
            for row in self.rows[1:]:
                if self.baseline and self.baseline.estimate(metric) and row.estimate(metric):
                    test = paired(self.baseline.records, row.records, metric)
                    if test is not None:
                        found[row.recipe, metric] = test
        adjusted = holm([test.p for test in found.values()])
        return {key: (test.value, p) for (key, test), p in zip(found.items(), adjusted, strict=True)}


def groups(records: Iterable[Record]) -> list[Group]:
    """Records sorted into what may be compared: newest suite version first, full tier before quick.

    Of two records of one recipe and seed that differ in nothing a reader sees (another state of the source,
    the model or the data) the newer one counts, and neither a row nor a group mixes the two.
    """
    records = sorted(records, key=lambda record: (record.started, record.name))
    machines = {_place(record): machine(record) for record in records if machine(record)}
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        # A worker that died early leaves no environment: its record belongs where the others of its kind are.
        where = machine(record) or machines.get(_place(record), "")
        found.setdefault((*_place(record), where), []).append(record)
    return [_group(found[place]) for place in sorted(found)]


def _group(records: Sequence[Record]) -> Group:
    """The newest state of each row; `records` are sorted by age."""
    newest = state(records[-1])
    rows: list[dict[int, Record]] = []
    for record in records:
        if state(record) == newest:
            mine = {}
            for row in rows:
                cell = dataclasses.replace(next(iter(row.values())).cell, seed=record.cell.seed)
                if cell.identity == record.cell.identity:
                    mine = row
            rows = [row for row in rows if not _replaces(record, row)]
            rows.append(mine | {record.cell.seed: record})
    found = [Row(tuple(record for _, record in sorted(row.items()))) for row in rows]
    found.sort(key=lambda row: (not row.is_baseline, natural(row.recipe)))
    return Group(tuple(found), len(records) - sum(len(row.records) for row in found))


def _replaces(record: Record, row: Mapping[int, Record]) -> bool:
    """Whether a newer record belongs to a row or takes its place: it has its name or its steps."""
    return any(
        record.cell.recipe == other.cell.recipe or record.cell.steps == other.cell.steps for other in row.values()
    )


def _place(record: Record) -> tuple[Any, ...]:
    """Where a record belongs as far as a reader sees it, but for the machine; sorts as tables are shown."""
    cell = record.cell
    settings = json.dumps(cell.settings, sort_keys=True, default=str)
    return (
        cell.suite, -cell.suite_version, cell.tier != "full", cell.tier, cell.model != "tiny", cell.model,
        cell.data, settings,
    )  # fmt: skip


def state(record: Record) -> dict[str, str]:
    """Digests of what all rows of a table share; those of a row's own methods differ between rows."""
    return {name: value for name, value in record.cell.digests.items() if name.partition(".")[0] not in OWN_DIGESTS}


def machine(record: Record) -> str:
    """The device a record was measured on, in words; empty when the record does not say."""
    return _line(record.environment.get("machine") or "")


def natural(text: str) -> list[tuple[float, str]]:
    """Sort key in which 2 comes before 16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part), "") if i % 2 else (math.inf, part) for i, part in enumerate(parts)]


def tasks(metrics: Iterable[str]) -> list[str]:
    """The accuracy of every task: `acc`, or `exact_match` where the task has no `acc`."""
    found: dict[str, str] = {}
    for name in sorted(metrics):
        if name != "tasks_acc" and (match := ACCURACY.search(name)):
            found.setdefault(name[: match.start()], name)
    return [found[task] for task in sorted(found, key=natural)]


# ---- paired tests --------------------------------------------------------------------------------


def paired(before: Sequence[Record], after: Sequence[Record], metric: str) -> Estimate | None:
    """Mean difference per item between two rows and its p, or None where their items cannot be paired.

    Perplexity is compared by its logarithm. Each seed of `after` meets the same seed of `before`, or its
    first one; an item's differences are averaged over the seeds, because the items are the sample.
    """
    partners = {record.cell.seed: record for record in before}
    seeds: list[list[Floats]] = []
    for record in after:
        partner = partners.get(record.cell.seed, before[0])
        differences: list[Floats] = []
        for part in tasks(record.metrics) if metric == "tasks_acc" else [metric]:
            left, right = items(partner, part), items(record, part)
            if left is None or right is None or left.shape != right.shape:
                return None
            if partner.protocols.get(part) != record.protocols.get(part):
                return None
            differences.append(right - left)
        seeds.append(differences)
    strata: list[Floats] = [np.mean(stratum, axis=0) for stratum in zip(*seeds, strict=True)]
    if not strata:
        return None
    test = mean_interval(*strata)
    if len(strata) == len(seeds) == 1 and ACCURACY.search(metric) and set(strata[0]) <= {-1.0, 0.0, 1.0}:
        return dataclasses.replace(test, p=mcnemar(strata[0] < 0, strata[0] > 0))
    return test


def items(record: Record, metric: str) -> Floats | None:
    """Per-item values whose mean is the metric, or the log of a perplexity; None when there are none."""
    if metric == "top1_agreement":
        flips = items(record, "flips")
        return None if flips is None else 1 - flips
    values = record.samples.get(f"{metric}_window_nll") or record.samples.get(metric)
    if not values:
        return None
    found = np.asarray(values, dtype=np.float64)
    if found.ndim == 2:  # (log-likelihood, words) of texts; how many words they have does not depend on the model
        found = -found[:, 0] / found[:, 1].mean()
    return found


# ---- sheets: what tables say, in no format yet ---------------------------------------------------

Show = Callable[[Row], str]


@dataclasses.dataclass(frozen=True)
class Grid:
    """One table, narrow enough for a terminal."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Everything said about one group of comparable rows."""

    title: str
    caption: str
    grids: tuple[Grid, ...]
    notes: tuple[str, ...]  # footnotes of the names in the first column
    legend: str


def sheet(group: Group, brief: bool = False) -> Sheet:
    """The tables of a group; the first has the telling columns and stands alone when `brief`."""
    footnotes: dict[str, int] = {}
    names = [_name(row, footnotes) for row in group.rows]
    grids: list[Grid] = []
    for title, columns in _columns(group)[: 1 if brief else None]:
        cells = {header: [show(row) for row in group.rows] for header, show in columns.items()}
        # A column in which nobody has anything says nothing.
        kept = {header: column for header, column in cells.items() if any(cell != DASH for cell in column)}
        if kept or not grids:
            grids.append(Grid(title, ("recipe", *kept), tuple(zip(names, *kept.values(), strict=True))))
    notes = tuple(f"{_superscript(number)} {text}" for text, number in footnotes.items())
    return Sheet(_title(group), _caption(group, brief), tuple(grids), notes, _legend(group))


def _columns(group: Group) -> list[tuple[str, dict[str, Show]]]:
    """Title and columns, by header, of each table."""

    def measured(metric: str, scale: float = 1) -> Show:
        digits = 4 if PPL.search(metric) else 3  # rows differ by less than their own intervals: they are paired
        return lambda row: with_interval(row.estimate(metric), scale, digits) + _mark(group, row, metric)

    def plain(metric: str, text: Callable[[float], str]) -> Show:
        return lambda row: text(found.value) if (found := row.estimate(metric)) else DASH

    def speed(metric: str) -> Show:
        return lambda row: DASH if row.simulated else with_interval(row.estimate(metric))

    def stored(row: Row) -> str:
        size, ratio = row.estimate("stored_bytes"), row.estimate("compression")
        return DASH if size is None else bytes_text(size.value) + (f" ({ratio.value:.2f}×)" if ratio else "")

    ppls = perplexities(group)
    speeds = sorted(group.metrics(SPEED), key=lambda name: (not name.startswith("prefill"), natural(name)))
    kept: dict[str, Show] = {"bits": plain("bits_per_weight", "{:.2f}".format), "stored": stored}
    kept |= {_header(name): measured(name) for name in ppls[:1]}
    kept |= {"KL, nats": measured("kl_nats_per_token"), "top-1, %": measured("top1_agreement", 100)}
    kept |= {"tasks, %": measured("tasks_acc", 100)}
    for phase in ("prefill", "decode"):
        kept |= {f"{phase}, ×": speed(name) for name in [name for name in speeds if name.startswith(phase)][:1]}

    quality = {_header(name): measured(name) for name in ppls[1:]}
    quality |= {_header(name): measured(name, 100) for name in tasks(group.metrics(ACCURACY))}

    memory: dict[str, Show] = {
        "weights": plain("weight_bytes", bytes_text),
        "metadata": plain("metadata_bytes", bytes_text),
        "resident": plain("resident_bytes", bytes_text),
    }
    memory |= {_header(name): plain(name, bytes_text) for name in group.metrics("^(score|generate)_peak_.*_bytes$")}

    cost: dict[str, Show] = {
        "type": lambda row: row.fact("type"),
        "calibration data": lambda row: row.fact("calibration_data"),
        "weight update": lambda row: row.fact("weight_update"),
        "seeds": lambda row: str(len(row.records)),
        "apply, s": plain("apply_seconds", rounded),
        "calibration tokens": plain("calibration_tokens", "{:,.0f}".format),
    }
    cost |= {_header(name): plain(name, bytes_text) for name in group.metrics("^apply_peak_.*_bytes$")}
    if any(row.recipe != row.steps for row in group.rows if not row.is_baseline):
        cost |= {"steps": lambda row: row.steps or DASH}
    return [
        ("What is saved and what is kept", kept),
        ("Quality in detail", quality),
        (
            "Speed, as a ratio to the baseline of the same run",
            {_header(name): speed(name) for name in speeds},
        ),
        ("Memory; peaks are above what was resident before", memory),
        ("Operations and energy", {_header(name): measured(name) for name in group.metrics(COMPUTE)}),
        ("What the methods are and what applying them costs", cost),
    ]


def perplexities(group: Group) -> list[str]:
    """Metrics that are perplexities, that of the held-out tokens first."""
    return sorted(group.metrics(PPL), key=lambda name: name != "token_ppl")


def _header(metric: str) -> str:
    """Column title of a metric."""
    if match := SPEED.fullmatch(metric):
        return f"{match[1]} b{match[2]} c{match[3]}"
    if match := re.fullmatch("(.*)_peak_(.*)_bytes", metric):
        return f"{match[1]} peak ({match[2]})"
    if match := ACCURACY.search(metric):
        return f"{metric[: match.start()]}, %".replace("_", " ")
    return "perplexity" if metric == "token_ppl" else metric.replace("_", " ")


def _name(row: Row, footnotes: dict[str, int]) -> str:
    """The recipe and, where it is not simply `ok`, what became of it, with a footnote for the reason."""
    name = row.recipe + " (simulated)" * row.simulated + " (densified)" * row.densified
    worst = row.worst
    if worst.outcome == "ok":
        return name
    text = f"{worst.outcome}: {_line(worst.reason)[:300] or 'no reason given'}"
    if len(row.records) > 1:
        text = f"{sum(one.outcome != 'ok' for one in row.records)} of {len(row.records)} seeds, {text}"
    return f"{name}: {worst.outcome}{_superscript(footnotes.setdefault(text, len(footnotes) + 1))}"


def _mark(group: Group, row: Row, metric: str) -> str:
    """An arrow where the row differs from the baseline beyond chance."""
    change, p = group.tests.get((row.recipe, metric), (0.0, 1.0))
    return "" if p > LEVEL else " ↑" if change > 0 else " ↓"


def _title(group: Group) -> str:
    cell = group.records[0].cell
    return f"{cell.suite} v{cell.suite_version}, {cell.tier} tier, model {cell.model}"


def _caption(group: Group, brief: bool = False) -> str:
    """Where the numbers come from; when `brief`, with the protocol of the first perplexity alone."""
    records, cell = group.records, group.records[0].cell
    unnamed = cell.settings.get("machine") or "an unknown machine"
    where = [next((place for record in records if (place := machine(record))), unnamed)]
    where += [f"{name} {cell.settings[name]}" for name in ("threads", "dtype", "limit") if cell.settings.get(name)]
    days = sorted({record.started[:10] for record in records if record.started})
    when = " to ".join(dict.fromkeys((*days[:1], *days[-1:]))) or "no date"
    counts = Counter(record.outcome for record in records)
    outcomes = ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])
    parts = [f"Data {cell.data}; {', '.join(where)}; {when}; {len(records)} cells: {outcomes}."]
    if group.older:
        parts.append(f"{group.older} records of an older source, model or data are left out.")
    if kernels := sorted({name for record in records for backends in record.kernels.values() for name in backends}):
        parts.append(f"Packed weights computed by the backend {', '.join(kernels)}.")
    for metric in perplexities(group)[: 1 if brief else None]:
        for protocol in sorted({r.protocols[metric] for r in records if metric in r.protocols}):
            parts.append(f"{_header(metric).capitalize()}: {protocol}.")
    return " ".join(parts)


def _legend(group: Group) -> str:
    """What the marks mean, as far as they can occur."""
    parts = ["±: 95 % interval over items or windows; ±ˢ: over seeds; [a–b]: range of two seeds; –: not measured."]
    if group.tests:
        parts.append("↑ ↓: differs from the baseline, paired by item, at 5 % after Holm over the table.")
    if speeds := group.metrics(SPEED):
        first = _header(speeds[0]).partition(" ")[2]
        parts.append(f"Speed: the baseline of the same run is 1; b: batch, c: context, {first} unless named.")
    if any(row.simulated for row in group.rows):
        parts.append("Simulated: computes like the compressed form without being stored as it, so it has no speed.")
    if any(row.densified for row in group.rows):
        parts.append("Densified: a merge filled the zeros that pruning had made.")
    return " ".join(parts)


# ---- numbers as text -----------------------------------------------------------------------------


def with_interval(found: Estimate | None, scale: float = 1, digits: int = 3) -> str:
    """A value to at least so many digits, and its uncertainty; `ˢ` tells that of seeds. A dash for None."""
    if found is None:
        return DASH
    value = found.value * scale
    low, high = (value if bound is None else bound * scale for bound in (found.low, found.high))
    reach = max(high - value, value - low)
    if reach <= 1e-6 * abs(value) or max(abs(value), reach) >= 1e5:
        return rounded(value, digits)
    text: Callable[[float], str] = rounded
    if abs(value) >= 1e-3 or not value:
        least = digits - 1 - math.floor(math.log10(abs(value))) if abs(value) >= 0.1 else 0
        text = f"{{:.{max(places(reach), least)}f}}".format
    if found.n == 2:
        return f"{text(value)} [{text(low)}–{text(high)}]"
    return f"{text(value)} ±{text(reach)}{'ˢ' if found.n > 2 else ''}"


def places(reach: float) -> int:
    """Decimals worth showing of a number this uncertain.

    Two digits of the uncertainty where it begins with 1 or 2, else one: rounding changes it by 1/6 at most.
    """
    mantissa, exponent = f"{reach:.1e}".split("e")
    return max(0, (mantissa < "3") - int(exponent))


def _line(value: Any) -> str:
    """Anything as one line of text."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return " ".join(str(value).split())


def _superscript(number: int) -> str:
    return str(number).translate(SUPERSCRIPTS)


# ---- formats -------------------------------------------------------------------------------------


def render(records: Iterable[Record], suite: str, format: str = "md") -> str:
    """The tables of one suite as md, csv, tex or rich (for the terminal). Raises `Usage` without records."""
    records = list(records)
    chosen = [record for record in records if record.cell.suite == suite]
    if not chosen:
        raise Usage(f"no records of suite {suite!r}{nearest(suite, {record.cell.suite for record in records})}")
    return _rendered(groups(chosen), suite, format)


def headline(group: Group) -> str:
    """Markdown for a README: the telling columns."""
    return _markdown_sheet(sheet(group, brief=True)) + "\n"


def _rendered(tables: Sequence[Group], suite: str, format: str) -> str:
    if format == "csv":
        return _csv(tables)
    sheets = [sheet(group) for group in tables]
    if format == "rich":
        return _rich(sheets)
    made = f"Generated by `effbench report suite={suite} --write`; do not edit."
    if format == "tex":
        return "\n\n".join([f"% {made} Needs \\usepackage{{booktabs}}.", *map(_tex_sheet, sheets)]) + "\n"
    return "\n\n".join([f"<!-- {made} -->", *map(_markdown_sheet, sheets)]) + "\n"


def _csv(tables: Sequence[Group]) -> str:
    """One row per record that the tables stand on; where a metric has intervals, their bounds follow it."""
    shown = [record for group in tables for record in group.records]
    bounded = {name for r in shown for name, metric in r.metrics.items() if metric.low is not None}
    columns = [
        (name, part)
        for name in sorted({name for record in shown for name in record.metrics}, key=natural)
        for part in (("value", "low", "high") if name in bounded else ("value",))
    ]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [name if part == "value" else f"{name}_{part}" for name, part in columns]
    writer.writerow([*CSV_START, *names, *CSV_END])
    for record in shown:
        cell = record.cell
        start = (
            cell.suite, cell.suite_version, cell.recipe, cell.steps, cell.model, cell.seed, record.outcome,
            _line(record.reason), str(record.simulated).lower(),
            machine(record) or cell.settings.get("machine"),
        )  # fmt: skip
        values = [getattr(record.metrics.get(name), part, None) for name, part in columns]
        writer.writerow([*start, *values, cell.tier, record.name])
    return out.getvalue()


def _markdown_sheet(sheet: Sheet) -> str:
    parts = [f"**{markdown(sheet.title)}.** {markdown(sheet.caption)}"]
    for grid in sheet.grids:
        if len(sheet.grids) > 1:
            parts.append(f"*{markdown(grid.title)}*")
        parts.append(markdown_table(grid.header, [[markdown(cell) for cell in row] for row in grid.rows]))
    return "\n\n".join([*parts, *map(markdown, (*sheet.notes, sheet.legend))])


TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_",
    "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "[": "{[}", "]": "{]}", "±": r"$\pm$", "×": r"$\times$", "–": "--",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "ˢ": r"\textsuperscript{s}",
    **{chr(mark): rf"\textsuperscript{{{chr(digit)}}}" for digit, mark in SUPERSCRIPTS.items()},
}  # fmt: skip


def tex(text: str) -> str:
    """Plain text so that LaTeX sets it as it is."""
    return "".join(TEX.get(character, character) for character in text)


def _tex_sheet(sheet: Sheet) -> str:
    tables = []
    for grid in sheet.grids:
        align = "".join("r" if numeric_column(column) else "l" for column in zip(*grid.rows, strict=True))
        header, *body = (" & ".join(map(tex, line)) + r" \\" for line in (grid.header, *grid.rows))
        first = grid is sheet.grids[0]
        caption = f"{sheet.title}: {grid.title}." + (f" {sheet.caption}" if first else "")
        notes = [*sheet.notes, sheet.legend] if first else sheet.notes
        lines = [r"\begin{table}", r"\centering\footnotesize", rf"\caption{{{tex(caption)}}}"]
        lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule", header, r"\midrule", *body, r"\bottomrule"]
        lines += [r"\end{tabular}", *(rf"\par {tex(note)}" for note in notes), r"\end{table}"]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _rich(sheets: Sequence[Sheet]) -> str:
    """Text for the terminal, in colour where there is one."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, force_terminal=sys.stdout.isatty())
    for sheet in sheets:
        console.print(Text(sheet.title, style="bold"))
        console.print(Text(sheet.caption, style="dim"))
        for grid in sheet.grids:
            table = Table(title=grid.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
            for header, column in zip(grid.header, zip(*grid.rows, strict=True), strict=True):
                table.add_column(Text(header), justify="right" if numeric_column(column) else "left")
            for row in grid.rows:
                table.add_row(*map(Text, row))
            console.print(table)
        for note in (*sheet.notes, sheet.legend):
            console.print(Text(note, style="dim"))
    return out.getvalue()
