"""GKD: the divergence is trl's, the student writes the share of the steps that lmbda says, and texts are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toys_texts import answered, at, draw_by_hand, find_terms, golden, taught, written
from toys_training import fit

from effbench import ops
from effbench.core.errors import Usage
from effbench.core.recipe import parse, parse_step
from effbench.core.views import Example
from effbench.methods.distill.gkd import GKD
from effbench.nn.infer.engine import Engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate, pack
from effbench.nn.train.samples import ask

GOLDEN = golden("trl_jsd")
ON = GKD(lmbda=1.0, new_tokens=6, prompt_tokens=4, teacher="teacher")


def write(run: ModelRun, method: GKD = ON, examples: list[Example] | None = None) -> list[tuple[list[int], list[int]]]:
    examples = answered(run) if examples is None else examples
    return written(method.batch(collate(examples, run.pad, run.device), run))


# The loss


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.1, 1.0), (0.5, 1.0), (0.1, 2.0)])
def test_the_divergence_and_its_gradient_are_trls(beta: float, temperature: float) -> None:
    kept = GOLDEN["labels"] != -100
    student = GOLDEN["student"].double().requires_grad_()
    teacher = GOLDEN["teacher"].double()
    loss = ops.load("generalized_jsd")(student[kept], teacher[kept], beta, temperature).mean()
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(float(GOLDEN[f"{beta}/{temperature}/loss"]), abs=1e-12)
    assert torch.allclose(gradient.float(), GOLDEN[f"{beta}/{temperature}/gradient"], atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_off_policy_at_an_end_of_beta_it_is_a_plain_kl(beta: float) -> None:
    """Written with probabilities, of the rows alone; the batch is the data's."""
    run = taught()
    run.model.double()
    run.role("teacher").double()
    method = GKD(lmbda=0.0, beta=beta, teacher="teacher")
    for batch in (collate(answered(run), 0, run.device), pack(answered(run), 32, 0, run.device)):
        assert method.batch(batch, run) is batch
        (loss,) = find_terms(run, method, batch).values()
        expected = []
        for example in answered(run):
            ids, prompt = torch.tensor([example.ids]), example.prompt
            p, q = (m(ids).logits[0, prompt - 1 : -1].softmax(-1) for m in (run.role("teacher"), run.model))
            a, b = (p, q) if beta == 0 else (q, p)
            expected.append((a * (a / b).log()).sum(-1))
        assert float(loss.detach()) == pytest.approx(float(torch.cat(expected).mean().detach()), abs=1e-10)


def test_alpha_weighs_cross_entropy_on_what_the_student_has_not_written() -> None:
    run = taught()
    batch = collate(answered(run), 0, run.device)
    whole = find_terms(run, GKD(lmbda=0.0, teacher="teacher"), batch)
    terms = find_terms(run, GKD(lmbda=0.0, alpha=0.7, teacher="teacher"), batch)
    logits = run.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    hard = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert whole.keys() == {"soft"} and terms.keys() == {"soft", "hard"}
    assert terms["soft"].item() == pytest.approx(0.7 * whole["soft"].item(), rel=1e-6)
    assert terms["hard"].item() == pytest.approx(0.3 * hard.item(), rel=1e-5)
    assert find_terms(run, GKD(lmbda=1.0, alpha=0.7, teacher="teacher"), batch).keys() == {"soft"}


# Whose texts


@pytest.mark.parametrize("lmbda", [0.0, 0.2, 1.0])
def test_lmbda_is_the_share_of_steps_that_the_student_writes(lmbda: float) -> None:
    """Not the teacher's: pi_mix = (1 - lmbda) pi_student + lmbda pi_teacher is the paper's turned round."""
    run, method = taught(), GKD(lmbda=lmbda, new_tokens=1, teacher="teacher")
    batch = collate(answered(run), 0, run.device)
    changed = [method.batch(batch, at(run, step)) is not batch for step in range(100)]
    assert abs(sum(changed) - 100 * lmbda) <= 3 * (100 * lmbda * (1 - lmbda)) ** 0.5


def test_the_student_writes_at_its_temperature_from_the_whole_softmax() -> None:
    run = taught()
    run.model.generation_config.update(top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.1)
    for example, (prompt, text) in zip(answered(run), write(run), strict=True):
        asked = ask(example, 4, 0, 0)
        assert prompt == asked.prompt == list(example.ids[: example.prompt])
        assert text == draw_by_hand(run, {run.model: 1.0}, asked, 6, 0.9)
        assert text != draw_by_hand(run, {run.role("teacher"): 1.0}, asked, 6, 0.9)
        assert text != draw_by_hand(run, {run.model: 1.0}, asked, 6, 0.2)


def test_texts_of_the_teacher_are_drawn_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *args, **more: calls.append(1) or generate(*args, **more))
    run, method = taught(), GKD(lmbda=0.0, source="teacher", new_tokens=6, teacher="teacher")
    plain = write(run, method)
    asked = [ask(example, 16, "gkd") for example in answered(run)]
    assert [text for _, text in plain] == [draw_by_hand(run, {run.role("teacher"): 1.0}, a, 6, 0.9) for a in asked]
    run.cache = tmp_path
    assert write(at(run, 7), method) == plain and len(calls) == 2
    assert write(at(run, 9), method) == plain and len(calls) == 2
    assert write(run, GKD(lmbda=0.0, source="teacher", temperature=0.5, teacher="teacher")) != plain


# How they are drawn


def test_a_text_depends_on_the_example_and_the_step_alone() -> None:
    """Not on its batch, its padding, the layout, or torch's own chance."""
    run = taught()
    together = write(run)
    torch.manual_seed(77)
    assert [write(run, examples=[example])[0] for example in answered(run)] == together
    assert write(run, examples=answered(run)[::-1]) == together[::-1]
    assert written(ON.batch(pack(answered(run), 64, run.pad, run.device), run)) == together
    twins = [Example(name, (5, 6, *rest), 2) for name, rest in (("a", (7, 8)), ("b", (9, 8)), ("c", (7, 8)))]
    (_, one), (_, other), (_, again) = write(run, examples=twins)
    assert one == again != other  # one prompt, and two examples
    assert write(at(run, 1)) != together
    run.seed = 1
    assert write(at(run, 0)) != together


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_dropout_takes_no_part_in_texts_and_modes_are_restored(architecture: str) -> None:
    run = taught(architecture)
    still = write(run)
    run.model.train()
    odd = Blocks(run.model).blocks[0]
    odd.eval()  # a mode of its own, as of a frozen part
    modes = [module.training for module in run.model.modules()]
    assert write(run) == still
    assert [module.training for module in run.model.modules()] == modes and not odd.training
    assert not any(parameter.grad is not None for parameter in run.model.parameters())


@pytest.mark.parametrize("steps", ["prompt_tuning()", "prefix_tuning()", "lora()"])
def test_what_stands_beside_the_model_is_read_in_cached_texts(steps: str) -> None:
    run = taught()
    (before,) = write(run, examples=answered(run)[:1])
    run.apply(parse_step(steps))
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    (after,) = write(run, examples=answered(run)[:1])
    assert after != before
    assert after[1] == draw_by_hand(run, {run.model: 1.0}, ask(answered(run)[0], 4, 0, 0), 6, 0.9)


def test_rows_that_pad_the_vocabulary_are_never_drawn() -> None:
    run = taught(vocab_size=112)
    run.model.lm_head.weight.data[96:] *= 30
    texts = write(run, examples=[Example(str(i), example.ids) for i, example in enumerate(run.data.pool)])
    assert max(token for _, text in texts for token in text) < 96


def test_plain_texts_are_gone_on_with_and_texts_end_with_their_end() -> None:
    run = taught()
    plain = [Example("plain", tuple(range(1, 20))), Example("short", (5, 6))]
    (prompt, text), (short, _) = write(run, examples=plain)
    assert prompt == [1, 2, 3, 4] and short == [5] and len(text) == 6
    run.model.lm_head.weight.data[0] = 100 * run.model.lm_head.weight.data[text[0]]  # the end takes that one's place
    (_, ended), _ = write(run, examples=plain)
    assert ended == [0]


def test_no_text_is_longer_than_the_positions() -> None:
    run = taught()
    long = Example("long", tuple(range(1, 96)) * 2 + tuple(range(1, 65)), 253)
    (_, text), (_, other) = write(run, examples=[long, *answered(run)[:1]])
    assert len(text) == 3 and len(other) == 6
    assert write(run, examples=[long])[0][1] == text


@pytest.mark.parametrize(
    "steps", ["bf16(), {}", "checkpointing(), {}", "prompt_tuning(length=3), {}", "nf4(), lora(), {}", "{}"]
)
def test_it_trains_beside_others(steps: str) -> None:
    run = taught()
    for step in parse(steps.format(f"{ON}, fit()")).steps[:-1]:
        run.apply(step)
    report = fit(run, steps=3, layout="packed")
    assert torch.isfinite(torch.tensor(report["loss_last"])) and report["loss_last"] != report["loss_first"]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_how_a_step_is_cut_changes_nothing(accumulate: int) -> None:
    whole, cut = taught(), taught()
    for run in (whole, cut):
        run.apply(ON)
    fit(whole, steps=3)
    fit(cut, steps=3, accumulate=accumulate)
    for mine, theirs in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [{"lmbda": 1.5}, {"beta": -0.1}, {"temperature": 0}, {"new_tokens": 0}, {"teacher": "model"}, {"source": "both"}],
)
def test_settings_that_no_data_can_make_right(settings: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        GKD(**settings)
