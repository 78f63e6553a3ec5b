"""`effbench recommend`: what to run on a device of so much memory, at most so much worse."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import TYPE_CHECKING

from effbench.cli.command import JSON, Command
from effbench.core.errors import Usage
from effbench.core.paths import PUBLISHED
from effbench.core.usage import named_path, parse
from effbench.recommend import RecommendOptions

if TYPE_CHECKING:
    from effbench.recommend import Advice, Answer

HEADER = ("recipe", "weights + cache", "weights", "cache", "loss, %", "at most, %", "fits", "tok/s", "first token, ms")


def _recommend(arguments: argparse.Namespace) -> int:
    from effbench.recommend import recommend
    from effbench.report.pages import load

    options = parse(RecommendOptions, arguments.options)
    results = named_path("results", options.results) if options.results is not None else PUBLISHED
    if results is None:
        raise Usage("results=: name the folder; nothing is published with an installed package")
    answer = recommend(options, load(results))
    if arguments.json:
        print(json.dumps(_to_plain(answer), indent=1))
    else:
        print(_write(answer, options))
    return int(not any(map(_is_good, answer.advice)))


def _is_good(advice: Advice) -> bool:
    return advice.fits and not advice.outcome


def _write(answer: Answer, options: RecommendOptions) -> str:
    """The answer as text: what was asked, a table, and what it stands on."""
    from effbench.report.text import bytes_text, markdown_table, rounded

    def line(one: Advice) -> list[str]:
        sizes = ["–"] * 3 if one.outcome else [bytes_text(size) for size in (one.total, one.weights, one.cache)]
        most = "–" if one.most is None else rounded(one.most, 2)
        speed = "–" if one.speed is None else f"{rounded(one.speed.tokens_per_s)} ({one.speed.point})"
        first = "–" if one.speed is None or one.speed.first_token_ms is None else rounded(one.speed.first_token_ms)
        return [one.recipe, *sizes, rounded(one.drop, 2), most, "yes" if _is_good(one) else "no", speed, first]

    asked = (
        f"{answer.model} in {bytes_text(answer.memory)}: batch {options.batch}, context {options.context}, "
        f"at most {answer.budget:g} % worse"
    )
    notes = []
    best = next((one for one in answer.advice if _is_good(one)), None)
    if best is None:
        notes.append("Nothing that loses so little fits: ask for a shorter context or allow more.")
    else:
        notes.append(f"Cheapest: {best.recipe}{'' if best.sure else ', which may lose more than that'}.")
    notes += [f"{one.recipe}: {one.outcome}." for one in answer.advice if one.outcome]
    if answer.beyond:
        near = ", ".join(f"{one.row.recipe} ({rounded(one.drop, 2)} %)" for one in answer.beyond)
        notes.append(f"Beyond the loss allowed, nearest first: {near}.")
    where = f"Loss: the larger of perplexity's rise and accuracy's fall, of {answer.measured_on}"
    where += f" ({', '.join(answer.tables)})" if answer.tables else ""
    if answer.measured_on != answer.model:
        where += f".\nNo record tells quality of {answer.model}: what another model loses need not hold for it"
    notes.append(f"{where}. At most: the end of the 95 % interval.")
    notes.append("Bytes are predicted, as held for computing; work of kernels and CUDA itself come on top.")
    if not answer.timed:
        device = f" on a device called {options.device}" if options.device else " on any device"
        notes.append(f"No record times {answer.model}{device}: no tokens a second and no time to the first token.")
    else:
        machines = ", ".join(sorted({one.speed.machine for one in answer.advice if one.speed is not None}))
        notes.append(f"Speed was measured on {machines}, at the batch and context in brackets.")
    table = markdown_table(HEADER, list(map(line, answer.advice)))
    return "\n\n".join([asked, table, "\n".join(notes)])


def _to_plain(answer: Answer) -> dict[str, object]:
    body = dataclasses.asdict(dataclasses.replace(answer, beyond=()))
    body["beyond"] = [{"recipe": one.row.recipe, "drop": one.drop, "metric": one.metric} for one in answer.beyond]
    for one in body["advice"]:
        one["most"] = one["most"] if one["most"] is not None and math.isfinite(one["most"]) else None
    return body


def _notes() -> str:
    return (
        "Recipes come from records, of those that need no training; losses are paired with the baseline of the same\n"
        "table. Exit code 0 if something fits, 1 if nothing does."
    )


COMMAND = Command(
    _recommend,
    "recommend recipes for a model, a memory and a loss of quality, from records and predicted bytes",
    options=RecommendOptions,
    flags=JSON,
    notes=_notes,
)
