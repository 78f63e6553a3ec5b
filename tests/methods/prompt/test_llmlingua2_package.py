"""LLMLingua-2 as `llmlingua` 0.2.2 computes it, by one classifier on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from effbench import tiny
from effbench.core.views import Segments
from effbench.methods.prompt import llmlingua2
from effbench.methods.prompt._common import open_judge
from effbench.methods.prompt._labels import make_classifier
from effbench.methods.prompt.llmlingua2 import LLMLingua2
from effbench.nn.run import ModelRun

TENSORS = load_file(Path(__file__).parents[2] / "golden" / "llmlingua2.safetensors")
NAMES = [name for name in TENSORS if name != "head"]
DATA = Path(tiny.__file__).parent / "data"
ROWS = {name: [*map(json.loads, (DATA / f"{name}.jsonl").open())] for name in ("needle_256", "contexts")}


def say(text: str) -> str:
    return "".join(text.split())


@pytest.fixture(scope="module")
def classifier(run: ModelRun) -> object:
    model = make_classifier(open_judge(run, "reference").engine.model, 0)
    model.get_output_embeddings().weight.data = TENSORS["head"]
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_what_the_package_keeps(name: str, run: ModelRun, classifier: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of contexts alone, and of those of a prompt where the share is one of contexts."""
    data, number, rate, longest = name.split("/")
    row, keep = ROWS[data][int(number)], 1 / 3 if rate == "0.3333" else float(rate)
    monkeypatch.setattr(llmlingua2, "LONGEST", int(longest))
    monkeypatch.setattr(LLMLingua2, "_find_classifier", lambda self, run: classifier)
    contexts = tuple(f" {text}" for text in row.get("contexts", [row.get("context")]))
    expected = say(bytes(TENSORS[name].tolist()).decode())
    new = LLMLingua2(keep=keep).rewrite(Segments(contexts=contexts, whole=True), run)
    end = say(contexts[-1])[-1]  # the last token of a prompt stays
    assert say(new.text()) in (expected, expected + end)
    asked = Segments("", "Notes:", (*contexts[:-1], contexts[-1] + " "), row["question"])
    new = LLMLingua2(keep=keep, of="contexts").rewrite(asked, run)
    assert say("".join(new.contexts)) == expected and new.question == row["question"]


def test_there_are_texts_of_one_chunk_and_of_several() -> None:
    assert len(NAMES) > 50 and {name.rsplit("/", 1)[1] for name in NAMES} == {"65", "511"}
