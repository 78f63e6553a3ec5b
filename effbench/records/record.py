"""The record: everything measured on one recipe x model x seed on one machine. Immutable, failures included."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

SCHEMA = 2

OutcomeName = Literal["ok", "oom", "unsupported", "unavailable", "refused", "diverged", "timeout", "crashed"]
OUTCOMES: tuple[OutcomeName, ...] = get_args(OutcomeName)
RETRIED = ("oom", "unavailable", "timeout", "crashed")  # tried again by the next run; the others are final
FAILED = ("oom", "unavailable", "diverged", "timeout", "crashed")  # exit code 1


class Unreadable(Exception):
    """A file in the results folder that is no record of ours; reported and skipped."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measured number; its unit is the end of its name. `low` and `high` bound a 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


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
        body = dataclasses.asdict(self)
        del body["recipe"]
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Record:
    """One cell and what became of it."""

    cell: Cell
    outcome: OutcomeName
    reason: str = ""
    traceback: str = ""
    attempt: int = 1
    simulated: bool = False  # computes like the compressed form without being stored as it
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # per-item results, raw timings
    protocols: dict[str, str] = dataclasses.field(default_factory=dict)  # metric: how it was measured, in full
    kernels: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # op: backend: calls
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # type, calibration data, weight update
    log: dict[str, Any] = dataclasses.field(default_factory=dict)  # what the methods report of themselves
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    started: str = ""  # UTC, ISO 8601
    seconds: float = 0.0
    schema: int = SCHEMA

    @property
    def name(self) -> str:
        """File name: readable, unique for identity and attempt."""
        words = [self.cell.recipe, self.cell.model.rpartition("/")[2], f"s{self.cell.seed}"]
        slug = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_") for word in words)
        return f"{slug[:90]}-{self.cell.identity}-{self.attempt}.json"

    def to_json(self) -> str:
        """Canonical text; numbers that are not finite become null with a null value of the metric dropped."""
        body = dataclasses.asdict(self)
        body["metrics"] = {
            name: {k: v for k, v in dataclasses.asdict(m).items() if v is not None}
            for name, m in self.metrics.items()
            if math.isfinite(m.value)
        }
        return json.dumps(_finite(body), indent=1, sort_keys=True, default=str) + "\n"


def from_json(text: str) -> Record:
    """Read a record of this schema or an older one. Raises `Unreadable`."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise Unreadable(f"not JSON ({error})") from None
    if not isinstance(body, dict) or not isinstance(body.get("schema"), int):
        raise Unreadable("not an effbench record (no schema number)")
    if body["schema"] > SCHEMA:
        raise Unreadable(f"schema {body['schema']} is newer than this effbench reads ({SCHEMA}): update effbench")
    while body["schema"] < SCHEMA:
        step = UPGRADES.get(body["schema"])
        if step is None:
            raise Unreadable(f"schema {body['schema']} cannot be upgraded")
        body = step(body)
    try:
        cell = body.pop("cell")
        cell["resolved"] = tuple(cell["resolved"])
        metrics = {name: Metric(**metric) for name, metric in body.pop("metrics").items()}
        record = Record(cell=Cell(**cell), metrics=metrics, **body)
    except (KeyError, TypeError, AttributeError) as error:
        raise Unreadable(f"fields do not fit the schema ({error})") from None
    if record.outcome not in OUTCOMES:
        raise Unreadable(f"unknown outcome {record.outcome!r}")
    return record


def _calibrated(body: dict[str, Any]) -> dict[str, Any]:
    """To schema 2: methods of kind `apply` were said to take no calibration data, whatever they took."""
    facts, tokens = body.get("facts", {}), body.get("log", {}).get("calibration_tokens")
    if facts.get("calibration_data") == "none" and tokens:
        length = body["cell"]["settings"].get("calibration_length")
        facts["calibration_data"] = f"{tokens // length} sequences" if length else f"{tokens:,} tokens"
    return body | {"schema": 2}


# schema k: a function to schema k + 1
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _calibrated}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
