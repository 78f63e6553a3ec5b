"""SeqKD: the teacher writes once behind each prompt, and a fit on that is a plain fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys_texts import answered, draw_by_hand, taught
from toys_training import fit

from effbench.core.errors import Usage
from effbench.core.recipe import parse
from effbench.core.views import Example
from effbench.methods.distill.seq_kd import SeqKD
from effbench.nn.infer.engine import Engine
from effbench.nn.model.feed import feed
from effbench.nn.run import ModelRun
from effbench.nn.train.samples import ask

OURS = SeqKD(new_tokens=4, prompt_tokens=4, beams=2, teacher="teacher")


def begun(method: SeqKD = OURS, cache: Path | None = None, **shape: Any) -> ModelRun:
    run = taught(**shape)
    run.cache = cache
    run.data.train = [*answered(run), run.data.pool[5]]
    run.apply(method)
    return run


def find_likeliest(run: ModelRun, prompt: list[int], most: int, beams: int) -> tuple[int, ...]:
    """A beam search over whole texts, each read anew; scores over lengths."""
    going: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for step in range(most):
        grown = []
        for score, text in going:
            logits = feed(run.role("teacher"), {"input_ids": torch.tensor([[*prompt, *text]])}).logits[0, -1]
            grown += [(score + float(more), (*text, token)) for token, more in enumerate(logits.log_softmax(-1))]
        grown = sorted(grown, reverse=True)[: 2 * beams]
        last = step == most - 1
        ended += [(s / (step + 1), t) for s, t in grown[:beams] if last or t[-1] == run.tokenizer.eos_token_id]
        going = [(s, t) for s, t in grown if t[-1] != run.tokenizer.eos_token_id][:beams]
    return max(ended)[1]


@torch.no_grad()
def test_the_teacher_writes_its_likeliest_text_behind_every_prompt() -> None:
    run = begun()
    for example, old in zip(run.data.train, [*answered(run), run.data.pool[5]], strict=True):
        prompt = list(old.ids[: old.prompt or 4])
        assert example.id == old.id and example.prompt == len(prompt)
        assert list(example.ids[: len(prompt)]) == prompt
        assert example.ids[len(prompt) :] == find_likeliest(run, prompt, 4, 2) != old.ids[len(prompt) :][:4]


def test_it_may_draw_its_text_instead() -> None:
    run = begun(SeqKD(temperature=0.7, new_tokens=6, teacher="teacher"))
    for example, old in zip(run.data.train[:3], answered(run), strict=True):
        asked = ask(old, 16, "seq_kd")
        assert list(example.ids[example.prompt :]) == draw_by_hand(run, {run.role("teacher"): 1.0}, asked, 6, 0.7)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_fit_on_it_is_a_plain_fit_on_the_pairs(layout: str) -> None:
    run, plain = begun(), taught()
    plain.data.train = [Example(e.id, e.ids, e.prompt) for e in run.data.train]
    report, expected = (fit(one, steps=4, layout=layout) for one in (run, plain))
    for mine, theirs in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert report["tokens"] == expected["tokens"] and report["available_tokens"] == expected["available_tokens"]


def test_texts_are_kept_on_disk_by_what_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    search = Engine.search
    monkeypatch.setattr(
        Engine, "search", lambda engine, prompts, *more: asked.append(len(prompts)) or search(engine, prompts, *more)
    )
    first = begun(cache=tmp_path).data.train
    again = begun(cache=tmp_path)
    assert again.data.train == first and asked == [4]
    again.data.train = [again.data.pool[6], again.data.pool[5]]
    again.apply(OURS)
    assert asked == [4, 1] and again.data.train[1] == first[3]
    begun(SeqKD(new_tokens=4, prompt_tokens=4, beams=3, teacher="teacher"), tmp_path)
    other = taught(teacher=2)
    other.cache, other.data.train = tmp_path, answered(other)
    other.apply(OURS)
    assert asked == [4, 1, 4, 3]
    begun(SeqKD(new_tokens=4, prompt_tokens=5, beams=2, teacher="teacher"), tmp_path)  # one example has no prompt
    assert asked == [4, 1, 4, 3, 1]
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    assert begun(cache=tmp_path).data.train == first and asked == [4, 1, 4, 3, 1, 4]


def test_rows_that_pad_the_vocabulary_are_never_written() -> None:
    run = taught(vocab_size=112)
    run.role("teacher").lm_head.weight.data[96:] *= 30
    run.apply(OURS)
    assert len(run.data.train) == 64 and max(max(example.ids) for example in run.data.train) < 96


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("seq_kd()", "acts through the fit that follows it, and none does"),
        ("seq_kd(teacher='mine'), fit()", "no step before it makes a model called 'mine'"),
        ("seq_kd(beams=0), fit()", "beams must be at least 1"),
        ("seq_kd(temperature=0), fit()", "temperature must be above 0"),
        ("seq_kd(teacher='model'), fit()", "nothing to teach itself"),
    ],
)
def test_recipes_that_cannot_work_are_wrong_usage(steps: str, message: str) -> None:
    with pytest.raises(Usage, match=message):
        parse(steps).check_fits()
