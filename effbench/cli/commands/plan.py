"""`effbench plan`: what a recipe will hold in memory, before anything runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from effbench.cells.predict import PlanOptions
from effbench.cli.command import JSON, Command, print_columns
from effbench.core.usage import parse
from effbench.report.text import bytes_text

if TYPE_CHECKING:
    from effbench.cells.predict import Prediction

CLAIMS = "claims"
PARTS = ("weights", "gathered", "gradients", "optimizer", "activations", "teachers")  # in training
OTHERS = ("gathered", "teachers")  # parts that most recipes have none of


def _plan(arguments: argparse.Namespace) -> int:
    if arguments.options == [CLAIMS]:
        return _print_claims(arguments.json)
    from effbench.cells.predict import parse_memory, predict

    options = parse(PlanOptions, arguments.options)
    options.check()
    memory = None if options.memory is None else parse_memory(options.memory)
    found = predict(options)
    if arguments.json:
        print(json.dumps([_to_json(prediction, memory) for prediction in found], indent=1))
        return 0
    for number, prediction in enumerate(found):
        if number:
            print()
        _print(prediction, memory)
        sys.stdout.flush()  # the next one may take a minute
    return 0


def _print(prediction: Prediction, memory: int | None) -> None:
    held = prediction.held
    where = f" each of {prediction.ranks} ranks under {prediction.engine}" if prediction.engine else ""
    print(f"{prediction.recipe} on {prediction.model}{',' if where else ''}{where}")
    if held is None:
        print(f"  {prediction.outcome}")
        return
    at = f"batch {prediction.batch}, context {prediction.context}, {prediction.dtype}"
    phases = [("opening", {"weights": held.opened}, held.opened)]
    if held.weights:
        phases.append(("training", {part: getattr(held, part) for part in PARTS}, held.training))
    phases.append(("generating", {"weights": held.resident, "cache": held.cache}, held.generating))
    rows = []
    for phase, parts, total in phases:
        rows += [
            (
                f"  {phase if not number else ''}",
                part,
                bytes_text(size),
                _constants(held.constants if (phase, part) == ("training", "weights") else 0),
            )
            for number, (part, size) in enumerate(parts.items())
            if size or part not in OTHERS
        ]
        verdict = (
            ""
            if memory is None
            else f"fits, {bytes_text(memory - total)} are left"
            if total <= memory
            else (f"does not fit: {bytes_text(total - memory)} too much")
        )
        rows.append(("  ", "all", bytes_text(total), verdict))
    rows.append(("  stored", "artifact", bytes_text(held.stored), _constants(held.stored_constants)))
    print(f"  at {at}; {held.parameters:,} parameters, {held.trained:,} trained")
    print_columns(rows)


def _constants(size: int) -> str:
    return f"of which {bytes_text(size)} only decode" if size else ""


def _to_json(prediction: Prediction, memory: int | None) -> dict[str, object]:
    body = dataclasses.asdict(prediction)
    if prediction.held is not None:
        totals = {name: getattr(prediction.held, name) for name in ("opened", "training", "generating")}
        body["held"] |= {name: totals[name] for name in ("training", "generating")}
        if memory is not None:
            body["fits"] = {name: total <= memory for name, total in totals.items()}
    return body


def _print_claims(as_json: bool) -> int:
    from effbench.cells.claims import CLAIMS as claims

    if as_json:
        print(json.dumps([dataclasses.asdict(claim) for claim in claims], indent=1))
        return 0
    for claim in claims:
        print(claim.what)
        print_columns([("  stated", claim.stated), ("  right", f"{claim.figure:,} {claim.unit}"), ("  why", claim.why)])
    return 0


def _notes() -> str:
    return (
        "`effbench plan claims` prints figures that are often stated, the right ones and why they differ.\n"
        "Sizes are in powers of 1000. Bytes are those held at the end of a forward pass, and while generating at the\n"
        "end of the context; what is held for a moment (work of a kernel, of a calibration, CUDA itself) is not in\n"
        "them. Of several ranks they are those of the one that holds most; gathered are weights in parts that are\n"
        "whole at a time."
    )


COMMAND = Command(
    _plan,
    "predict the bytes that a recipe holds on a model, and whether they fit; nothing runs",
    options=PlanOptions,
    flags=JSON,
    notes=_notes,
)
