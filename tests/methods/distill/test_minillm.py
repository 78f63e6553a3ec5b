"""MiniLLM: its terms are trl's and the authors' formulas written out, and rows are the same alone and padded."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_texts import answered, draw_by_hand, find_terms, golden, taught, written
from toys_training import fit

from effbench import ops
from effbench.checks import probe_model
from effbench.core.errors import Usage
from effbench.core.run import Run
from effbench.methods.distill.minillm import MiniLLM
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.infer.mixture import Mixture
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate, pack
from effbench.nn.train.samples import ask

GOLDEN = golden("minillm")
OURS = MiniLLM(new_tokens=6, prompt_tokens=4, teacher="teacher")


# The terms


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("norm", {"gamma": 1.0}),
        ("sum", {"gamma": 1.0, "length_norm": False}),
        ("none", {"gamma": 0.0, "length_norm": False}),
    ],
)
def test_advantages_are_trls(name: str, settings: dict[str, Any]) -> None:
    """Where trl discounts it divides by discounted lengths, which the authors do not."""
    method = MiniLLM(reward_scale=1.0, **settings)
    tokens = GOLDEN["tokens"][..., None]
    q, p = (GOLDEN[who].log_softmax(-1).gather(-1, tokens)[..., 0] for who in ("student", "teacher"))
    found = torch.stack([method.advantages(rewards) for rewards in p - q])
    assert torch.allclose(found, GOLDEN[f"advantage.{name}"], atol=1e-6)  # trl computes some of it in float32


def test_the_single_step_is_trls() -> None:
    found = ops.load("generalized_jsd")(GOLDEN["student"].flatten(0, 1), GOLDEN["teacher"].flatten(0, 1), 1.0, 1.0)
    assert float(found.mean()) == pytest.approx(float(GOLDEN["single"]), abs=1e-12)


def test_the_gradient_of_the_paper_is_that_of_reverse_kl_over_texts() -> None:
    """Of all texts of two tokens by two tables of logits, each as often as the student writes it."""
    generator = torch.Generator().manual_seed(0)
    z1, z2, v1, v2 = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5,), (5, 5)) * 2)
    student = [z1.requires_grad_(), z2.requires_grad_()]
    log_q, log_p = (a.log_softmax(-1)[:, None] + b.log_softmax(-1) for a, b in ((z1, z2), (v1, v2)))
    exact = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), student)
    method = MiniLLM(variant="paper", gamma=1.0, reward_scale=1.0, length_norm=False, teacher_mix=0.0)
    losses = []
    for one, other in itertools.product(range(5), repeat=2):
        logits, theirs = torch.stack([z1, z2[one]]), torch.stack([v1, v2[one]])
        tokens, ones = torch.tensor([one, other]), torch.ones(2, dtype=torch.float64)
        old, teacher = (z.log_softmax(-1).gather(1, tokens[:, None])[:, 0].detach() for z in (logits, theirs))
        gain = method.advantages(teacher - old)
        long = ops.load("clipped_policy")(logits, tokens, old, gain, ones, 0.2, 1.0)
        single = ops.load("generalized_jsd")(logits, theirs, 1.0, 1.0)
        losses.append(old.sum().exp() * (long + single).sum())
    for found, expected in zip(torch.autograd.grad(torch.stack(losses).sum(), student), exact, strict=True):
        assert torch.allclose(found, expected, atol=1e-12)


@torch.no_grad()
def expect(run: ModelRun, old: Any, method: MiniLLM, texts: list[tuple[list[int], list[int]]]) -> dict[str, float]:
    """The terms in float64, row by row and token by token; `old` is the student that the texts are of."""
    rows: list[list[dict[str, Any]]] = []
    for prompt, text in texts:
        ids = torch.tensor([[*prompt, *text]])
        logprobs = [m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (old, run.role("teacher"))]
        now = run.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        rewards = [float(logprobs[1][t, y] - logprobs[0][t, y]) / method.reward_scale for t, y in enumerate(text)]
        row = []
        for t, y in enumerate(text):
            first = t if method.variant == "program" else t + 1
            ahead = rewards[first:]
            advantage = sum(method.gamma**i * reward for i, reward in enumerate(ahead)) / max(1, len(ahead))
            q, p = float(logprobs[0][t, y].exp()), float(logprobs[1][t, y].exp())
            w = q / ((1 - method.teacher_mix) * q + method.teacher_mix * p)
            single = float((now[t].exp() * (now[t] - logprobs[1][t])).sum())
            row.append({"A": advantage, "w": w, "ratio": w * float(now[t, y].exp()) / q, "single": single})
        rows.append(row)
    tokens = [token for row in rows for token in row]
    advantages = [token["A"] for token in tokens]
    if method.variant == "program":
        mean = sum(advantages) / len(tokens)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(tokens) + 1e-8)
        advantages = [(a - mean) / deviation for a in advantages]
    bounded = [min(max(token["ratio"], 1 - method.clip), 1 + method.clip) for token in tokens]
    long = [max(-a * t["ratio"], -a * b) for a, t, b in zip(advantages, tokens, bounded, strict=True)]
    single = [t["single"] * (t["w"] if method.variant == "paper" else 1.0) for t in tokens]
    plain = []
    for example in answered(run):
        logits = run.model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        plain += [-float(logits[i - 1, example.ids[i]]) for i in range(example.prompt, len(example.ids))]
    return {
        "long": sum(long) / len(tokens),
        "single": sum(single) / len(tokens),
        "pretraining": method.lm_coef * sum(plain) / len(plain),
    }


VARIANTS = [
    {},
    {"teacher_mix": 0.0},
    {"variant": "paper", "gamma": 1.0, "reward_scale": 1.0},
    {"lm_coef": 0.5, "gamma": 0.9, "clip": 0.05},
]


def begun(settings: dict[str, Any], layout: str = "padded") -> tuple[ModelRun, MiniLLM, dict[str, Tensor], Any]:
    """A run in float64 whose student has moved since it wrote the texts of the batch, and what it was then."""
    run, method = taught(), dataclasses.replace(OURS, **settings)
    run.model.double()
    run.role("teacher").double()
    old = run.reference.double()
    data = answered(run)
    batch = collate(data, 0, run.device) if layout == "padded" else pack(data, 64, 0, run.device)
    batch = method.batch(batch, run)
    for parameter in run.model.parameters():
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return run, method, batch, old


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_terms_are_the_authors_written_out(settings: dict[str, Any], layout: str) -> None:
    """Rewards, lengths and losses of rows that are padded are those of the rows alone."""
    run, method, batch, old = begun(settings, layout)
    texts = written({name: batch[name][:3] for name in ("example", "input_ids", "labels")})
    assert len({len(prompt) + len(text) for prompt, text in texts}) > 1
    terms = {name: float(term.detach()) for name, term in find_terms(run, method, batch).items()}
    expected = expect(run, old, method, texts)
    assert terms == pytest.approx(expected, rel=1e-9, abs=1e-12)
    free = find_terms(run, dataclasses.replace(method, clip=0.99), batch)
    assert free["long"].item() != pytest.approx(terms["long"], rel=1e-3)  # some ratios were clipped


def test_parts_of_a_step_add_up() -> None:
    """Each kind of token is averaged over the whole step, and advantages are whitened over it."""
    run, method, whole, _ = begun({})
    total = {name: float(term.detach()) for name, term in find_terms(run, method, whole).items()}
    cut, sums, counts = taught(), dict.fromkeys(total, 0.0), []
    cut.model.double()
    cut.role("teacher").double()
    parts = [method.batch(collate(part, 0, cut.device), cut) for part in (answered(cut)[:1], answered(cut)[1:])]
    tally = torch.stack([part["tally"] for part in parts]).sum(0)
    assert torch.allclose(tally, whole["tally"])
    for part in parts:
        share = float(part["tally"][3] / tally[3])
        counts.append(share)
        for name, term in find_terms(run, method, part | {"tally": tally}).items():
            sums[name] += share * float(term.detach())
    assert sum(counts) == pytest.approx(1) and sums == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_how_a_step_is_cut_changes_nothing(accumulate: int) -> None:
    whole, cut = taught(), taught()
    for run in (whole, cut):
        run.apply(OURS)
    fit(whole, steps=3)
    fit(cut, steps=3, accumulate=accumulate)
    assert torch.allclose(probe_model(cut.model), probe_model(whole.model), atol=2e-3)


# The texts


def test_a_mixture_predicts_both_models_shares() -> None:
    run = taught("opt")
    engines = open_engine(run, run.model), open_engine(run, run.role("teacher"))
    mixture = Mixture(*engines, 0.3, 0.7)
    prompts = [[5, 6, 7, 8], [9, 10]]
    state, last = mixture.read(prompts)
    for ids in ([3, 4], [50, 60]):
        mixed = (mixture.head(last) / 0.7).softmax(-1)
        q, p = ((engine.head(engine.read(prompts)[1]) / 0.7).softmax(-1) for engine in engines)
        assert torch.allclose(mixed, 0.7 * q + 0.3 * p, atol=1e-6)
        last = mixture.extend(state, torch.tensor(ids)[:, None]).last_hidden_state[:, -1]
        prompts = [[*prompt, token] for prompt, token in zip(prompts, ids, strict=True)]


@pytest.mark.parametrize("mix", [0.0, 0.2, 0.9])
def test_every_token_is_drawn_from_the_mixture(mix: float) -> None:
    run = taught()
    batch = dataclasses.replace(OURS, teacher_mix=mix).batch(collate(answered(run), 0, run.device), run)
    texts = written({name: batch[name][:3] for name in ("example", "input_ids", "labels")})
    models = {run.model: 1 - mix, run.role("teacher"): mix}
    for example, (prompt, text) in zip(answered(run), texts, strict=True):
        assert prompt == list(example.ids[: example.prompt])
        assert text == draw_by_hand(run, models, ask(example, 4, 0, 0), 6, 1.0)
    data = written({name: batch[name][3:] for name in ("example", "input_ids", "labels")})
    assert [(*prompt, *rest) for prompt, rest in data] == [example.ids for example in answered(run)]


def test_a_batch_of_texts_serves_its_epochs_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda *args, **more: calls.append(1) or generate(*args, **more))
    read: list[Tensor] = []

    class Watch:
        def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
            read.append(batch["input_ids"])
            return batch

    run = taught()
    run.apply(dataclasses.replace(OURS, epochs=3))
    run.train.chain("batch").append(Watch())
    fit(run, steps=7)
    assert len(calls) == 3
    same = [torch.equal(a, b) for a, b in itertools.pairwise(read)]
    assert same == [True, True, False, True, True, False]


def test_dropout_takes_no_part_in_texts_and_modes_are_restored() -> None:
    run = taught("gpt2")
    batch = collate(answered(run), 0, run.device)
    still = OURS.batch(batch, run)
    run.model.train()
    modes = [module.training for module in run.model.modules()]
    again = dataclasses.replace(OURS, gamma=0.94).batch(batch, run)  # another step of the recipe, without its state
    for name in ("input_ids", "old", "w"):
        assert torch.equal(still[name], again[name])
    assert [module.training for module in run.model.modules()] == modes


@pytest.mark.parametrize("single_step", [True, False])
def test_terms_that_are_left_out_are_not_there(single_step: bool) -> None:
    run, _, batch, _ = begun({})
    method = dataclasses.replace(OURS, single_step=single_step, lm_coef=0.0)
    assert find_terms(run, method, batch).keys() == {"long"} | ({"single"} if single_step else set())


@pytest.mark.parametrize(
    "settings",
    [{"teacher_mix": 1.0}, {"gamma": 1.1}, {"clip": 0}, {"epochs": 0}, {"lm_coef": -1}, {"teacher": "model"}],
)
def test_settings_that_no_data_can_make_right(settings: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        MiniLLM(**settings)
