"""What a reader finds in a file of another tool, and the record that it makes."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from typing import Any

from effbench.records.definitions import describe
from effbench.records.imported import TIER
from effbench.records.metric import Metric
from effbench.records.record import Cell, OutcomeName, Record

KINDS = {  # what a record measured here says, by the kinds of metrics
    "quality": ("perplexity", "accuracy", "distance", "quality"),
    "size": ("size",),
    "memory": ("memory",),
    "speed": ("speed",),
    "operations": ("compute",),
    "energy": ("energy",),
    "cost": ("cost",),
}


@dataclasses.dataclass(frozen=True)
class Names:
    """Names to give instead of those in the file, so that results can be set side by side."""

    recipe: str | None = None
    model: str | None = None


@dataclasses.dataclass
class Found:
    """The content of one file of results in the terms of a record."""

    recipe: str
    model: str
    data: str
    version: str  # of the tool
    seed: int = 0
    outcome: OutcomeName = "ok"
    reason: str = ""
    method: dict[str, Any] = dataclasses.field(default_factory=dict)  # its hyper-parameters
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    digests: dict[str, str] = dataclasses.field(default_factory=dict)  # model, data, tasks
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
    protocols: dict[str, str] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    left_out: list[str] = dataclasses.field(default_factory=list)  # numbers that no metric here means

    def add(self, name: str, metric: Metric | float, protocol: str) -> None:
        """Take in a metric. Raises `effbench.records.definitions.Undefined`, a `KeyError`, for one without meaning."""
        describe(name)
        metric = metric if isinstance(metric, Metric) else Metric(float(metric))
        if not math.isfinite(metric.value):
            self.left_out.append(f"{name} (not finite)")
            return
        self.metrics[name] = metric
        self.protocols[name] = protocol

    def list_missing(self) -> list[str]:
        """What a record measured here has and this one does not."""
        families = {describe(name).family for name in self.metrics}
        missing = [kind for kind, members in KINDS.items() if not families & {*members}]
        if not any(describe(name).family in KINDS["quality"] for name in self.samples if name in self.metrics):
            missing.append("results per item")
        if not any(describe(name).family == "speed" and describe(name).unit == "ratio" for name in self.metrics):
            missing.append("timing in turns with the unchanged model")
        return missing


def make_record(source: str, path: Path, found: Found, names: Names) -> Record:
    """The record of one file. Its suite is the tool, its tier says that it was imported."""
    content = path.read_bytes()
    recipe, missing = names.recipe or found.recipe, found.list_missing()
    cell = Cell(
        suite=source,
        suite_version=1,
        tier=TIER,
        recipe=recipe,
        steps=recipe,  # never empty: an imported row is no baseline
        resolved=({"method": TIER, "from": source, **found.method},),
        model=names.model or found.model,
        data=found.data,
        seed=found.seed,
        settings=found.settings,
        digests={**found.digests, "files": hashlib.sha256(content).hexdigest()},
    )
    told = f"imported from {source} {found.version}".rstrip()
    return Record(
        cell=cell,
        outcome=found.outcome,
        reason=found.reason,
        metrics=found.metrics,
        samples=found.samples,
        protocols=found.protocols,
        facts={
            "type": TIER,
            "imported": {"from": source, "version": found.version, "file": path.name, "left_out": found.left_out},
            "missing": missing,
            "caveats": [f"{told}; without {', '.join(missing)}" if missing else told],
        },
        environment=found.environment,
        started=found.started,
        seconds=found.seconds,
    )
