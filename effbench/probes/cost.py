"""What applying the recipe cost: read from the log that the run kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.probes import Reading
from effbench.probes.peak import kind

if TYPE_CHECKING:
    from effbench.nn.model_run import ModelRun

VERSION = 1


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`apply_seconds`, `apply_peak_rss_bytes` or `apply_peak_allocated_bytes`, `calibration_tokens`."""
    steps = run.log.get("steps", [])
    reading = Reading(samples={"apply_seconds": [step["seconds"] for step in steps]})
    each = ", ".join(str(step["step"]) for step in steps) or "no steps"
    reading.add("apply_seconds", sum(step["seconds"] for step in steps), f"wall clock, summed over {each}")
    peaks = [step["peak_bytes"] for step in steps if step.get("peak_bytes") is not None]
    if peaks:
        name = f"apply_peak_{kind(run.device)}_bytes"
        reading.add(name, max(peaks), f"high-water mark minus start, the highest of {each}")
    tokens = run.log.get("calibration_tokens", 0)
    reading.add("calibration_tokens", tokens, "tokens that statistics were taken from")
    return reading
