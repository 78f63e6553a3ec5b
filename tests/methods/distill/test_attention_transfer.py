"""Attention transfer: errors of scores and of probabilities, head by head, over the pairs that a causal model has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_distill import EXAMPLES, check_layouts, layouts, pair, read_blocks, terms
from toys_training import fit

from effbench.checks import toy, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.methods.distill.attention_transfer import AttentionTransfer, match_heads
from effbench.methods.distill.feature_kd import FeatureKD
from effbench.methods.distill.kd import KD
from effbench.methods.distill.snapshot import Snapshot
from effbench.methods.distill.student import Student
from effbench.methods.train.checkpointing import Checkpointing
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate
from effbench.nn.train.outputs import Roles

COUNTS = [e.weight * (len(e.ids) - max(1, e.prompt)) for e in EXAMPLES]


def mean(values: list[float]) -> float:
    """Of the examples, by their learned tokens."""
    return sum(n * value for n, value in zip(COUNTS, values, strict=True)) / sum(COUNTS)


def gpt2_scores(model: Any, ids: tuple[int, ...]) -> list[Tensor]:
    """[H, T, T] q k / sqrt(d) of each block, from the weights."""
    inputs: list[Tensor] = []
    hooks = [block.ln_1.register_forward_hook(lambda *x: inputs.append(x[2][0])) for block in model.transformer.h]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    found = []
    for x, block in zip(inputs, model.transformer.h, strict=True):
        heads = block.attn.num_heads
        wide = x @ block.attn.c_attn.weight.detach() + block.attn.c_attn.bias.detach()
        q, k, _ = (part.view(len(ids), heads, -1).transpose(0, 1) for part in wide.chunk(3, -1))
        found.append(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]))
    return found


@pytest.mark.parametrize(("layers", "places"), [(None, [1, 3]), ((0, 2), [0, 2])])
def test_the_loss_is_the_mean_error_of_the_scores(layers: Any, places: list[int]) -> None:
    run = pair("gpt2")
    method = AttentionTransfer(teacher="teacher", beta=0.3, layers=layers)
    errors: list[list[float]] = [[], []]
    for example in EXAMPLES:
        a, b = (gpt2_scores(run.role(role), example.ids) for role in ("model", "teacher"))
        here = torch.ones(len(example.ids), len(example.ids)).tril().bool()
        for layer, place in enumerate(places):
            errors[layer].append(float((a[layer] - b[place])[:, here].square().mean()))
    expected = [mean(values) for values in errors]
    for name, batch in layouts(run).items():
        (found,) = terms(run, method, batch).values()
        assert float(found.detach()) == pytest.approx(0.3 * sum(expected), rel=1e-9), name
        assert [float(run.watched[f"layer_{i}"].detach()) for i in range(2)] == pytest.approx(expected, rel=1e-9)


def test_of_probabilities_it_is_the_squared_frobenius_norm() -> None:
    """As transformers' eager attention gives them, where queries share keys."""
    run = pair("qwen2")
    method = AttentionTransfer(teacher="teacher", scores="probabilities")
    values = []
    for example in EXAMPLES:
        maps = []
        for role in ("model", "teacher"):
            model = run.role(role)
            model.set_attn_implementation("eager")
            maps.append(model(torch.tensor([example.ids]), output_attentions=True).attentions)
            model.set_attn_implementation("sdpa")
        values.append(
            sum(float((maps[0][i] - maps[1][place]).detach().square().sum()) for i, place in enumerate((1, 3)))
        )
    for name, batch in layouts(run).items():
        (found,) = terms(run, method, batch).values()
        # Eager attention takes its softmax in float32.
        assert float(found.detach()) == pytest.approx(mean(values), rel=1e-5), name


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_attention_is_the_softmax_of_the_scores(architecture: str) -> None:
    run = toy_run(architecture, shape={"sliding_window": 6} if architecture == "mistral" else None)
    both = [AttentionTransfer(teacher="reference", scores=scores) for scores in ("logits", "probabilities")]  # type: ignore[arg-type]
    roles = Roles(run, both)
    batch = collate(EXAMPLES, 0, run.device)
    with run.reading(roles), roles.open():
        out = roles.feed(batch)
    assert len(out.scores) == 2
    for scores, weights in zip(out.scores, out.attention, strict=True):
        real = batch["example"] >= 0
        assert torch.equal(scores.softmax(-1).transpose(1, 2)[real], weights.transpose(1, 2)[real])
        spread = scores.transpose(1, 2)[real]
        assert float(spread[spread.isfinite()].detach().std()) > 0.01


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_a_copy_has_no_error(architecture: str, scores: Any) -> None:
    run = toy_run(architecture)
    run.apply(Snapshot())
    (found,) = terms(run, AttentionTransfer(teacher="teacher", scores=scores), layouts(run)["right"]).values()
    assert float(found.detach()) == 0.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_layouts_are_alike(architecture: str, scores: Any) -> None:
    check_layouts(pair(architecture), AttentionTransfer(teacher="teacher", scores=scores))


def test_what_a_window_hides_does_not_count() -> None:
    """Pairs that only one of the two sees have no two scores to compare."""
    run = pair("mistral")
    whole = float(terms(run, AttentionTransfer(teacher="teacher"), layouts(run)["right"])["attention"].detach())
    run.shelve("teacher", toy("mistral", layers=4, seed=3, sliding_window=5).double(), run.tokenizer)
    batch = layouts(run)["right"]
    found = terms(run, AttentionTransfer(teacher="teacher"), batch)["attention"]
    gradients = torch.autograd.grad(found, run.model.model.layers[0].self_attn.q_proj.weight)
    assert math.isfinite(float(found.detach())) and float(found.detach()) != whole
    assert torch.isfinite(gradients[0]).all() and bool(gradients[0].any())
    with pytest.raises(Unsupported, match="teacher attends 5 tokens back, packed rows have 29"):
        terms(run, AttentionTransfer(teacher="teacher"), layouts(run)["packed"])


# Heads


def test_fewer_heads_follow_the_mean_of_a_group() -> None:
    attention = torch.randn(2, 6, 5, 5)
    grouped = match_heads(attention, 2)
    assert torch.allclose(grouped[:, 0], attention[:, :3].mean(1)) and torch.allclose(
        grouped[:, 1], attention[:, 3:].mean(1)
    )
    repeated = match_heads(attention, 12)
    assert torch.equal(repeated[:, 0], attention[:, 0]) and torch.equal(repeated[:, 1], attention[:, 0])
    assert torch.equal(repeated[:, 11], attention[:, 5]) and match_heads(attention, 6).equal(attention)
    with pytest.raises(
        Unsupported, match="the teacher has 6 heads, the student 4: one must be a multiple of the other"
    ):
        match_heads(attention, 4)


@pytest.mark.parametrize("heads", [2, 8])
def test_another_number_of_heads_is_matched(heads: int) -> None:
    run = pair("gpt2", num_attention_heads=heads)
    a, b = (gpt2_scores(run.role(role), EXAMPLES[0].ids) for role in ("model", "teacher"))
    expected = 0.0
    here = torch.ones(9, 9).tril().bool()
    for layer, place in enumerate((1, 3)):
        groups = b[place].repeat_interleave(2, 0) if heads == 2 else (b[place][::2] + b[place][1::2]) / 2
        expected += float((a[layer] - groups)[:, here].square().mean())
    (found,) = terms(run, AttentionTransfer(teacher="teacher"), collate(EXAMPLES[:1], 0, run.device)).values()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)


# In fits


def test_terms_of_a_recipe_are_summed_once_each(tmp_path: Path) -> None:
    """student(), kd(), feature_kd(), attention_transfer(), fit(), by hand in float64."""
    run: ModelRun = toy_run(
        "gpt2", shape=dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) | {"layers": 4}
    )
    run.data.pool = EXAMPLES
    run.apply(Student(layers=2))
    run.model.double()
    run.reference.double()
    expected = {"kd.hard": [], "kd.soft": [], "feature_kd.feature": [], "attention_transfer.attention": []}  # type: ignore[var-annotated]
    for example in EXAMPLES:
        ids, first = torch.tensor([example.ids]), max(1, example.prompt)
        with torch.no_grad():
            z, v = (m(ids).logits[0, first - 1 : -1] for m in (run.model, run.reference))
        p, q = (v / 2).softmax(-1), (z / 2).softmax(-1)
        expected["kd.hard"].append(0.5 * float(nn.functional.cross_entropy(z, ids[0, first:])))
        expected["kd.soft"].append(0.5 * 4 * float((p * (p / q).log()).sum(-1).mean()))
        h, t = (read_blocks(m, list(example.ids)) for m in (run.model, run.reference))
        a, b = (gpt2_scores(m, example.ids) for m in (run.model, run.reference))
        here = torch.ones(len(example.ids), len(example.ids)).tril().bool()
        pairs = ((0, 1), (1, 3))
        features = sum(float((h[i] - t[j]).square().mean() / t[j].square().mean()) for i, j in pairs)
        expected["feature_kd.feature"].append(features)
        errors = sum(float((a[i] - b[j])[:, here].square().mean()) for i, j in pairs)
        expected["attention_transfer.attention"].append(errors)
    for step in (KD(), FeatureKD(), AttentionTransfer()):
        run.apply(step)
    run.folder = tmp_path
    fit(run, steps=1, batch_size=3)
    line = json.loads((tmp_path / "fit-1.jsonl").read_text())
    assert line["terms"] == pytest.approx({name: mean(values) for name, values in expected.items()}, rel=1e-9)
    assert line["loss"] == pytest.approx(sum(map(mean, expected.values())), rel=1e-9)


@pytest.mark.parametrize("policy", ["every", "sqrt"])
def test_scores_of_recomputed_blocks_teach_the_same(policy: Any) -> None:
    losses = []
    for steps in ((), (Checkpointing(policy=policy),)):
        run = toy_run()
        for step in (Student(layers=1), *steps, AttentionTransfer(beta=5.0)):
            run.apply(step)
        losses.append(fit(run, steps=5, lr=1e-2)["loss_last"])
    assert losses[0] == losses[1]


def test_a_student_comes_to_attend_as_its_teacher(tmp_path: Path) -> None:
    run = toy_run()
    run.data.pool = run.data.pool[:4]
    run.apply(Student(layers=1, hidden=64, start="random"))
    with torch.no_grad():
        run.reference.model.layers[1].self_attn.q_proj.weight.mul_(20)  # so that it prefers some tokens
    run.apply(AttentionTransfer(beta=10.0))
    run.folder = tmp_path
    fit(run, steps=30, lr=1e-2)
    first, *_, last = map(json.loads, (tmp_path / "fit-1.jsonl").read_text().splitlines())
    name = "attention_transfer.layer_0"
    assert last["watched"][name] < 0.5 * first["watched"][name]
    assert first["terms"].keys() == {"attention_transfer.attention", "cross_entropy"}


@pytest.mark.parametrize("steps", ["beta=0", "layers=()", "layers=(-1,)", "teacher='model'", "scores='weights'"])
def test_settings_that_no_data_can_make_right(steps: str) -> None:
    with pytest.raises(Usage):
        parse_step(f"attention_transfer({steps})")
