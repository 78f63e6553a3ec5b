"""Instruments. A probe is one module of this folder with a function `take(run, settings) -> Reading`.

Names and the need for an idle machine are read from source, so asking for them imports no torch.
All probes read one flat mapping of settings, each the keys it knows; what is absent or None has a default.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from effbench.core.errors import Refused, Usage
from effbench.core.usage import nearest
from effbench.records.metric import Finding, Metric

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun


@dataclasses.dataclass
class Reading:
    """What one probe has to say. A quantity that could not be measured is absent, never zero."""

    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # per-item results, raw timings
    protocols: dict[str, str] = dataclasses.field(default_factory=dict)  # metric: how it was measured
    failures: list[Exception] = dataclasses.field(default_factory=list)  # why parts are absent that were asked for

    def add(
        self, name: str, metric: Metric | float, protocol: str, findings: Mapping[str, Finding] | None = None
    ) -> None:
        """Take in one metric: how it was measured is its protocol, what the measurement turned out to be its findings.

        The protocol says what was chosen and nothing of the recipe, so that equal protocols are equal texts. Raises
        `Undefined` for a metric that `effbench/records/definitions.py` does not define.
        """
        # Imported by name: a new definition changes no measurement, and digests of probes follow imports.
        importlib.import_module("effbench.records.definitions").describe(name)
        metric = metric if isinstance(metric, Metric) else Metric(float(metric))
        self.metrics[name] = msgspec.structs.replace(metric, findings=dict(findings)) if findings else metric
        self.protocols[name] = protocol


def names() -> tuple[str, ...]:
    """All probes, sorted."""
    return tuple(_declared())


def take(name: str, run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """Measure. Raises `Unsupported` or `Refused` with a reason where there is no honest number."""
    if name not in _declared():
        raise Usage(f"unknown probe {name!r}{nearest(name, names())}")
    from effbench.nn.model.decoded import decoded  # here, as it imports torch

    run.infer.acted.clear()
    unseen = sorted(run.infer.touches - sees(name))
    if unseen:
        raise Refused(f"{name} does not see what the recipe changes: {', '.join(unseen)}")
    with decoded(run.model) if name in QUALITY else contextlib.nullcontext(False) as any_decoded:
        if any_decoded:
            run.log.decoded.append(name)
        reading: Reading = importlib.import_module(f"{__name__}.{name}").take(run, settings)
    return reading


@functools.cache
def sees(name: str) -> frozenset[str]:
    """What of a run the numbers of a probe depend on; of a recipe that changes something else it says nothing."""
    line = next(line for line in _declared()[name] if line.startswith("SEES = "))
    return frozenset(ast.literal_eval(line.removeprefix("SEES = ")))


@functools.cache
def _declared() -> dict[str, list[str]]:
    """Every probe, and what it declares of itself, such as `EXCLUSIVE = True`."""
    probes: dict[str, list[str]] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        body = ast.parse(path.read_bytes()).body
        if path.stem != "__init__" and any(isinstance(line, ast.FunctionDef) and line.name == "take" for line in body):
            probes[path.stem] = [ast.unparse(line) for line in body if isinstance(line, ast.Assign)]
    return probes


def _select(line: str) -> frozenset[str]:
    """The probes that declare this of themselves."""
    return frozenset(name for name, lines in _declared().items() if line in lines)


EXCLUSIVE = _select("EXCLUSIVE = True")  # they need the machine to themselves
QUALITY = _select("QUALITY = True")  # they ask for nothing but predictions, and so may meet packed linears decoded
WINDOWED = _select("WINDOWED = True")  # they read `window`, `stride` and `text_tokens`
TASK = _select("TASK = True")  # they say how well a task is done, also at each setting that is tried
POINTED = _select("POINTED = True")  # they read `speed_points`
