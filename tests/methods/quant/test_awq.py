"""AWQ against plain searches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toys_quant import make_layer, stub_run, tiny

from effbench.formats.grid import fit_grid
from effbench.methods.quant.awq import AWQ
from effbench.methods.quant.rtn import RTN
from effbench.nn.calibration import BlockInputs, block_inputs
from effbench.nn.kinds.weights import stream
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight


def first_block(model: nn.Module) -> tuple[BlockInputs, Any]:
    run = stub_run(model)
    view = Blocks(model)
    hidden, calls = block_inputs(run, view)
    block = BlockInputs(run, 0, hidden, calls[0])
    groups = view.shared_inputs(view.blocks[0])
    block.gather(groups, {"norm", "hessian", "raw"})
    return block, groups


@pytest.mark.parametrize("scale", ["paper", "duo", "seed"])
def test_awq_scales_equal_a_float64_grid_search(scale: Any) -> None:
    method = AWQ(bits=3, group_size=32, scale=scale)
    block, groups = first_block(tiny())
    for group in groups if scale == "paper" else groups[:1]:
        layers = block.layers([group])
        found = method._scale(block, group, layers)
        module, x = group.inspect, layers[0].inputs.raw
        weights = [layer.weight.clone() for layer in layers]
        best = (float("inf"), torch.empty(0))
        originals = [layer.module.weight.data.clone() for layer in layers]
        before = [out.double() for out in block.output_of(module)]
        for step in range(20):
            alpha = step / 20
            size = x.double().abs().mean(0)
            if scale == "paper":
                s = size**alpha
            elif scale == "seed":
                s = (x.double().norm(dim=0) / torch.cat(weights).abs().amax(0).double()) ** alpha
            else:
                parts = torch.cat(weights).double().abs().unflatten(1, (-1, 32))
                share = (parts / (parts.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)
                s = size**alpha / (share ** (1 - alpha) + 1e-4)
            s = s.clamp(min=1e-4)
            s = (s / (s.max() * s.min()).sqrt()).float()
            for layer, weight in zip(layers, weights, strict=True):
                parts = (weight * s).unflatten(1, (-1, 32))
                low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
                step_size = ((high - low).clamp(min=1e-5) / 7).half().float()
                zero = (-(low / ((high - low).clamp(min=1e-5) / 7)).round()).clamp(0, 7)
                q = (((parts / step_size).round() + zero).clamp(0, 7) - zero) * step_size
                layer.module.weight.data = q.flatten(1) / s
            after = [out.double() for out in block.output_of(module)]
            error = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
            if error < best[0]:
                best = (error, s)
            for layer, weight in zip(layers, originals, strict=True):
                layer.module.weight.data = weight.clone()
        assert found is not None
        assert torch.allclose(found, best[1], rtol=1e-4)


def test_awq_without_alpha_and_clip_is_rounding() -> None:
    model, other = tiny(), tiny()
    stream(stub_run(model), AWQ(group_size=32, grid=1, clip=False))
    stream(stub_run(other), RTN(group_size=32, grid="awq"))
    for (_, a), (_, b) in zip(Blocks(model).linears(), Blocks(other).linears(), strict=True):
        assert torch.equal(dense_weight(a), dense_weight(b))


@pytest.mark.parametrize(("kind", "heads"), [("llama", 4), ("llama", 2), ("opt", 4)])
def test_awq_folding_changes_nothing_but_the_rounding(kind: str, heads: int) -> None:
    """At 8 bits the folded model computes what the original did: scales cancel."""
    model = tiny(kind, heads)
    ids = torch.arange(24)[None]
    before = model(ids).logits
    norms = {n: m.weight.clone() for n, m in model.named_modules() if "layers.0" in n and "norm" in n}
    stream(stub_run(model), AWQ(bits=8, group_size=32, clip=False))
    after = model(ids).logits
    assert (after - before).norm() < 0.02 * before.norm()
    assert any(not torch.equal(model.get_submodule(n).weight, w) for n, w in norms.items())


def test_awq_beats_rounding_on_the_module_output() -> None:
    ids = torch.arange(24)[None]
    before = tiny()(ids).logits
    errors = []
    for method in (RTN(bits=3, group_size=32, grid="awq"), AWQ(bits=3, group_size=32)):
        model = tiny()
        stream(stub_run(model), method)
        errors.append(float((model(ids).logits - before).norm()))
    assert errors[1] < errors[0]


def test_awq_clips_all_but_queries_and_keys() -> None:
    with_clip, plain = (AWQ(bits=2, group_size=32, clip=c).compress_block(*first_block(tiny())) for c in (True, False))
    assert with_clip.keys() == plain.keys() and len(plain) == 7
    for name, module in with_clip.items():
        same = torch.equal(dense_weight(module), dense_weight(plain[name]))
        assert same == name.endswith(("q_proj", "k_proj"))


def test_awq_clip_equals_a_search_over_tokens() -> None:
    layer = make_layer(out=16, width=64)
    x = layer.inputs.raw
    weight = layer.weight.unflatten(1, (-1, 32))
    clipped = AWQ(bits=3, group_size=32)._clip(weight, layer.inputs.second_moment.float())
    tokens = x.unflatten(1, (-1, 32))
    largest = weight.abs().amax(-1, keepdim=True)
    errors = []
    for step in range(10):
        limit = largest * (1 - step / 20)
        cut = weight.clamp(-limit, limit)
        delta = fit_grid(cut, 3, grid="awq").as_stored().round(cut) - weight
        errors.append(torch.einsum("tgi,ogi->tog", tokens, delta).square().mean(0))
    best = torch.stack(errors).argmin(0)
    limit = largest * (1 - best.unsqueeze(-1) / 20)
    assert best.max() > 0
    assert torch.allclose(clipped, weight.clamp(-limit, limit))


def test_seed_awq_scale_is_another_formula() -> None:
    layers = [make_layer()]
    paper, seed = AWQ().candidate(layers, 0.5), AWQ(scale="seed").candidate(layers, 0.5)
    mean = layers[0].inputs.raw.abs().mean(0)
    expected = mean.sqrt() / (mean.sqrt().max() * mean.sqrt().min()).sqrt()
    assert torch.allclose(paper, expected, rtol=1e-3)
    assert (paper / seed - 1).abs().max() > 0.05
    layers[0].weight[:, :8] *= 10  # the seed's form follows the weights, the paper's does not
    assert torch.equal(AWQ().candidate(layers, 0.5), paper)
    assert not torch.allclose(AWQ(scale="seed").candidate(layers, 0.5), seed, rtol=0.05)
