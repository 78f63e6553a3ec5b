"""Acquisitions: their scores against baal and by hand, the ensembles of BALD, and what they must not see."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from effbench.checks import toy_run
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.kinds import Select
from effbench.core.recipe import parse_step
from effbench.core.views import Example, Segments
from effbench.methods.select._acquisition import Acquisition, Row, draw_kept, thin
from effbench.methods.select.bald import BALD
from effbench.methods.select.entropy import Entropy
from effbench.methods.select.variation_ratio import VariationRatio
from effbench.nn.model.blocks import Blocks
from effbench.nn.run import ModelRun
from effbench.nn.train import passes
from effbench.nn.train.examples import measure_losses
from effbench.nn.train.unlabelled import withhold

BAAL = load_file(Path(__file__).parent.parent.parent / "golden" / "baal.safetensors")


def asking(architecture: str = "llama", seed: int = 0) -> ModelRun:
    """A run whose texts begin with prompts of unlike lengths."""
    run = toy_run(architecture, seed=seed)
    run.data.pool = [
        dataclasses.replace(e, prompt=5 + place % 7, text="words", meta={"label": 1}, segments=Segments("x"))
        for place, e in enumerate(run.data.pool)
    ]
    return run


def score(method: Acquisition, run: ModelRun, first: int = 16) -> Tensor:
    return method.score(withhold(run.data.pool[:first]), run)


def predict(model: nn.Module, ids: Sequence[int]) -> Tensor:
    """[T, V] float64 probabilities behind each token of a text."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().softmax(-1)


def entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def test_scores_are_those_of_baal() -> None:
    members = [*BAAL["logits"].unbind(-1)]
    torch.testing.assert_close(BALD().judge(members), BAAL["bald"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(Entropy().judge(members[:1]), BAAL["entropy"], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(VariationRatio().judge(members[:1]), 1 - BAAL["certainty"], rtol=1e-12, atol=1e-14)


def test_the_first_term_of_bald_is_the_entropy_of_the_mean_prediction() -> None:
    sure = torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([[0.0, 60.0, 0.0]])
    unsure = torch.zeros(1, 3)
    assert float(BALD().judge(sure)) == pytest.approx(torch.tensor(2.0).log().item())
    assert float(BALD().judge([unsure, unsure])) == pytest.approx(0.0, abs=1e-12)
    # With the entropy of one prediction in its place two members that are sure of unlike tokens have a score of 0,
    # and one that is sure makes that of one that is not negative.
    assert float(BALD().judge([sure[0], unsure])) > 0.1


@pytest.mark.parametrize(
    ("settings", "expected"), [("entropy()", entropy), ("variation_ratio()", lambda p: 1 - p.max())]
)
def test_the_distribution_is_that_of_the_first_token_behind_the_prompt(
    settings: str, expected: Callable[[Tensor], Tensor]
) -> None:
    run = asking()
    found = score(parse_step(settings), run)  # type: ignore[arg-type]
    for value, example in zip(found.tolist(), run.data.pool, strict=False):
        assert value == pytest.approx(float(expected(predict(run.model, example.ids[: example.prompt])[-1])), rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt"])
def test_dropout_is_a_mask_on_the_rows_of_the_weights_behind_attention_and_mlp(architecture: str) -> None:
    run = asking(architecture)
    method = BALD(samples=3, rate=0.3)
    members = []
    for member in range(3):
        model = copy.deepcopy(run.model)
        names = Blocks(model).names
        for number, block in enumerate(Blocks(model).blocks):
            for inside in (names.out, names.down):
                linear: Any = block.get_submodule(inside)
                kept = draw_kept(128, 0.3, run.seed, member, f"{names.blocks}.{number}.{inside}") / 0.7
                linear.weight.data *= kept if architecture == "gpt2" else kept[:, None]
                if linear.bias is not None:
                    linear.bias.data *= kept
        members.append(model)
    found = score(method, run)
    for value, example in zip(found.tolist(), run.data.pool, strict=False):
        ps = torch.stack([predict(model, example.ids[: example.prompt])[-1] for model in members])
        assert value == pytest.approx(float(entropy(ps.mean(0)) - entropy(ps).mean()), rel=1e-3, abs=1e-7)
    assert found.min() > 1e-5
    assert not any(module._forward_hooks for module in run.model.modules())


def test_a_mask_drops_its_rate_and_is_another_in_each_pass_and_place() -> None:
    masks = [draw_kept(1000, 0.25, 0, member, place) for member in range(3) for place in "ab"]
    assert all(0.7 < float(mask.float().mean()) < 0.8 for mask in masks)
    assert all(0.5 < float((masks[0] == mask).float().mean()) < 0.75 for mask in masks[1:])


@pytest.mark.parametrize("settings", [{}, {"ensemble": "prompts"}, {"over": "sampled", "answers": 2, "new_tokens": 4}])
def test_a_score_does_not_depend_on_company_and_belongs_to_the_seed(settings: dict[str, Any]) -> None:
    run = asking()
    method = BALD(samples=4, **settings)
    together = score(method, run)
    torch.manual_seed(3)
    alone = torch.cat([method.score(withhold([example]), run) for example in run.data.pool[:16]])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-7)
    other = asking()
    other.seed = 1
    assert not torch.allclose(together, score(method, other), rtol=1e-2)


def test_an_ensemble_of_prompts_leaves_words_out() -> None:
    run = asking()
    row = Row(0, tuple(range(1, 90)), (5, 6))
    rows = [thin(row, 0.2, run, member) for member in range(20)]
    assert all(row.prompt[0] == 1 and row.prompt[-1] == 89 and row.text == (5, 6) for row in rows)
    assert all(sorted(set(row.prompt)) == list(row.prompt) for row in rows)
    assert 0.75 < sum(len(row.prompt) for row in rows) / (20 * 89) < 0.85 and len({row.prompt for row in rows}) == 20
    assert thin(Row(0, (7,)), 0.9, run, 0).prompt == (7,)
    found = score(BALD(ensemble="prompts", samples=3, rate=0.3), run)
    for value, example in zip(found.tolist(), run.data.pool, strict=False):
        shown = [thin(Row(0, example.ids[: example.prompt]), 0.3, run, member).prompt for member in range(3)]
        ps = torch.stack([predict(run.model, prompt)[-1] for prompt in shown])
        assert value == pytest.approx(float(entropy(ps.mean(0)) - entropy(ps).mean()), rel=1e-3, abs=1e-6)


def test_over_sampled_answers_the_score_is_a_mean_over_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    run = asking()
    texts = [(4, 5, 6, 7), (8,)]  # unlike in length, so that the mean over tokens is not that over answers
    asked: list[Any] = []

    def write(run: Any, engine: Any, given: Any, new_tokens: int, temperature: float) -> list[tuple[int, ...]]:
        asked.extend(given)
        return texts * (len(given) // 2)

    monkeypatch.setattr("effbench.methods.select._acquisition.sample", write)
    found = score(Entropy(over="sampled", answers=2), run, 3)
    assert len({name for _, name in asked}) == 6
    for value, example in zip(found.tolist(), run.data.pool, strict=False):
        prompt = example.ids[: example.prompt]
        parts = [entropy(predict(run.model, (*prompt, *text[:-1]))[len(prompt) - 1 :]) for text in texts]
        assert [len(part) for part in parts] == [4, 1]
        assert value == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)


def test_answers_are_another_draw_in_each_round() -> None:
    run = asking()
    method = Entropy(over="sampled", answers=1, new_tokens=4)
    first = score(method, run)
    assert torch.equal(first, score(method, run))
    run.log.fits.append({})  # type: ignore[typeddict-item]
    assert not torch.equal(first, score(method, run))


# What they see


@pytest.mark.parametrize("method", [BALD(samples=2), Entropy(over="sampled", answers=1, new_tokens=2)])
def test_other_answers_change_nothing(method: Acquisition) -> None:
    run, other = asking(), asking()
    other.data.pool = [
        dataclasses.replace(e, ids=(*e.ids[: e.prompt], *reversed(e.ids[e.prompt :]))) for e in other.data.pool
    ]
    for each in (run, other):
        each.apply(method)
    assert [e.id for e in run.data.train] == [e.id for e in other.data.train]
    assert len(run.data.train) == 13  # a fifth of 64
    assert all(len(e.ids) == 32 and e.prompt and e.meta == {"label": 1} for e in run.data.train)  # told to the fit


def take_meta(examples: Sequence[Example], run: Any) -> Tensor:
    return torch.tensor([float(example.meta.get("label", 0)) for example in examples])


def take_pool(examples: Sequence[Example], run: Any) -> Tensor:
    whole = {example.id: example for example in run.data.pool}
    return measure_losses(run, run.model, [whole[example.id] for example in examples])


def take_train(examples: Sequence[Example], run: Any) -> Tensor:
    return measure_losses(run, run.model, run.data.train)


def take_documents(examples: Sequence[Example], run: Any) -> Tensor:
    return torch.tensor([float(len(text)) for text in run.data.documents("train")])


def take_calibration(examples: Sequence[Example], run: Any) -> Tensor:
    return torch.tensor([float(len(text)) for text in run.data.documents("calibration")])


def take_heldout(examples: Sequence[Example], run: Any) -> Tensor:
    return torch.tensor([float(len(example.ids)) for example in run.data.unseen])


CHEATS = [take_meta, take_pool, take_train, take_documents, take_calibration, take_heldout]


@pytest.mark.parametrize("cheat", CHEATS)
def test_an_acquisition_that_looks_at_answers_is_refused(cheat: Callable[..., Tensor]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Cheat(Select):
        blind = True

        def score(self, examples: Sequence[Example], run: Any) -> Tensor:
            return cheat(examples, run)

    run = asking()
    with pytest.raises(Refused, match="must not look at"):
        run.apply(Cheat())
    assert len(run.data.train) == len(run.data.pool) == 64  # open again


def test_nothing_of_an_answer_is_in_what_is_shown() -> None:
    run = asking()
    for shown, whole in zip(withhold(run.data.pool), run.data.pool, strict=True):
        assert shown.ids == whole.ids[: whole.prompt] and shown.text == "x" and shown.id == whole.id
        with pytest.raises(Refused):
            bool(shown.meta)


def test_a_pool_without_prompts_is_unsupported() -> None:
    run = asking()
    run.data.pool = [*run.data.pool[:5], dataclasses.replace(run.data.pool[5], prompt=0)]
    with pytest.raises(Unsupported, match=r"^1 of 6 training examples have no prompt, such as '5'.*data=tiny:task$"):
        Select.apply(Entropy(), run)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("bald(samples=1)", "samples must be at least 2"),
        ("bald(rate=0.0)", r"rate must be in \(0, 1\)"),
        ("entropy(answers=0)", "answers and new_tokens must be at least 1"),
        ("bald(ensemble='dropouts')", "must be one of 'dropout', 'prompts'"),
        ("entropy(keep=0.0)", "keep is a share"),
    ],
)
def test_settings_that_mean_nothing_are_wrong_usage(steps: str, reason: str) -> None:
    with pytest.raises(Usage, match=reason):
        parse_step(steps)


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("method", [Entropy(), BALD(samples=2)])
def test_a_killed_one_reads_on_to_the_same_scores(
    method: Acquisition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "EVERY", 0.0)
    monkeypatch.setattr("effbench.nn.train.examples.TOKENS", 32)
    whole, killed, again = score(method, asking()), asking(), asking()
    read: list[int] = []
    killed.folder = again.folder = tmp_path

    def stop(unit: str, done: int, total: int) -> None:
        if done > total // 2:
            raise Killed

    killed.progress = stop
    with pytest.raises(Killed):
        score(method, killed)
    again.progress = lambda unit, done, total: read.append(done)
    assert torch.equal(score(method, again), whole) and read[0] > 8
