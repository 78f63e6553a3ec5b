"""AWQ against plain searches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_quant import make_layer, stub_run, tiny

from effbench.formats.integer import IntLinear
from effbench.formats.packing import unpack
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


def compress_first_block(method: AWQ) -> dict[str, nn.Module]:
    block, groups = first_block(tiny())
    block.fold(groups, method.scales(block, groups))
    return method.compress_block(block, groups)


def round_plainly(group: Tensor, top: int) -> Tensor:
    """A group [out, n] on its grid: codes by the scale as it is, decoded by the scale as it is stored."""
    low, high = group.amin(-1, keepdim=True), group.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / top
    zero = (-(low / scale).round()).clamp(0, top)
    return (((group / scale).round() + zero).clamp(0, top) - zero) * scale.half().float()


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
        before = [out.double() for out in block.replay(module)()]
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
                layer.module.weight.data = torch.cat([round_plainly(g, 7) for g in (weight * s).split(32, 1)], 1) / s
            after = [out.double() for out in block.replay(module)()]
            error = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
            if error < best[0]:
                best = (error, s)
            for layer, weight in zip(layers, originals, strict=True):
                layer.module.weight.data = weight.clone()
        assert found is not None
        assert torch.allclose(found, best[1], rtol=1e-4)


@pytest.mark.parametrize("size", [32, 48, 128])
def test_awq_without_alpha_and_clip_is_rounding(size: int) -> None:
    model = tiny()
    originals = {path: module.weight for path, module in Blocks(model).linears()}
    stream(stub_run(model), AWQ(group_size=size, grid=1, clip=False))
    for path, module in Blocks(model).linears():
        rounded = torch.cat([round_plainly(group, 15) for group in originals[path].split(size, 1)], 1)
        assert torch.equal(dense_weight(module), rounded)


@pytest.mark.parametrize(
    ("kind", "heads", "activation"),
    [("llama", 4, None), ("llama", 2, None), ("opt", 4, None), ("opt", 4, "gelu"), ("opt", 4, "leaky_relu")],
)
def test_awq_folding_changes_nothing_but_the_rounding(kind: str, heads: int, activation: str | None) -> None:
    """At 8 bits the folded model computes what the original did: scales cancel."""
    model = tiny(kind, heads, activation)
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
    with_clip, plain = (compress_first_block(AWQ(bits=2, group_size=32, clip=clip)) for clip in (True, False))
    assert with_clip.keys() == plain.keys() and len(plain) == 7
    for name, module in with_clip.items():
        same = torch.equal(dense_weight(module), dense_weight(plain[name]))
        assert same == name.endswith(("q_proj", "k_proj"))


def test_awq_clip_equals_a_search_over_tokens() -> None:
    """With groups of 32, 32 and 16 inputs."""
    layer = make_layer(out=16, width=80)
    module = AWQ(bits=3, group_size=32).compress(layer)
    for tokens, weight, got in zip(
        *(matrix.split(32, 1) for matrix in (layer.inputs.raw, layer.weight, dense_weight(module))), strict=True
    ):
        largest = weight.abs().amax(-1, keepdim=True)
        rounded = []
        for step in range(10):
            limit = largest * (1 - step / 20)
            rounded.append(round_plainly(weight.clamp(-limit, limit), 7))
        errors = torch.stack([(tokens @ (cut - weight).T).square().mean(0) for cut in rounded])
        best = errors.argmin(0)
        assert best.max() > 0
        assert torch.equal(got, torch.stack(rounded)[best, torch.arange(16)])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_awq_uses_the_lowest_code_of_every_group_that_it_clips(bits: int) -> None:
    """The lowest weights lie at the end of the range, or halfway between its last codes, however a scale is stored."""
    layer = make_layer(out=64, width=256)
    module = AWQ(bits=bits, group_size=64).compress(layer)
    assert isinstance(module, IntLinear)
    codes = unpack(module.weight, bits, 256).unflatten(1, (-1, 64))
    parts = layer.weight.unflatten(1, (-1, 64))
    clipped = module.scale < 0.98 * (parts.amax(-1) - parts.amin(-1)) / (2**bits - 1)
    assert clipped.sum() > 50 and (codes == 0).any(-1)[clipped].all()


def test_awq_searches_on_the_inputs_that_the_block_gives() -> None:
    """What a submodule is given is found once; its outputs are those that it has in the block, changed or not."""
    block, groups = first_block(tiny())
    outputs: list[Tensor] = []
    for group in groups:
        run = block.replay(group.inspect)
        for _ in range(2):
            handle = group.inspect.register_forward_hook(
                lambda _, __, out: outputs.append(out if isinstance(out, Tensor) else out[0])
            )
            block.forward()
            handle.remove()
            assert all(torch.equal(a, b) for a, b in zip(run(), outputs, strict=True))
            outputs.clear()
            block.module.get_submodule(group.names[0]).weight.data *= 1.5


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
