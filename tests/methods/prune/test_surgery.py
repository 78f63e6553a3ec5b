"""Heads and neurons that really leave a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from toys_structured import ARCHITECTURES, IDS, logits, make_run, parts, without, zero_inputs
from transformers import DynamicCache

from effbench.methods.prune.head_pruning import HeadPruning
from effbench.methods.prune.layer_pruning import LayerPruning
from effbench.methods.prune.neuron_pruning import NeuronPruning
from effbench.nn.files import artifact
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.structure import heads, keep_groups, keep_neurons, neurons


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_removed_head_is_a_head_whose_output_is_zeroed(architecture: str) -> None:
    cut, masked = make_run(architecture, double=True), make_run(architecture, double=True)
    view = Blocks(cut.model)
    before = parameters(cut.model)
    found = heads(view, 1)
    hidden = cut.model.config.hidden_size
    wide = found.share * found.size
    (out,) = parts(masked, 1, view.names.out)
    zero_inputs(out, torch.arange(wide, 2 * wide))
    keep_groups(view, 1, without(found.groups, [1]))

    assert heads(view, 1).groups == found.groups - 1 and heads(view, 0) == found
    assert torch.allclose(logits(cut.model), logits(masked.model), atol=1e-12)
    rows = wide + 2 * found.size  # of queries, keys and values
    biased = parts(cut, 1, view.names.qkv[0])[0].bias is not None
    assert before - parameters(cut.model) == hidden * (rows + wide) + biased * rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_removed_neuron_is_a_neuron_whose_output_is_zeroed(architecture: str) -> None:
    cut, masked = make_run(architecture, double=True), make_run(architecture, double=True)
    view = Blocks(cut.model)
    width, hidden, before = neurons(view, 0), cut.model.config.hidden_size, parameters(cut.model)
    gone = [0, 7, 100, width - 1]
    (down,) = parts(masked, 0, view.names.down)
    zero_inputs(down, torch.tensor(gone))
    keep_neurons(view, 0, without(width, gone))

    assert neurons(view, 0) == width - 4 and neurons(view, 1) == width
    assert torch.allclose(logits(cut.model), logits(masked.model), atol=1e-12)
    biased = len(view.names.up) == 1  # OPT, GPT-2 and NeoX have biases
    assert before - parameters(cut.model) == 4 * (hidden * (len(view.names.up) + 1) + biased)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caches_shrink_with_their_heads_and_generation_equals_the_whole_forward_pass(architecture: str) -> None:
    run = make_run(architecture)
    view = Blocks(run.model)
    keep_groups(view, 0, without(heads(view, 0).groups, [0]))
    keep_neurons(view, 1, torch.arange(9))
    expected = logits(run.model)
    cache = DynamicCache(config=run.model.config)
    with torch.no_grad():
        pieces = [run.model(IDS[:, :10], past_key_values=cache, use_cache=True).logits]
        for step in range(10, IDS.shape[1]):
            pieces.append(run.model(IDS[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-4)
    for index in (0, 1):
        found = heads(view, index)
        assert cache.layers[index].keys.shape == (2, found.groups, 24, found.size)
    assert cache.layers[0].values.numel() < cache.layers[1].values.numel()

    engine = open_engine(run)
    state = engine.prefill(IDS)
    told = [state.ids]
    for _ in range(4):
        state = engine.decode(state)
        told.append(state.ids)
    ids = IDS
    for token in told:
        with torch.no_grad():
            assert torch.equal(run.model(ids, use_cache=False).logits[:, -1].argmax(-1), token)
        ids = torch.cat([ids, token[:, None]], 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_implementation_of_attention_sees_the_heads_that_are_left(architecture: str) -> None:
    run = make_run(architecture)
    view = Blocks(run.model)
    keep_groups(view, 1, without(heads(view, 1).groups, [0]))
    fused = logits(run.model)
    run.model.set_attn_implementation("eager")
    assert torch.allclose(logits(run.model), fused, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_uneven_models_are_saved_and_loaded(architecture: str, tmp_path: Path) -> None:
    run = make_run(architecture, layers=4)
    for step in (
        HeadPruning(sparsity=0.25),
        NeuronPruning(sparsity=0.3, scope="global", score="magnitude"),
        LayerPruning(),
    ):
        run.apply(step)
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    loaded = artifact.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(run.model))
    assert [heads(Blocks(loaded), i) for i in range(3)] == [heads(Blocks(run.model), i) for i in range(3)]
    with torch.no_grad():
        cached = loaded(IDS, use_cache=True).past_key_values
        last = loaded(IDS[:, -1:], past_key_values=cached).logits
    again = torch.cat([IDS, IDS[:, -1:]], 1)
    with torch.no_grad():
        assert torch.allclose(loaded(again, use_cache=False).logits[:, -1:], last, atol=1e-4)
