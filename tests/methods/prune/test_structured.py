"""What holds of head, neuron and layer pruning alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys_structured import logits, make_run, parts

from effbench import checks
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.recipe import parse
from effbench.methods.prune.head_pruning import HeadPruning
from effbench.methods.prune.layer_pruning import LayerPruning
from effbench.methods.prune.neuron_pruning import NeuronPruning
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight


def test_settings_no_data_can_mend_are_usage_errors() -> None:
    for make in (
        lambda: HeadPruning(sparsity=1.0),
        lambda: HeadPruning(rounds=0),
        lambda: HeadPruning(absolute="batch"),  # type: ignore[arg-type]
        lambda: NeuronPruning(sparsity=-0.1),
        lambda: NeuronPruning(multiple=0),
        lambda: NeuronPruning(score="hessian"),  # type: ignore[arg-type]
        lambda: LayerPruning(fraction=1.0),
        lambda: LayerPruning(score="cosine"),  # type: ignore[arg-type]
    ):
        with pytest.raises(Usage):
            make()


def test_linears_to_be_left_alone_are() -> None:
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    run = make_run(layers=4, skip=("model.layers.0.*.o_proj", "model.layers.1.*.down_proj", "model.layers.2.mlp.*"))
    before = [[dense_weight(linear).clone() for linear in parts(run, index, *names)] for index in range(4)]
    run.apply(HeadPruning(sparsity=0.5))
    run.apply(NeuronPruning(score="magnitude"))
    changed = [
        [linear.weight.shape != was.shape for linear, was in zip(parts(run, index, *names), before[index], strict=True)]
        for index in range(4)
    ]
    assert not any(changed[0][:2]) and not any(changed[1][2:]) and not any(changed[2][2:])
    assert all(changed[0][2:]) and all(changed[3][2:])
    assert run.model.config.intermediate_size == 256  # no longer that of all blocks
    blocks = list(Blocks(run.model).blocks)
    run.apply(LayerPruning())
    assert list(Blocks(run.model).blocks) == blocks[:3]
    with pytest.raises(Unsupported, match="0 of which may go"):
        make_run(layers=4, skip=("*.o_proj",)).apply(LayerPruning())
    with pytest.raises(Unsupported, match="every block has a linear that is to be left alone"):
        make_run(layers=4, skip=("*.o_proj",)).apply(HeadPruning())


@pytest.mark.parametrize("first", ["magnitude()", "rtn(group_size=32)"])
def test_what_cannot_be_cut_names_itself(first: str) -> None:
    for step in ("head_pruning(sparsity=0.25)", "neuron_pruning()"):
        run = make_run()
        before, after = parse(f"{first}, {step}").steps
        run.apply(before)
        with pytest.raises(Unsupported, match=r"layers\.0\..*_proj: a \w+ cannot be made smaller; put this step first"):
            run.apply(after)
    run = make_run(layers=4)
    for method in parse(f"{first}, layer_pruning()").steps:
        run.apply(method)
    run.finish()
    assert torch.isfinite(logits(run.model)).all() and len(Blocks(run.model)) == 3


def test_training_goes_on_in_the_smaller_model() -> None:
    run = make_run(layers=4)
    for method in parse("head_pruning(sparsity=0.25), neuron_pruning(), layer_pruning(), fit(steps=2)").steps:
        run.apply(method)
    run.finish()
    assert all(torch.isfinite(torch.tensor(run.log.fits[0][key])) for key in ("loss_first", "loss_last"))


@pytest.mark.parametrize("method", [HeadPruning(sparsity=0.0), NeuronPruning(sparsity=0.0), LayerPruning(fraction=0.0)])
def test_removing_nothing_changes_nothing(method: Any) -> None:
    run = checks.toy_run()
    run.apply(method)
    assert not run.log.removed
    with pytest.raises(Refused, match="changed nothing"):
        run.finish()
