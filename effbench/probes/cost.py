"""What applying the recipe cost: read from the log that the run kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.machine.peak import SCOPES
from effbench.probes import Reading

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun


SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`apply_seconds`, `apply_peak_<kind>_bytes` for every kind of peak that was seen, `calibration_tokens`."""
    steps = run.log.steps
    reading = Reading(samples={"apply_seconds": [step["seconds"] for step in steps]})
    seconds = sum(step["seconds"] for step in steps)
    reading.add("apply_seconds", seconds, "wall clock, summed over the steps of the recipe")
    for kind in dict.fromkeys(kind for step in steps for kind in step["peaks"]):
        high = max(step["peaks"][kind] for step in steps if kind in step["peaks"])
        protocol = f"high-water mark minus start, {SCOPES[kind]}, the highest of the steps of the recipe"
        reading.add(f"apply_peak_{kind}_bytes", high, protocol)
    tokens = run.log.calibration_tokens
    reading.add("calibration_tokens", tokens, "tokens that statistics were taken from")
    return reading
