"""The chance that drafts are taken: by formula, on the text that is measured, and as speculative decoding finds it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_cache import run_of
from toys_texts import SPREAD, answered, taught
from toys_training import fit

from effbench import probes
from effbench.checks import toy
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.infer.sampling import Sampling
from effbench.nn.run import ModelRun
from effbench.probes.acceptance import accept, expect_tokens

SETTINGS = {"window": 32, "text_tokens": 320}


def by_hand(run: ModelRun, teacher: Any, ids: list[int], first: int) -> Tensor:
    """1 less the total variation of the two at each token of a text from `first` on."""
    p, q = (
        Engine(m, run.infer).logits(torch.tensor([ids]))[0, first - 1 : -1].softmax(-1) for m in (teacher, run.model)
    )
    return 1 - (p - q).abs().sum(-1) / 2


def test_the_share_of_two_tables() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]), torch.tensor([[0.2, 0.2, 0.6], [0.0, 0.5, 0.5]])
    assert accept(p.log(), q.log()).tolist() == pytest.approx([0.6, 0.0])
    assert accept(p.log(), p.log()).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("a", [0.0, 0.3, 0.9])
def test_tokens_of_a_block_by_the_corrected_formula(a: float) -> None:
    assert expect_tokens(4, a) == pytest.approx((1 - a**5) / (1 - a))
    assert expect_tokens(4, 1.0) == 5


def test_it_is_taken_on_held_out_text_against_whoever_taught() -> None:
    run = taught()
    run.apply(parse_step("kd(teacher='teacher')"))
    fit(run, steps=2)
    reading = probes.take("acceptance", run, SETTINGS)
    windows = run.data.heldout_ids().view(-1, 32)[:10].tolist()
    expected = torch.stack([by_hand(run, run.role("teacher"), ids, 1) for ids in windows])
    found = reading.metrics["acceptance"]
    assert found.value == pytest.approx(float(expected.mean()), rel=1e-5) and found.n == 10
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    block = reading.metrics["block_tokens_k4"]
    assert block.value == pytest.approx(expect_tokens(4, found.value))
    assert block.low == pytest.approx(expect_tokens(4, found.low))
    reference = taught()
    reference.model.load_state_dict(run.model.state_dict())
    assert probes.take("acceptance", reference, SETTINGS).metrics["acceptance"].value != pytest.approx(found.value)
    assert "answer_acceptance" not in reading.metrics


def test_the_unchanged_model_takes_its_own_drafts() -> None:
    assert probes.take("acceptance", taught(), SETTINGS).metrics["acceptance"].value == pytest.approx(1.0)


def test_answers_of_held_out_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    run = taught()
    examples = answered(run)
    monkeypatch.setattr(type(run.data), "unseen", property(lambda data: examples))
    run.apply(parse_step("gkd(teacher='teacher')"))
    found = probes.take("acceptance", run, SETTINGS).metrics
    alone = [by_hand(run, run.role("teacher"), list(example.ids), example.prompt) for example in examples]
    assert found["answer_acceptance"].value == pytest.approx(float(torch.cat(alone).mean()), rel=1e-5)
    assert found["answer_block_tokens_k4"].value == pytest.approx(expect_tokens(4, found["answer_acceptance"].value))


def test_rows_that_pad_a_vocabulary_count_for_nothing() -> None:
    plain, wide = taught(), taught()
    padded = toy(seed=1, **(SPREAD | {"vocab_size": 112}))
    state = plain.role("teacher").state_dict()
    padded.load_state_dict({name: torch.cat([t, 9 * t[:16]]) if len(t) == 96 else t for name, t in state.items()})
    wide.shelve("teacher", padded, wide.tokenizer)
    plain.teacher = wide.teacher = "teacher"
    ours, theirs = (probes.take("acceptance", run, SETTINGS).metrics["acceptance"].value for run in (wide, plain))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_another_vocabulary_and_what_it_does_not_see_are_refused() -> None:
    run = taught()
    tokenizer = copy.deepcopy(run.tokenizer)
    vocabulary = {token.upper(): place for token, place in tokenizer.get_vocab().items()}
    tokenizer.get_vocab = lambda: vocabulary
    run.shelve("teacher", toy(seed=1), tokenizer)
    run.teacher = "teacher"
    with pytest.raises(Unsupported, match="teacher has another vocabulary"):
        probes.take("acceptance", run, SETTINGS)
    with pytest.raises(Refused, match="acceptance does not see what the recipe changes: prompt"):
        probes.take("acceptance", run_of("retrieval()"), SETTINGS)


def test_caches_are_read_as_they_are_left() -> None:
    run, plain = run_of("h2o(keep=0.3)", initializer_range=0.2), run_of("", initializer_range=0.2)
    assert probes.take("acceptance", plain, SETTINGS).metrics["acceptance"].value == pytest.approx(1.0)
    found = probes.take("acceptance", run, SETTINGS)
    assert found.metrics["acceptance"].value < 0.999 and "block1" in found.protocols["acceptance"]


# Speculative decoding by a teacher


STEPS = (
    "fit(), snapshot(name='teacher'), student(layers=1), kd(teacher='teacher'), fit(), speculative(verifier='teacher')"
)


def distilled(**shape: Any) -> ModelRun:
    recipe = parse(STEPS).check_fits()
    run = taught(**shape)
    for step in recipe.steps:
        if step.consumes:
            fit(run, steps=8, lr=3e-3)
        else:
            run.apply(step)
    run.finish()
    return run


def test_drafts_are_taken_as_often_as_the_probe_says() -> None:
    """Each drafted token that is looked at is taken with its own chance, so that the sum of both differs by chance."""
    run = distilled()
    decoder, prompts = run.infer.slot("decoder"), [list(example.ids[:4]) for example in run.data.pool[:24]]
    taken = looked_at = 0
    expected = variance = 0.0
    for number, prompt in enumerate(prompts):
        decoder.accepted.clear()
        (text,) = open_engine(run).generate([prompt], 1 + 5 * 4, set(), sampling=Sampling(), numbers=[number])
        chances = by_hand(run, run.role("teacher"), [*prompt, *text], len(prompt))
        place = 1  # the first is the teacher's own
        for count in decoder.accepted:
            here = chances[place : place + min(count + 1, 4)]  # those taken, and the one turned down
            taken, looked_at = taken + count, looked_at + len(here)
            expected, variance = expected + float(here.sum()), variance + float((here * (1 - here)).sum())
            place += count + 1
    assert looked_at > 200 and 0.1 < expected / looked_at < 0.95
    assert abs(taken - expected) < 3 * variance**0.5
    reading = probes.take("acceptance", run, SETTINGS)
    assert 0.1 < reading.metrics["acceptance"].value < 0.95


def test_its_drafts_are_measured_and_its_text_is_the_teachers() -> None:
    run = distilled()
    found = probes.take("drafts", run, {"speed_seconds": 0.1}).metrics
    assert 0 <= found["accepted_per_pass"].value <= 4
    prompts = [list(example.ids[:6]) for example in run.data.pool[:3]]
    assert open_engine(run).generate(prompts, 12, set()) == open_engine(run, run.role("teacher")).generate(
        prompts, 12, set()
    )


@pytest.mark.parametrize(("draft", "verifier"), [(96, 112), (112, 96)])
def test_rows_that_pad_a_vocabulary_are_neither_drafted_nor_taken(draft: int, verifier: int) -> None:
    run = taught(vocab_size=draft)
    run.shelve("teacher", toy(seed=1, **(SPREAD | {"vocab_size": verifier})), run.tokenizer)
    for model in (run.model, run.role("teacher")):
        model.lm_head.weight.data[96:] *= 30
    run.apply(parse_step("speculative(verifier='teacher')"))
    texts = open_engine(run).generate([[5, 6, 7], [9]], 20, set(), sampling=Sampling())
    assert max(map(max, texts)) < 96


@pytest.mark.parametrize("steps", ["speculative(verifier='model')", "speculative(verifier='mine')"])
def test_a_verifier_that_is_not_there_is_wrong_usage(steps: str) -> None:
    with pytest.raises(Usage):
        parse(steps).check_fits()
