"""LLMLingua and LongLLMLingua as `llmlingua` 0.2.2 computes them, on the embedded model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from effbench import tiny
from effbench.core.kinds import Shorten
from effbench.core.views import Segments
from effbench.methods.prompt._common import cut, open_judge
from effbench.methods.prompt._lingua import split
from effbench.methods.prompt.llmlingua import LLMLingua, measure_perplexity
from effbench.methods.prompt.longllmlingua import RESTRICT, LongLLMLingua, measure_question
from effbench.nn.run import ModelRun

GOLDEN = Path(__file__).parents[2] / "golden" / "llmlingua.safetensors"
with safe_open(GOLDEN, "pt") as file:
    TENSORS = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / f"{name}.jsonl").open()]


ONE, MANY = read("needle_256"), read("contexts")


def write(row: dict[str, Any]) -> Segments:
    """Contexts with empty lines between them, as the package joins them."""
    return Segments(
        contexts=tuple(text + "\n\n" for text in row.get("contexts", [row.get("context")])), question=row["question"]
    )


def say(text: str) -> str:
    return "".join(text.split())  # the package may drop the empty lines between contexts


@pytest.mark.parametrize("name", [name for name in TENSORS if not name.startswith("rank")])
def test_what_the_package_keeps(name: str, run: ModelRun) -> None:
    assert say(choose(name).rewrite(write(row_of(name)), run).text()) == say(bytes(TENSORS[name].tolist()).decode())


def row_of(name: str) -> dict[str, Any]:
    kind, number = re.match(r"(one|many|asked)\D*(\d+)", name).groups()  # type: ignore[union-attr]
    return (ONE if kind == "one" else MANY)[int(number)]


def choose(name: str) -> Shorten:
    """The method by the settings that a name gives: rate, size of a step, and how far rates spread."""
    kind, *order, _, rate, size = name.rsplit("/", name.startswith("asked") and 1)[0].split("/")
    settings: dict[str, Any] = {"keep": float(rate), "step": int(size), "tail": "package"}
    if kind != "asked":
        return LLMLingua(**settings)
    return LongLLMLingua(reorder=order == ["sort"], dynamic=float(name.rsplit("/", 1)[1]), **settings)


@pytest.mark.parametrize("number", [0, 1])
def test_numbers_of_the_package(number: int, run: ModelRun) -> None:
    judge = open_judge(run, "reference")
    segments = write(MANY[number])
    _, contexts, _ = split(segments, cut(segments, judge.tokenizer))
    asked = measure_question(judge, contexts, segments.question + RESTRICT, bos=False)
    assert [*asked.values()] == pytest.approx(TENSORS[f"rank/asked/{number}"].tolist(), abs=1e-4)
    plain = measure_perplexity(judge, contexts, bos=False)
    assert [*plain.values()] == pytest.approx(TENSORS[f"rank/plain/{number}"].tolist(), abs=1e-4)
