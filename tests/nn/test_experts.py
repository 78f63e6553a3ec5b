"""Mixtures of experts: the embedded model as one, what a token uses of them, and what ends as `Unsupported`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effbench import sources
from effbench.checks import fit_two_steps, probe, toy, toy_run
from effbench.core.errors import Unsupported
from effbench.core.recipe import parse_step
from effbench.nn.files import artifact
from effbench.nn.files.load import linear_shapes, open_run, read
from effbench.nn.model.experts import (
    count_idle_bytes,
    count_used,
    eager_experts,
    list_experts,
    mixture_config,
    upcycle,
)
from effbench.nn.model.flops import count_flops
from effbench.probes.speed import decode_weight_bytes

WIDTH, INNER, EXPERTS, CHOSEN = 128, 384, 4, 2  # of the embedded model
BLOCKS = 6


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """The embedded model in float64, and its mixture."""
    dense = read(sources.TINY / "model", torch.float64)
    mixture = upcycle(dense, mixture_config(dense.config, EXPERTS, CHOSEN))
    mixture.set_experts_implementation("eager")  # the fused form takes no float64
    return dense, mixture


def tokens(vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_upcycled_model_computes_what_the_dense_one_does(pair: tuple[Any, Any]) -> None:
    dense, mixture = pair
    ids = tokens(dense.config.vocab_size)
    before = dense(ids).logits
    assert float((mixture(ids).logits - before).abs().max()) < 1e-5 * float(before.abs().max())  # float32 router
    chosen: list[torch.Tensor] = []
    hooks = [
        block.mlp.gate.register_forward_hook(lambda *call: chosen.append(call[2][2])) for block in mixture.model.layers
    ]
    mixture(ids)
    for hook in hooks:
        hook.remove()
    for experts in chosen:  # every expert has tokens, and a token two different ones
        assert len(experts.unique()) == EXPERTS and bool((experts[:, 0] != experts[:, 1]).all())


@torch.no_grad()
def test_experts_that_differ_are_mixed_by_the_router(pair: tuple[Any, Any]) -> None:
    """By hand: softmax over all experts, the two largest, normed to a sum of 1."""
    block = pair[1].model.layers[0].mlp
    states = torch.randn(1, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = block.experts.down_proj.clone()
    block.experts.down_proj *= torch.arange(1.0, 5.0, dtype=torch.float64)[:, None, None]  # expert e counts e times
    found = block(states)[0]
    block.experts.down_proj.copy_(before)
    plain = block(states)[0]
    weights, places = (states[0] @ block.gate.weight.T).float().softmax(-1).topk(2)
    factor = ((places + 1) * weights).sum(-1) / weights.sum(-1)
    torch.testing.assert_close(found, plain * factor[:, None].double(), rtol=1e-6, atol=1e-9)


def test_the_upcycled_model_is_opened_by_name() -> None:
    source, dense = sources.model("tiny:moe"), sources.model("tiny")
    assert source.digest != dense.digest and source.positions == dense.positions and source.files == dense.files
    assert sources.find_model("tiny:moe") == source
    run = open_run(source, sources.data(None), "cpu", None, 0)
    assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    copied = 3 * WIDTH * INNER * BLOCKS
    routers = EXPERTS * WIDTH * BLOCKS
    own = sum(p.numel() for p in read(sources.TINY / "model", torch.float32).parameters())  # tied: the table once
    assert run.original.parameters == own + (EXPERTS - 1) * copied + routers
    assert run.original.stored_bytes == 2 * run.original.parameters
    assert not any("mlp" in path for path in linear_shapes(source))  # as the plan of a recipe sees it


def test_the_shape_has_one_table() -> None:
    run = open_run(sources.model("shape:moe-tiny"), sources.data(None), "cpu", None, 0)
    assert run.model.lm_head.weight is run.model.model.embed_tokens.weight
    assert len(list_experts(run.model)) == 4 and run.model.config.num_local_experts == EXPERTS


@torch.no_grad()
def test_what_a_token_uses_is_counted() -> None:
    model = toy("mixtral")
    per_expert, router = 3 * WIDTH * 256, EXPERTS * WIDTH
    assert count_used(model) == 2 * (CHOSEN * per_expert + router)
    assert count_idle_bytes(model) == 2 * (EXPERTS - CHOSEN) * per_expert * 4
    dense = toy("llama")
    assert (count_used(dense), count_idle_bytes(dense)) == (0, 0)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert decode_weight_bytes(model) == held - model.model.embed_tokens.weight.nbytes - count_idle_bytes(model)
    ids = torch.arange(32)[None] + 1
    fused = count_flops(lambda: model(ids))
    with eager_experts(model):
        assert model.config._experts_implementation == "eager" and count_flops(lambda: model(ids)) == fused
    assert model.config._experts_implementation != "eager"
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) + count_used(model)
    assert fused > 2 * 32 * linear > 0.8 * fused  # the rest is attention


def test_a_trained_mixture_is_saved_and_opened_again(tmp_path: Path) -> None:
    run = toy_run("mixtral", shape={"tie_word_embeddings": True})
    before = probe(run)
    fit_two_steps(run)
    run.finish()
    assert not torch.equal(probe(run), before)
    written = artifact.save(run.model, tmp_path / "saved", run.storage)
    assert written == 2 * sum(p.numel() for p in run.model.parameters())
    again = artifact.load(tmp_path / "saved")
    for (name, one), (_, other) in zip(run.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("step", ["lora()", "nf4()", "wanda()", "galore()", "neuron_pruning()", "ia3()", "gmp()"])
def test_what_works_linear_by_linear_is_unsupported(step: str) -> None:
    run = toy_run("mixtral")
    with pytest.raises(Unsupported, match=r"expert"):
        run.apply(parse_step(step))
        fit_two_steps(run)
    run.close()


def test_adapters_beside_attention_are_trained() -> None:
    run = toy_run("mixtral")
    run.apply(parse_step("lora(targets=('q_proj', 'v_proj'))"))
    trained = {
        name.rpartition("self_attn.")[2].partition(".")[0]
        for name, p in run.model.named_parameters()
        if p.requires_grad
    }
    assert trained == {"q_proj", "v_proj"}
    before = probe(run)
    fit_two_steps(run)
    assert not torch.equal(probe(run), before)


def test_only_a_llama_without_biases_becomes_a_mixture() -> None:
    for architecture, changes in (("qwen2", {}), ("llama", {"mlp_bias": True})):
        with pytest.raises(Unsupported, match="cannot become a mixture"):
            mixture_config(toy(architecture, **changes).config, EXPERTS, CHOSEN)
