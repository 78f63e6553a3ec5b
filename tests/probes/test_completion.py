"""What can be had of a learned task without reading the prompt."""

from __future__ import annotations

import json
import math

import pytest

from effbench import probes, sources, tiny
from effbench.core.paths import PACKAGE
from effbench.core.views import Example
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun
from effbench.probes.completion import score_constant

CARD = json.loads((PACKAGE / "tiny" / "card.json").read_text())


@pytest.fixture(scope="module")
def run() -> ModelRun:
    return open_run(sources.model("tiny"), sources.data("tiny:task"), "cpu", None, 0)


def test_the_constant_answer_is_that_of_the_card(run: ModelRun) -> None:
    def answers(part: str, number: int) -> list[list[int]]:
        return [[*run.tokenizer.encode(text), run.tokenizer.eos_token_id] for _, text in tiny.ask(part, number)]

    found = score_constant(answers("train", 2000), answers("heldout", 400))
    assert sum(found) / len(found) == pytest.approx(CARD["new_task"]["best constant answer"], rel=1e-6)


def test_answers_of_unlike_length_by_hand() -> None:
    """At the first place 3 of 4 say 7, at the second 2 of 2 say 8; nothing was seen at the third, and 9 nowhere."""
    learned = [[7], [7], [7, 8], [5, 8]]
    words = 4  # 5, 7, 8, 9
    found = score_constant(learned, [[7, 8], [9, 8, 8]])
    assert found[0] == pytest.approx(-(math.log(4 / (4 + words)) + math.log(3 / (2 + words))) / 2)
    assert found[1] == pytest.approx(-(math.log(1 / 8) + math.log(3 / 6) + math.log(1 / 4)) / 3)


def test_a_model_that_learned_nothing_gains_nothing(run: ModelRun, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = probes.take("completion", run, {"limit": 24})
    gain = reading.metrics["completion_gain_nats"]
    assert gain.high is not None and gain.high < 0
    assert reading.metrics["completion_constant_exact"].value == 0
    losses, gains = (reading.samples[name] for name in ("completion_nll", "completion_gain_nats"))
    assert gain.value == pytest.approx(sum(gains) / 24)
    assert min(loss + gain for loss, gain in zip(losses, gains, strict=True)) > 1


def test_the_likeliest_answer_is_that_of_the_training_examples(run: ModelRun, monkeypatch: pytest.MonkeyPatch) -> None:
    unseen = run.data.unseen[:20]
    answer = unseen[3].ids[unseen[3].prompt :]
    learned = [Example(str(i), (1, 2, *answer), prompt=2) for i in range(3)]
    learned += [Example("other", (1, 2, 5), prompt=2)]
    monkeypatch.setattr(type(run.data), "pool", learned)
    monkeypatch.setattr(type(run.data), "unseen", unseen)
    same = sum(example.ids[example.prompt :] == answer for example in unseen)
    reading = probes.take("completion", run, {"limit": 20})
    assert reading.metrics["completion_constant_exact"].value == pytest.approx(same / 20) and same
