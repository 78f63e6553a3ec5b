"""Neuron pruning: scores, widths and scopes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_structured import ARCHITECTURES, logits, loss, make_run, parts, without
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Unsupported
from effbench.core.recipe import parse
from effbench.methods.prune.neuron_pruning import NeuronPruning
from effbench.nn.files import artifact
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight
from effbench.nn.model.structure import neurons
from effbench.nn.run import ModelRun


def gradients(run: ModelRun, linears: list[nn.Module]) -> list[Tensor]:
    """[out, in] of each: the gradient of the mean loss, all sequences in one batch."""
    ids = run.calibration()
    found = torch.autograd.grad(run.model(input_ids=ids, labels=ids).loss, [linear.weight for linear in linears])
    return [g.T if isinstance(linear, Conv1D) else g for g, linear in zip(found, linears, strict=True)]


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("score", ["taylor", "taylor_vector", "magnitude", "activation"])
def test_scores_are_what_they_say(architecture: str, score: Any) -> None:
    run = make_run(architecture)
    view = Blocks(run.model)
    found = NeuronPruning(score=score).scores(run, view, [1])[1]
    linears = parts(run, 1, *view.names.up, view.names.down)
    weights = [dense_weight(linear) for linear in linears]
    slices = [*weights[:-1], weights[-1].T]  # [width, other]
    if score == "magnitude":
        expected = torch.cat(slices, 1).square().sum(1)
    elif score == "activation":
        taken: list[Tensor] = []
        linears[-1].register_forward_pre_hook(lambda _, args: taken.append(args[0].flatten(0, -2)))
        loss(run)
        expected = torch.cat(taken).norm(dim=0) * weights[-1].abs().mean(0)
    else:
        grads = gradients(run, linears)
        products = [w * g for w, g in zip(slices, [*grads[:-1], grads[-1].T], strict=True)]
        flat = [p.abs().sum(1) if score == "taylor" else p.sum(1).abs() for p in products]
        expected = torch.stack(flat).sum(0)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-8)


def test_taylor_estimates_what_removing_single_weights_does_to_the_loss() -> None:
    """Element by element, in the limit of small weights: |change of the loss| summed over a neuron's weights."""
    run = make_run("opt", double=True, sequences=2, length=8)
    view = Blocks(run.model)
    up, down = parts(run, 0, "fc1", "fc2")
    up.weight.data *= 1e-3
    down.weight.data *= 1e-3
    up.bias.data = up.bias.data.abs()  # no activation changes sides
    score = NeuronPruning().scores(run, view, [0])[0]
    whole = loss(run).mean()
    change = 0.0
    for vector in (up.weight.data[5], down.weight.data[:, 5]):
        for place in range(len(vector)):
            kept = float(vector[place])
            vector[place] = 0
            change += float((loss(run).mean() - whole).abs())
            vector[place] = kept
    assert change > 0 and float(score[5]) == pytest.approx(change, rel=0.01)


def test_taylor_vector_ranks_neurons_as_removing_them_does() -> None:
    """With ReLU and no bias both vectors of a neuron have the same salience, the change of the loss to first order."""
    run = make_run("opt", double=True)
    view = Blocks(run.model)
    up, down = parts(run, 1, "fc1", "fc2")
    up.bias.data.zero_()
    down.weight.data *= 1e-3
    score = NeuronPruning(score="taylor_vector").scores(run, view, [1])[1].double()
    whole = loss(run).mean()
    change = torch.zeros(24, dtype=torch.float64)
    for neuron in range(24):
        kept = down.weight.data[:, neuron].clone()
        down.weight.data[:, neuron] = 0
        change[neuron] = (loss(run).mean() - whole).abs()
        down.weight.data[:, neuron] = kept
    assert torch.allclose(score[:24], 2 * change, rtol=0.01, atol=float(change.max()) * 1e-3)


@pytest.mark.parametrize("score", ["taylor", "taylor_vector", "magnitude", "activation"])
def test_dead_neurons_go_first(score: Any) -> None:
    run = make_run()
    linears = parts(run, 0, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for linear in linears[:2]:
        linear.weight.data[3:6] = 0
    linears[2].weight.data[:, 3:6] = 0
    expected = dense_weight(linears[0])[without(256, [3, 4, 5])]
    before = logits(run.model)
    run.apply(NeuronPruning(sparsity=3 / 512, score=score, scope="global"))
    assert run.log.removed == [{"step": run.log.removed[0]["step"], "neurons": {"model.layers.0.mlp.down_proj": 3}}]
    assert torch.equal(linears[0].weight, expected)
    assert torch.allclose(logits(run.model), before, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_width_is_a_model_for_plain_transformers(architecture: str, tmp_path: Path) -> None:
    run = make_run(architecture)
    width = neurons(Blocks(run.model), 0)
    run.apply(NeuronPruning(score="magnitude", sparsity=0.3))
    assert {neurons(Blocks(run.model), index) for index in (0, 1)} == {int(width * 0.7)}
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded.eval()), logits(run.model))


def test_global_scope_leaves_uneven_widths_and_the_number_asked_for(tmp_path: Path) -> None:
    run = make_run()
    (down,) = parts(run, 1, "mlp.down_proj")
    down.weight.data[:, :128] *= 3
    scores = NeuronPruning(score="magnitude").scores(run, Blocks(run.model), [0, 1])
    lowest = torch.cat([scores[0], scores[1]]).sort().values[:154]  # 512 - int(512 * 0.7)
    run.apply(NeuronPruning(sparsity=0.3, score="magnitude", scope="global"))
    widths = [neurons(Blocks(run.model), index) for index in (0, 1)]
    assert widths == [int((scores[index] > lowest.max()).sum()) for index in (0, 1)]
    assert sum(widths) == 358 and widths[0] < widths[1]
    assert run.model.config.intermediate_size == 256


@pytest.mark.parametrize(("multiple", "width"), [(1, 179), (64, 192)])
def test_widths_are_rounded_up_to_a_multiple_so_that_groups_divide_them(multiple: int, width: int) -> None:
    run = make_run()
    for step in parse(
        f"neuron_pruning(sparsity=0.3, multiple={multiple}, score='magnitude'), rtn(group_size=64)"
    ).steps:
        run.apply(step)
    run.finish()
    down = parts(run, 0, "mlp.down_proj")[0]
    assert (down.in_features, down.scale.shape[1]) == (width, 3)
    assert torch.isfinite(logits(run.model)).all()


def test_no_block_is_left_without_neurons() -> None:
    run = make_run()
    for linear in parts(run, 0, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        linear.weight.data *= 1e-3
    with pytest.raises(Unsupported, match=r"layers\.0\.mlp\.down_proj: no neuron would be left"):
        run.apply(NeuronPruning(sparsity=0.6, score="magnitude", scope="global"))
    with pytest.raises(Unsupported, match="less than one neuron"):
        make_run().apply(NeuronPruning(sparsity=0.2, score="magnitude", multiple=256))
