"""What a row's choice of tokens is worth beside random tokens, as many of each prompt."""

from __future__ import annotations

from typing import Any

import pytest

from effbench import probes, sources
from effbench.core.errors import Refused
from effbench.core.recipe import parse
from effbench.core.views import Segments
from effbench.methods.prompt.random_tokens import drop
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun
from effbench.probes.prompts import divided

CONTEXTS, FACTS = "tiny_contexts", "tiny_facts"
CHOSEN = {"tasks": [CONTEXTS], "limit": 12}


def under(steps: str) -> ModelRun:
    settings = {"calibration_sequences": 2, "calibration_length": 32}
    run = open_run(sources.model("tiny", None), sources.data(None), "cpu", "float32", 0, settings)
    for step in parse(steps).steps:
        run.apply(step)
    return run


def score(steps: str, settings: dict[str, Any]) -> list[float]:
    samples: dict[str, list[float]] = probes.take("quality", under(steps), settings).samples
    return samples[f"{CONTEXTS}_acc"]


def test_differences_are_those_of_the_accuracies_item_by_item() -> None:
    """Of every prompt a context stays, a fifth; random tokens keep as many of each."""
    run = under("retrieval(keep=0.24)")
    reading = probes.take("floor", run, CHOSEN)
    own = score("retrieval(keep=0.24)", CHOSEN)
    found = reading.samples[f"{CONTEXTS}_over_random"]
    assert len(found) == 12 and sum(found) > 3
    floor = [mine - more for mine, more in zip(own, found, strict=True)]
    (prompts,) = divided(run, CHOSEN, 12)
    kept = [len(run.data.encode_prompt(run.rewrite(prompt).text())) for prompt in prompts]
    shorter = [drop(p, len(run.data.encode_prompt(p.text())) - n, run) for p, n in zip(prompts, kept, strict=True)]
    assert [len(run.data.encode_prompt(prompt.text())) for prompt in shorter] == kept
    assert set(floor) <= {0, 1}
    metric = reading.metrics[f"{CONTEXTS}_over_random"]
    assert metric.value == pytest.approx(sum(found) / 12) and metric.n == 12
    assert metric.low is not None and metric.low <= metric.value <= (metric.high or 0)
    assert reading.metrics["tasks_over_random"].value == metric.value


def test_a_prompt_is_shortened_once_for_all_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each probe knows that it met the method."""
    run, asked = under("retrieval(keep=0.24)"), []
    rewrite = ModelRun.rewrite
    monkeypatch.setattr(ModelRun, "rewrite", lambda self, prompt: asked.append(prompt) or rewrite(self, prompt))
    for name in ("quality", "floor", "answers"):
        assert probes.take(name, run, CHOSEN).metrics and not run.infer.idle
    assert len(asked) == len({*asked}) == 12
    probes.take("compression", run, CHOSEN)
    assert len(asked) > 24, "time is that of shortening anew"


def test_random_tokens_are_no_better_than_themselves() -> None:
    reading = probes.take("floor", under("random_tokens(keep=0.4)"), CHOSEN)
    assert reading.samples[f"{CONTEXTS}_over_random"] == [0.0] * 12
    assert reading.metrics["tasks_over_random"].value == 0


def test_a_task_counts_where_prompts_were_shortened() -> None:
    """Of prompts that could not be divided all is one context."""
    reading = probes.take("floor", under("retrieval(keep=0.24), rtn(bits=8)"), CHOSEN | {"limit": 6})
    assert set(reading.metrics) == {f"{CONTEXTS}_over_random", "tasks_over_random"}
    with pytest.raises(Refused, match="changed nothing"):
        probes.take("floor", under("random_tokens(keep=1.0)"), CHOSEN)
    for steps in ("", "h2o(keep=0.5)", "speculative()"):
        assert not probes.take("floor", under(steps), CHOSEN).metrics


def test_beside_memory_random_tokens_are_read_by_the_unchanged_model() -> None:
    """However far the fit has taken the model that reads memory."""
    floors = []
    for rate in (0.1, 0.001):
        run = under(f"gist(tokens=2), fit(steps=1, lr={rate}, batch_size=2, max_length=128)")
        run.finish()
        reading = probes.take("floor", run, CHOSEN)
        own = probes.take("quality", run, CHOSEN).samples[f"{CONTEXTS}_acc"]
        found = reading.samples[f"{CONTEXTS}_over_random"]
        floors.append([mine - more for mine, more in zip(own, found, strict=True)])
        assert "the unchanged model" in reading.protocols[f"{CONTEXTS}_over_random"]
    assert floors[0] == floors[1] and {*floors[0]} == {0, 1}


def test_dropping_leaves_all_that_is_no_context() -> None:
    run = under("")
    prompt = Segments("", "Notes: ", ("fog mole code rope hall ",), "The code")
    assert drop(prompt, 0, run) == prompt
    assert drop(prompt, 99, run).text() == "Notes: The code"
    assert len(drop(prompt, 2, run).contexts[0].split()) == 3
