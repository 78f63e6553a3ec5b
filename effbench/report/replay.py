"""A record beside a replay of its cell: does it reproduce, and if not, which metric is off and what is different here?

Metrics are judged by what they are.

    quality  predictions, losses and what was selected: on the host of the record every value and every item equal to
             the last bit; on another host within 0.1 %, or the interval of the paired difference includes zero
    counts   bytes, bits, tokens, operations: equal, wherever they were counted
    times    on the host of the record the two 95 % intervals meet; those of another host say nothing
    peaks    of the process, which differ from run to run: not judged
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from effbench.records.definitions import PEAKS
from effbench.records.record import PLACE, Record
from effbench.report.differences import estimate_difference
from effbench.report.metrics import find_definition, get_scale, get_title, natural_key
from effbench.report.published import TOLERANCE, measure_distance
from effbench.report.text import rounded

Kind = Literal["quality", "counts", "times", "peaks"]
Verdict = Literal["reproduced", "drifted", "cannot run"]

QUALITY = ("perplexity", "accuracy", "distance", "quality", "data")  # families
TIMES = ("s", "ms", "µs", "tokens/s", "bytes/s", "FLOP/s", "%", "J", "W")  # units
APART = ("oom", "unavailable", "timeout")  # outcomes that say what is lacking here, and nothing of the cell
CHOSEN = "chosen by "  # begins the names of samples that are examples of a selection
SHOWN = 6  # drifts that are told one by one


@dataclasses.dataclass(frozen=True)
class Drift:
    """A metric that is not what it was."""

    metric: str
    kind: Kind
    before: float
    after: float | None  # None: not measured
    low: float | None = None  # bounds of the record's 95 % interval
    high: float | None = None
    items: int = 0  # results per item that differ
    of: int = 0
    why: str = ""  # in place of all that: why the two cannot be compared

    def __str__(self) -> str:
        title = get_title(self.metric)
        if self.why:
            return f"{title}: {self.why}"
        scale = get_scale(self.metric)
        before = self.before * scale
        if self.after is None:
            return f"{title}: not measured now, {rounded(before, 6)} then"
        after = self.after * scale
        words = [f"{title}: {rounded(after, 6)} now, {rounded(before, 6)} then"]
        if before:
            words.append(f"{100 * (after / before - 1):+.2g} %" if after != before else "the mean is equal")
        if self.low is not None and self.high is not None:
            where = "within" if self.low * scale <= after <= self.high * scale else "outside"
            words.append(f"{where} its 95 % interval {rounded(self.low * scale, 4)} to {rounded(self.high * scale, 4)}")
        if self.of:
            words.append(f"{self.items} of {self.of} items differ")
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Replay:
    """What became of a replay."""

    verdict: Verdict
    why: str = ""  # it cannot run, or ends otherwise than the record
    drifts: tuple[Drift, ...] = ()
    judged: Mapping[str, int] = dataclasses.field(default_factory=dict)  # metrics that could be compared
    exact: int = 0  # metrics of quality that are equal to the last bit, their items too
    items: int = 0  # results per item that were compared
    left: Mapping[str, int] = dataclasses.field(default_factory=dict)  # metrics that say nothing here
    same_host: bool = True
    differences: tuple[str, ...] = ()  # of the environment and the source


def judge_replay(record: Record, fresh: Record, gained: Iterable[str] = ()) -> Replay:
    """The verdict on a replay; `gained` names the parameters that the methods of the record have got since."""
    same_host = bool(record.host) and _name_host(record) == _name_host(fresh)
    differences = tuple([*list_differences(record, fresh), *(f"{name} is new, at its default" for name in gained)])
    if fresh.outcome != record.outcome:
        why = f"{_tell_outcome(fresh)} now, {_tell_outcome(record)} then"
        apart = fresh.outcome in APART
        return Replay("cannot run" if apart else "drifted", why, same_host=same_host, differences=differences)
    why = "" if fresh.outcome == "ok" else f"now as then {_tell_outcome(fresh)}"
    drifts: list[Drift] = []
    judged, left = Counter[str](), Counter[str]()
    exact = compared = 0
    for metric in sorted(record.metrics, key=natural_key):
        kind = sort_metric(metric)
        if kind == "peaks" or (kind == "times" and not (same_host and _has_interval(record, metric))):
            left[kind] += 1
            continue
        judged[kind] += 1
        before, after = ([] if kind == "times" else _read_items(one, metric) for one in (record, fresh))
        differing = _count_unequal(before, after)
        compared += len(before)
        exact += kind == "quality" and not differing and _get_value(record, metric) == _get_value(fresh, metric)
        if drift := _compare(record, fresh, metric, kind, same_host, differing):
            drifts.append(dataclasses.replace(drift, items=differing, of=len(before)))
    for name in sorted(record.samples.keys() | fresh.samples.keys()):
        if name.startswith(CHOSEN):
            before, after = (list(one.samples.get(name, ())) for one in (record, fresh))
            judged["quality"] += 1
            compared += len(before)
            differing = _count_unequal(before, after)
            exact += not differing
            if differing:
                what = f"{differing} of {max(len(before), len(after))} examples are others, or have another weight"
                drifts.append(Drift(name, "quality", len(before), len(after), why=what))
    verdict: Verdict = "drifted" if drifts else "reproduced"
    return Replay(verdict, why, tuple(drifts), dict(judged), exact, compared, dict(left), same_host, differences)


def _tell_outcome(record: Record) -> str:
    return f"{record.outcome} ({record.reason})" if record.reason else record.outcome


def _name_host(record: Record) -> tuple[str, Any]:
    """The host with the device that was measured on."""
    return record.host, record.cell.settings.get("machine")


def sort_metric(metric: str) -> Kind:
    """What a metric is judged as."""
    definition = find_definition(metric)
    if any(metric.endswith(f"_peak_{peak}_bytes") for peak in PEAKS):
        return "peaks"
    if definition is None or definition.family in QUALITY or definition.unit == "nats":
        return "quality"
    timed_ratio = definition.family == "speed" and definition.unit == "ratio"
    return "times" if timed_ratio or definition.unit in TIMES else "counts"


def _has_interval(record: Record, metric: str) -> bool:
    return record.metrics[metric].low is not None and record.metrics[metric].high is not None


def _read_items(record: Record, metric: str) -> list[Any]:
    """Results per item of a metric, as they were measured."""
    return list(record.samples.get(f"{metric}_window_nll") or record.samples.get(metric) or ())


def _get_value(record: Record, metric: str) -> float | None:
    return record.metrics[metric].value if metric in record.metrics else None


def _compare(record: Record, fresh: Record, metric: str, kind: Kind, same_host: bool, differing: int) -> Drift | None:
    """How a metric is off, of which so many items differ; None where it is as it was."""
    then, now = record.metrics[metric], fresh.metrics.get(metric)
    drift = Drift(metric, kind, then.value, None if now is None else now.value, then.low, then.high)
    if now is None:
        return drift
    if kind == "times":
        low, high = (now.value, now.value) if now.low is None or now.high is None else (now.low, now.high)
        assert then.low is not None and then.high is not None
        return None if low <= then.high and then.low <= high else drift
    if record.protocols.get(metric) != fresh.protocols.get(metric):
        texts = f"{fresh.protocols.get(metric)!r} now, {record.protocols.get(metric)!r} then"
        return dataclasses.replace(drift, why=f"is measured by another protocol: {texts}")
    if now.value == then.value and not differing:
        return None
    if kind == "quality" and not same_host and _is_chance(record, fresh, metric):
        return None
    return drift


def _is_chance(record: Record, fresh: Record, metric: str) -> bool:
    """Whether a metric is as it was up to what another processor rounds otherwise."""
    if measure_distance(metric, fresh.metrics[metric].value, record.metrics[metric].value) < TOLERANCE:
        return True
    test = estimate_difference([record], [fresh], metric)
    return test is not None and test.low is not None and test.high is not None and test.low <= 0 <= test.high


def _count_unequal(before: Sequence[Any], after: Sequence[Any]) -> int:
    """Places at which two lists of results differ; all of the longer one where their lengths do."""
    if len(before) != len(after):
        return max(len(before), len(after))
    return sum(
        left != right and not (left != left and right != right) for left, right in zip(before, after, strict=True)
    )


# ---- what is different here -----------------------------------------------------------------------


def list_differences(record: Record, fresh: Record) -> Iterator[str]:
    """What of environment, settings and source is another for two records of one cell."""
    then, now = (_describe_place(one) for one in (record, fresh))
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            yield f"{name}: {now.get(name, 'none')} now, {then.get(name, 'none')} then"
    before, after = record.cell.digests, fresh.cell.digests
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if changed:
        commits = (one.environment.get("commit") for one in (fresh, record))
        ours, theirs = (str(commit)[:9] if commit else "no commit" for commit in commits)
        yield f"source of {', '.join(changed)}: commit {ours} now, {theirs} then"


def _describe_place(record: Record) -> dict[str, Any]:
    """Versions, machine, host, threads and whatever else the environment says, flat; the commit is told by digests."""
    environment = {name: value for name, value in record.environment.items() if name not in ("commit", "dirty")}
    packages = environment.pop("packages", {})
    settings = {name: record.cell.settings[name] for name in (*PLACE, "dtype") if name in record.cell.settings}
    return {**environment, **packages, **settings, "host": record.host}
