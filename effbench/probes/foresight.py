"""How far `effbench plan` is off: the bytes that it foretells of a recipe, beside those that this run has held."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.nn.model.linear import stored_bytes
from effbench.nn.rehearse import Batch, make_case, rehearse
from effbench.probes import Reading
from effbench.probes.memory import resident_bytes

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

HOW = "foretold without weights, for rows as long as the longest of a step, over what the first process held, less 1"
SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`plan_*_off`, of each part that was measured and is not empty."""
    cost = run.log.fits[-1]["cost"] if run.log.fits else None
    read = Batch(context=None if cost is None else cost.get("length"))
    held = rehearse(make_case(run.source, run.steps, run.model.dtype, read, run.skip), process=0)
    pairs = {
        "resident": (held.resident, resident_bytes(run.model)),
        "stored": (held.stored, sum(stored_bytes(run.model, run.storage))),
    }
    if cost is not None:
        training = {
            "weights": (held.weights, cost["parameter_bytes"] + cost["buffer_bytes"]),
            "gradients": (held.gradients, cost["gradient_bytes"]),
            "optimizer": (held.optimizer, cost["optimizer_bytes"]),
        }
        if "gathered_bytes" in cost:
            training["gathered"] = held.gathered, cost["gathered_bytes"]
        if "activation_bytes" in cost:
            training["activations"] = held.activations, cost["activation_bytes"]
            pairs["training"] = sum(pair[0] for pair in training.values()), sum(pair[1] for pair in training.values())
        pairs |= training
    reading = Reading()
    for part, (foretold, measured) in pairs.items():
        if measured:
            reading.add(f"plan_{part}_off", abs(foretold / measured - 1), HOW)
    return reading
