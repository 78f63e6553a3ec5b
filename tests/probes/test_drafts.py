"""Drafts, greedy and sampled: how many are taken, what a pass of the verifier gives, and what it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from effbench import probes, sources
from effbench.core.errors import Refused
from effbench.core.recipe import parse
from effbench.core.run import InferPlan
from effbench.nn.files.load import open_run
from effbench.nn.infer.engine import Engine
from effbench.nn.infer.sampling import Sampling
from effbench.probes import Reading, drafts

Open = Callable[[str], Any]
BRIEF = {"speed_seconds": 0.02}
KINDS = ("", "sampled_")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return open_run(sources.model("tiny"), sources.data("tiny"), "cpu", "float32", 0, {})


@pytest.fixture
def under(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Open:
    """The embedded model under an inference plan, drafting a few short texts."""
    for name, value in {"TEXTS": 3, "CONTEXT": 16, "NEW_TOKENS": 14}.items():
        monkeypatch.setattr(drafts, name, value)

    def under(steps: str, seed: int = 0) -> Any:
        run = copy.copy(tiny)
        run.infer, run._shared, run.seed = InferPlan(), {}, seed
        for step in parse(steps).steps:
            run.apply(step)
        return run

    return under


def counts(reading: Reading) -> dict[str, float]:
    """What does not depend on how fast the machine is."""
    timed = ("drafted_tok_per_s", "drafted_speedup")
    return {name: metric.value for name, metric in reading.metrics.items() if not name.endswith(timed)}


def test_of_drafts_of_the_verifier_itself_every_pass_gives_one_token_more(under: Open) -> None:
    """13 tokens behind the prompt's are four passes of three, and one of what is left."""
    found = counts(probes.take("drafts", under("speculative(k=2)"), BRIEF))
    for kind in KINDS:
        assert found[f"{kind}tokens_per_pass"] == pytest.approx(13 / 5)
        assert found[f"{kind}accepted_per_pass"] == 2
        assert found[f"{kind}accepted_at_1"] == found[f"{kind}accepted_at_2"] == 1
    assert len(found) == 8


def test_a_text_shorter_than_whole_drafts_says_nothing_of_these(under: Open) -> None:
    found = counts(probes.take("drafts", under("speculative(k=20)"), BRIEF))
    assert found == {"tokens_per_pass": 13, "sampled_tokens_per_pass": 13}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_a_pass_are_those_of_the_texts_over_calls_of_the_verifier(
    under: Open, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Counted by hand, for a draft that is often wrong; the first pass over a text reads its prompt."""
    run = under("sliding_window(window=3), speculative(k=3)")
    decoder, passes, extend = run.infer.slot("decoder"), [], Engine.extend

    def count(engine: Engine, *of: Any) -> Any:
        if engine is decoder.verifier:
            passes.append(1)
        return extend(engine, *of)

    found = counts(probes.take("drafts", run, BRIEF))
    monkeypatch.setattr(Engine, "extend", count)
    reading = Reading()
    texts = [part.tolist() for part in run.data.heldout_ids(3 * drafts.CONTEXT).split(drafts.CONTEXT)]
    sampling = Sampling(seed=0) if kind else None
    drafts._count(reading, kind, drafts.open_engine(run), decoder, texts, sampling, "")
    made, behind = len(texts) * (drafts.NEW_TOKENS - 1), len(passes) - len(texts)
    assert found[f"{kind}tokens_per_pass"] == pytest.approx(made / behind)
    assert 1 < found[f"{kind}tokens_per_pass"] < 4
    shares = [found[f"{kind}accepted_at_{place}"] for place in (1, 2, 3)]
    first, second, third = shares
    assert found[f"{kind}accepted_per_pass"] == pytest.approx(first * (1 + second * (1 + third)))


def test_counts_are_the_same_however_long_is_timed_and_sampled_ones_follow_the_seed(under: Open) -> None:
    steps = "sliding_window(window=3), speculative(k=3)"
    brief, longer, other = (
        counts(probes.take("drafts", under(steps, seed), {"speed_seconds": seconds}))
        for seconds, seed in ((0.02, 0), (0.5, 0), (0.02, 1))
    )
    assert brief == longer
    changed = [name for name in brief if brief[name] != other[name]]
    assert changed and all(name.startswith("sampled_") for name in changed)


def test_greedy_and_sampled_text_share_the_seconds(under: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    paired = drafts.paired
    monkeypatch.setattr(drafts, "paired", lambda *calls: (given.append(calls[2]), paired(*calls))[1])
    metrics = probes.take("drafts", under("speculative(k=2)"), {"speed_seconds": 0.03}).metrics
    assert given == [0.015, 0.015]
    for kind in KINDS:
        assert metrics[f"{kind}drafted_speedup"].value > 0 and metrics[f"{kind}drafted_tok_per_s"].value > 0


def test_a_limit_is_of_the_texts(under: Open) -> None:
    for limit, texts in ((2, 2), (40, 3)):
        reading = probes.take("drafts", under("speculative(k=2)"), BRIEF | {"limit": limit})
        assert f"{texts} texts" in reading.protocols["sampled_accepted_per_pass"]
        assert reading.metrics["tokens_per_pass"].n == 5 * texts  # passes


def test_a_text_that_is_not_the_verifiers_is_refused(under: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft's own text in the place of one that was checked."""
    run = under("sliding_window(window=3), speculative(k=3)")
    decoder = run.infer.slot("decoder")
    monkeypatch.setattr(decoder, "verifier", drafts.open_engine(run))
    with pytest.raises(Refused, match="is not the one that the model that checks them makes"):
        probes.take("drafts", run, BRIEF)


def test_nothing_is_said_of_what_drafts_nothing(under: Open) -> None:
    assert not probes.take("drafts", under("h2o()"), {}).metrics
