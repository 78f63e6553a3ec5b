"""The record: everything measured on one recipe x model x seed on one machine. Immutable, failures included."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from effbench.core.plain import plain
from effbench.records.metric import Finding, Metric

SCHEMA = 3

OutcomeName = Literal["ok", "oom", "unsupported", "unavailable", "refused", "diverged", "timeout", "crashed"]
OUTCOMES: tuple[OutcomeName, ...] = get_args(OutcomeName)
RETRIED = ("oom", "unavailable", "timeout", "crashed")  # tried again by the next run; the others are final
FAILED = ("oom", "unavailable", "diverged", "timeout", "crashed")  # exit code 1

# Checked by hand: msgspec 0.22 takes the pattern of a `Meta` in a union with a dict for something else when garbage is
# collected, and the interpreter crashes.
NAME = re.compile(r"\w[\w.-]{0,99}")  # of a suite: becomes the name of a folder
REFERENCE = re.compile(r"[0-9a-f]{8,64}")  # digest of what lies in a file beside the record
DATE = re.compile(r"(\d{4}-\d\d-\d\d.*)?")
LARGEST = 2**63 - 1
PLACE = ("device", "machine", "host", "threads")  # settings that say where a cell ran, not what was asked for


class Unreadable(Exception):
    """A file in the results folder that is not what its place says; reported and skipped."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is to be run: one recipe on one model with one seed, and all that decides its numbers."""

    suite: str
    suite_version: int
    tier: str
    recipe: str  # name of the row
    steps: str  # canonical step string
    resolved: tuple[dict[str, Any], ...]  # every step with all its fields
    model: str
    data: str
    seed: int
    settings: dict[str, Any]  # probes, limit, dtype, device kind, threads, score_block, tasks ...
    digests: dict[str, str]  # model, data, tasks, methods, probes, files

    @functools.cached_property
    def identity(self) -> str:
        """Hex digest of everything above but the row's name; equal identities measure the same thing."""
        body = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "recipe"}
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Record:
    """One cell and what became of it. Read from a folder, `samples` and `log["layers"]` are loaded when looked at."""

    cell: Cell
    outcome: OutcomeName
    reason: str = ""
    traceback: str = ""
    attempt: int = 1
    simulated: bool = False  # computes like the compressed form without being stored as it
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
    samples: Mapping[str, list[Any]] = dataclasses.field(default_factory=dict)  # per-item results, raw timings
    protocols: dict[str, str] = dataclasses.field(default_factory=dict)  # metric: how it was measured, in full
    kernels: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # op: backend: calls
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # type, calibration data, weight update
    log: dict[str, Any] = dataclasses.field(default_factory=dict)  # what the methods report of themselves
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    started: str = ""  # UTC, ISO 8601
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """File name: readable, unique for identity and attempt."""
        words = [self.cell.recipe, self.cell.model.rpartition("/")[2], f"s{self.cell.seed}"]
        slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_") for word in words)
        return f"{slug[:90]}-{self.cell.identity}-{self.attempt}.json"

    @property
    def host(self) -> str:
        """Fingerprint of the host it was measured on; empty when the record does not say."""
        return str(self.cell.settings.get("host") or self.environment.get("host") or "")

    def to_json(self) -> str:
        """All of the record in one text that needs no file beside it; what JSON cannot hold is put in plain words."""
        return write_text(summarize(self))


class Summary(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A record as it is written. Where the type says so, content is here or, by its digest, in a file beside it."""

    schema: int = SCHEMA
    cell: Cell
    outcome: OutcomeName
    reason: str = ""
    traceback: str = ""
    attempt: int = 1
    simulated: bool = False
    started: str = ""
    seconds: float = 0.0
    environment: dict[str, Any] | str = {}
    metrics: dict[str, Metric] = {}
    protocols: dict[str, str] | str = {}
    samples: dict[str, list[Any]] | str = {}
    layers: bool = False  # whether the log's layers are with the samples
    kernels: dict[str, dict[str, int]] = {}
    facts: dict[str, Any] = {}
    log: dict[str, Any] = {}


def summarize(record: Record) -> Summary:
    """The written form of a record with all content in it. Metrics without a finite value are left out."""
    metrics = {str(name): _written_metric(metric) for name, metric in record.metrics.items() if _finite(metric.value)}
    return Summary(
        cell=record.cell,
        outcome=record.outcome,
        reason=plain(record.reason),
        traceback=plain(record.traceback),
        attempt=record.attempt,
        simulated=record.simulated,
        started=record.started,
        seconds=record.seconds,
        environment=plain(record.environment),
        metrics=metrics,
        protocols={name: plain(text) for name, text in record.protocols.items() if name in metrics},
        samples=plain(record.samples),
        kernels=record.kernels,
        facts=plain(record.facts),
        log=plain(record.log),
    )


def write_text(summary: Summary) -> str:
    """JSON with one line for each field, so that a change of a record is a change of few lines."""
    body = {field: value for field in summary.__struct_fields__ if (value := getattr(summary, field))}
    body["cell"] = plain(dataclasses.asdict(summary.cell))
    body["metrics"] = {name: _trimmed(metric) for name, metric in summary.metrics.items()}
    lines = [f'"{key}":{msgspec.json.encode(value, order="deterministic").decode()}' for key, value in body.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_text(text: str | bytes) -> Summary:
    """A record of this schema or an older one, with types checked. Raises `Unreadable`."""
    from effbench.records.upgrade import upgrade

    try:
        try:
            return _checked(_SUMMARY.decode(text))
        except msgspec.ValidationError:
            body = msgspec.json.decode(text)
        if not isinstance(body, dict) or type(body.get("schema")) is not int:
            raise Unreadable("not an effbench record (no schema number)")
        if body["schema"] > SCHEMA:
            raise Unreadable(f"schema {body['schema']} is newer than this effbench reads ({SCHEMA}): update effbench")
        return _checked(msgspec.convert(upgrade(body), Summary))
    except msgspec.ValidationError as error:
        raise Unreadable(f"fields do not fit the schema ({error})") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"not JSON ({error})") from None
    except RecursionError:
        raise Unreadable("not an effbench record (nested too deeply)") from None


def from_json(text: str | bytes) -> Record:
    """Read a record that needs no file beside it, of this schema or an older one. Raises `Unreadable`."""
    summary = read_text(text)
    apart = [name for name in ("environment", "protocols", "samples") if isinstance(getattr(summary, name), str)]
    if apart:
        raise Unreadable(f"its {', '.join(apart)} are in files beside it: read it within its results folder")
    return as_record(summary, summary.environment, summary.protocols, summary.samples)  # type: ignore[arg-type]


def as_record(
    summary: Summary,
    environment: dict[str, Any],
    protocols: dict[str, str],
    samples: Mapping[str, list[Any]],
    layers: Mapping[str, Any] | None = None,
) -> Record:
    """The record that a summary and the content of the files beside it make."""
    return Record(
        cell=summary.cell,
        outcome=summary.outcome,
        reason=summary.reason,
        traceback=summary.traceback,
        attempt=summary.attempt,
        simulated=summary.simulated,
        metrics=summary.metrics,
        samples=samples,
        protocols=protocols,
        kernels=summary.kernels,
        facts=summary.facts,
        log=summary.log if layers is None else summary.log | {"layers": layers},
        environment=environment,
        started=summary.started,
        seconds=summary.seconds,
    )


_SUMMARY = msgspec.json.Decoder(Summary)


def _checked(summary: Summary) -> Summary:
    """The summary, if what its types do not say holds as well. Raises `Unreadable`."""
    if summary.schema != SCHEMA:
        raise msgspec.ValidationError(f"written by schema {summary.schema}")
    cell = summary.cell
    contents = (summary.environment, summary.protocols, summary.samples)
    for name, holds in {
        "cell.suite": NAME.fullmatch(cell.suite),
        "cell.suite_version": 0 <= cell.suite_version <= LARGEST,
        "cell.seed": abs(cell.seed) <= LARGEST,
        "cell.resolved": all(isinstance(step.get("method"), str) for step in cell.resolved),
        "attempt": 1 <= summary.attempt <= LARGEST,
        "started": DATE.fullmatch(summary.started),
        "a digest": all(isinstance(each, dict) or REFERENCE.fullmatch(each) for each in contents),
    }.items():
        if not holds:
            raise Unreadable(f"fields do not fit the schema ({name} is none)")
    return summary


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _written_metric(metric: Metric) -> Metric:
    findings = {str(plain(name)): _finding(value) for name, value in metric.findings.items()}
    return Metric(
        float(metric.value),
        metric.low if _finite(metric.low) else None,
        metric.high if _finite(metric.high) else None,
        metric.n,
        {name: value for name, value in findings.items() if value is not None},
    )


def _finding(value: Any) -> Finding | None:
    if isinstance(value, (bool, int)):
        return value
    value = plain(value)
    return value if value is None or isinstance(value, (float, str)) else str(value)


def _trimmed(metric: Metric) -> list[Any]:
    """The metric as a list without trailing fields that are empty."""
    values = [metric.value, metric.low, metric.high, metric.n, metric.findings or None]
    while values[-1] is None:
        values.pop()
    return values
