"""Adapters behind and beside: closed forms in float64, where they stand, how they start, what they train."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit

from effbench.checks import TOYS, probe, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.methods.peft.adapter import Adapter, OwnNorm, SerialAdapter
from effbench.methods.peft.parallel_adapter import ParallelAdapter, ParallelBottleneck
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import Around
from effbench.nn.run import ModelRun

WITH_MLP = [name for name in TOYS if name != "opt"]
X = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(3))


def stir(run: ModelRun, kind: type) -> list[Any]:
    """The modules of a kind, their weights and biases far from zero."""
    torch.manual_seed(0)
    found = [module for module in run.model.modules() if isinstance(module, kind)]
    for module in found:
        for parameter in module.bottleneck.parameters():
            parameter.data.normal_(std=0.3)
    return found


def narrow_mlp(module: Any, x: Tensor, activation: Any) -> Tensor:
    """f(x W_down + b_down) W_up + b_up in float64, from the formula."""
    down, up = module.bottleneck.down, module.bottleneck.up
    inner = activation(x.double() @ down.weight.double().T + down.bias.double())
    return inner @ up.weight.double().T + up.bias.double()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@torch.no_grad()
def test_an_adapter_adds_to_what_attention_and_the_mlp_give_before_the_residual() -> None:
    run = toy_run()
    plain = run.reference.model.layers[0]
    run.apply(Adapter(width=8, norms=False))
    first, second = stir(run, SerialAdapter)[:2]
    block = run.model.model.layers[0]
    assert (block.self_attn, block.mlp) == (first, second)
    positions = torch.arange(7)[None]
    cos_sin = run.model.model.rotary_emb(X, positions)
    own = plain.self_attn(plain.input_layernorm(X), position_embeddings=cos_sin, attention_mask=None)[0].double()
    middle = X + own + narrow_mlp(first, own, gelu)
    own = plain.mlp(plain.post_attention_layernorm(middle.float())).double()
    expected = middle + own + narrow_mlp(second, own, gelu)
    found = block(X, position_embeddings=cos_sin, attention_mask=None, position_ids=positions)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected.float(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_parallel_adapter_reads_what_the_mlp_reads_and_counts_four_times() -> None:
    run = toy_run("gpt2")
    run.apply(ParallelAdapter(width=8))
    (module, *_) = stir(run, ParallelBottleneck)
    own = run.reference.transformer.h[0].mlp(X).double()
    added = narrow_mlp(module, X, torch.relu)
    torch.testing.assert_close(module(X), (own + 4 * added).float(), rtol=1e-5, atol=1e-5)
    assert module.config()["scale"] == 4.0 and "s" not in dict(module.named_parameters())


@pytest.mark.parametrize("architecture", WITH_MLP)
def test_a_parallel_adapter_starts_at_the_model_by_its_zero_up_projection(architecture: str) -> None:
    """Not by its scale, as the seed has it: then nothing but the scale would have a gradient."""
    run = toy_run(architecture)
    before = probe(run)
    run.apply(ParallelAdapter(width=8))
    assert torch.equal(probe(run), before)
    modules = [module for module in run.model.modules() if isinstance(module, ParallelBottleneck)]
    for module in modules:
        bound = 128**-0.5  # Kaiming's with a = sqrt(5)
        assert not module.bottleneck.up.weight.any() and module.bottleneck.down.weight.abs().max() <= bound
    run.model(input_ids=torch.arange(1, 20)[None]).logits.square().mean().backward()
    assert all(module.bottleneck.up.weight.grad.any() for module in modules)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert trained == len(modules) * (2 * 8 * 128 + 8 + 128)


def test_a_learned_scale_is_the_seeds_variant() -> None:
    run = toy_run()
    before = probe(run)
    run.apply(parse_step("parallel_adapter(width=8, scale='learned')"))
    assert torch.equal(probe(run), before)
    modules = [module for module in run.model.modules() if isinstance(module, ParallelBottleneck)]
    run.model(input_ids=torch.arange(1, 20)[None]).logits.square().mean().backward()
    for module in modules:
        assert not module.s.any() and module.s.grad.any() and module.bottleneck.up.weight.any()
        assert not module.bottleneck.up.weight.grad.any()
    fit(run, steps=3, lr=0.1)
    assert all(module.s.any() for module in modules) and not torch.equal(probe(run), before)
    run.apply(ParallelAdapter(width=8, scale="learned"))
    outer = run.model.model.layers[0].mlp
    assert not outer.s.any() and outer.inner.s.any()  # each its own


@pytest.mark.parametrize("architecture", WITH_MLP)
def test_an_adapter_starts_near_the_identity(architecture: str) -> None:
    run = toy_run(architecture)
    before = probe(run)
    run.apply(Adapter())
    moved = float((probe(run) - before).norm() / before.norm())
    assert 0 < moved < 0.02
    for module in run.model.modules():
        if isinstance(module, SerialAdapter):
            for linear in (module.bottleneck.down, module.bottleneck.up):
                assert float(linear.weight.detach().abs().max()) <= 0.02  # two standard deviations
                assert float(linear.weight.detach().std()) == pytest.approx(0.0088, rel=0.05) and not linear.bias.any()


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("architecture", WITH_MLP)
def test_an_adapter_trains_what_the_formula_says(architecture: str, norms: bool) -> None:
    run = toy_run(architecture)
    view = Blocks(run.model)
    paths = [view.path(block, name) for block in range(len(view)) for name in view.names.norms] + [view.names.norm]
    own = sum(p.numel() for path in paths for p in run.model.get_submodule(path).parameters())
    run.apply(Adapter(width=8, norms=norms))
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert own > 0 and trained == len(view) * 2 * (2 * 8 * 128 + 8 + 128) + norms * own
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    report = fit(run, steps=3, lr=1e-2)
    assert sum(group["parameters"] for group in report["groups"]) == trained
    run.finish()
    for path in paths:
        norm = run.model.get_submodule(path)
        assert not isinstance(norm, Around)
        start = before[f"{path}.inner.weight" if norms else f"{path}.weight"]
        assert torch.equal(norm.weight, start) != norms


def test_each_adapter_of_a_name_has_norms_of_its_own() -> None:
    run = toy_run()
    for name, lr in (("a", 1e-2), ("b", 3e-2)):
        run.apply(Adapter(width=8, adapter=name))
        fit(run, steps=3, lr=lr)
    outer = run.model.model.norm
    assert isinstance(outer, OwnNorm) and isinstance(outer.inner, OwnNorm) and isinstance(outer.inner.inner, nn.Module)
    values = [outer.own.weight, outer.inner.own.weight, outer.inner.inner.weight]
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(values))
    run.adapter("a")
    torch.testing.assert_close(outer(X), outer.inner.own(X))


def test_two_without_a_name_stand_in_a_row_each_with_its_own_weights() -> None:
    run = toy_run()
    run.apply(Adapter(width=8))
    run.apply(Adapter(width=8))
    outer = run.model.model.layers[0].mlp
    assert outer.bottleneck is not outer.inner.bottleneck and not isinstance(outer.inner.inner, Around)
    assert list(run.linears()) == list(toy_run().linears())
    first, second = outer.inner, outer
    stir(run, SerialAdapter)
    with torch.no_grad():
        h = first.inner(X).double()
        h = h + narrow_mlp(first, h, gelu)
        torch.testing.assert_close(outer(X), (h + narrow_mlp(second, h, gelu)).float(), rtol=1e-5, atol=1e-5)


def test_a_block_that_holds_its_mlp_loose_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"blocks hold their MLP loose \(fc1, fc2\)"):
        toy_run("opt").apply(Adapter())
    with pytest.raises(Unsupported, match="the blocks have no module of the kind mlp"):
        toy_run("opt").apply(ParallelAdapter())


@pytest.mark.parametrize("step", ["adapter", "parallel_adapter"])
def test_over_four_bits_it_trains_and_stays_beside_them(step: str) -> None:
    run = toy_run()
    run.apply(parse_step("nf4()"))
    before = probe(run)
    run.apply(parse_step(f"{step}(width=8)"))
    assert torch.allclose(probe(run), before, rtol=0.02, atol=0.02)
    report = fit(run, steps=3, lr=1e-2, batch_size=len(run.data.pool))
    run.finish()
    assert report["loss_last"] < report["loss_first"] and not torch.equal(probe(run), before)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("adapter(width=0)", "width must be at least 1"),
        ("parallel_adapter(width=0)", "width must be at least 1"),
        ("parallel_adapter(scale=0)", "scale must not be 0"),
        ("parallel_adapter(scale='trained')", "scale"),
    ],
)
def test_wrong_usage(step: str, message: str) -> None:
    with pytest.raises(Usage, match=message):
        parse_step(step)
