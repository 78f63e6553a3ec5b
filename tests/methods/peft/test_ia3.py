"""(IA)³: where its vectors stand, in fused projections too, and that a merge keeps the function, biases included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit

from effbench.checks import DENSE, probe, toy_run
from effbench.core.recipe import parse_step
from effbench.formats.codebook import LutLinear
from effbench.methods.peft.ia3 import IA3, IA3Linear
from effbench.nn.model.beside import Beside
from effbench.nn.model.blocks import Blocks, count_heads
from effbench.nn.model.linear import dense_bias, dense_weight, matrix_shape
from effbench.nn.run import ModelRun


def parts(run: ModelRun) -> dict[str, IA3Linear]:
    return {path: module for path, module in run.model.named_modules() if isinstance(module, IA3Linear)}


def biased(architecture: str) -> ModelRun:
    """A run on a model whose biases are not zero."""
    run = toy_run(architecture)
    torch.manual_seed(0)
    for name, parameter in run.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    return run


def stirred(run: ModelRun, step: Any, std: float = 0.3) -> ModelRun:
    """A run after the step, its vectors moved, as if a fit had been."""
    run.apply(step)
    move(run, std)
    for entry in run._swapped:
        entry.trained = True
    return run


def move(run: ModelRun, std: float) -> None:
    torch.manual_seed(1)
    for module in parts(run).values():
        module.l.data += std * torch.randn(module.l.shape)


@pytest.mark.parametrize("architecture", DENSE)
def test_it_starts_at_ones_which_change_nothing(architecture: str) -> None:
    run = biased(architecture)
    before = probe(run)
    run.apply(IA3())
    assert all(bool((module.l == 1).all()) for module in parts(run).values())
    assert torch.equal(probe(run), before) or (
        architecture == "gpt2" and torch.allclose(probe(run), before, rtol=0, atol=2e-6)  # of transposed weights
    )


@pytest.mark.parametrize("architecture", DENSE)
def test_it_trains_as_many_numbers_as_keys_values_and_mlps_are_wide(architecture: str) -> None:
    run = toy_run(architecture)
    view = Blocks(run.model)
    heads, width = count_heads(view.blocks[0].get_submodule(view.names.attention))
    inner = matrix_shape(view.blocks[0].get_submodule(view.names.down))[1]
    run.apply(IA3())
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) == len(view) * (2 * heads * width + inner)
    report = fit(run, steps=1, weight_decay=0.1)
    assert [group["weight_decay"] for group in report["groups"]] == [0.0]  # towards 0 is not towards the model


@pytest.mark.parametrize("architecture", DENSE)
def test_queries_stay_and_keys_and_values_are_rescaled_with_their_biases(architecture: str) -> None:
    run = stirred(biased(architecture), IA3(adapter="a"))
    view = Blocks(run.model)
    block = view.blocks[0]
    heads, width = count_heads(block.get_submodule(view.names.attention))
    x = torch.randn(5, run.model.config.hidden_size)

    def project() -> tuple[Tensor, Tensor, Tensor]:
        made = [block.get_submodule(name)(x) for name in view.names.qkv]
        if len(made) == 3:
            return tuple(made)
        shape = (5, heads, 3, width) if architecture == "gpt_neox" else (5, 3, heads, width)
        return made[0].view(shape).unbind(2 if architecture == "gpt_neox" else 1)

    after = project()
    run.adapter(None)
    before = project()
    assert torch.equal(after[0], before[0])
    vectors = [parts(run)[view.path(0, name)].l for name in view.names.qkv if view.path(0, name) in parts(run)]
    if len(vectors) == 1:
        shape = (heads, 2, width) if architecture == "gpt_neox" else (2, heads, width)
        vectors = vectors[0].view(shape).unbind(1 if architecture == "gpt_neox" else 0)
    for ours, theirs, vector in zip(after[1:], before[1:], vectors, strict=True):
        torch.testing.assert_close(ours, theirs * vector)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt2", "gpt_neox"])
def test_merged_is_separate(architecture: str) -> None:
    run = stirred(biased(architecture), IA3())
    before, start = probe(run), probe(biased(architecture))
    run.settle()
    after = probe(run)
    assert not parts(run) and float((after - before).norm() / before.norm()) < 1e-5
    assert float((after - start).norm() / start.norm()) > 1e-2


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_over_four_bits_it_starts_from_what_they_hold_and_only_rounding_is_lost(architecture: str) -> None:
    runs = {}
    for merge in ("masked", "dense", "separate"):
        run = runs[merge] = biased(architecture)
        run.apply(parse_step("nf4()"))
        start = probe(run)
        stirred(run, IA3(merge=merge), std=0.0)
        assert torch.allclose(probe(run), start, atol=2e-6)
        move(run, 0.05)
    exact = {path: (dense_weight(m), dense_bias(m)) for path, m in parts(runs["masked"]).items()}
    before = probe(runs["dense"])
    for run in runs.values():
        run.settle()
    for merge in ("dense", "separate"):
        assert torch.allclose(probe(runs[merge]), before, atol=1e-5)
    for path, (weight, bias) in exact.items():
        module: Any = runs["masked"].model.get_submodule(path)
        assert isinstance(module, LutLinear)
        assert float((dense_weight(module) - weight).norm() / weight.norm()) < 0.1  # as that of four bits alone
        assert bias is None or torch.equal(module.bias, bias)


@pytest.mark.parametrize("step", ["lora(rank=2)", "dora(rank=2)"])
def test_what_stands_in_front_leaves_the_bias_where_it_is_rescaled(step: str) -> None:
    run = stirred(biased("qwen2"), IA3(adapter="a"))
    run.apply(parse_step(step))
    for module in run.model.modules():
        if isinstance(module, Beside) and not isinstance(module, IA3Linear):
            module.b.data.normal_(std=0.1)
    front: Any = run.model.model.layers[0].self_attn.k_proj
    assert isinstance(front, Beside) and isinstance(front.base, IA3Linear)
    x = torch.randn(3, 128)
    with torch.no_grad():
        expected = front(x)
        assert front.bias is None and front.base.base.bias is not None
        torch.testing.assert_close(nn.functional.linear(x, dense_weight(front), dense_bias(front)), expected)
        torch.testing.assert_close(front.rebuilt(dense_weight(front))(x), expected)
