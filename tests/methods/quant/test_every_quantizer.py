"""What holds of every quantizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toys_quant import make_layer, stub_run, tiny

from effbench.core.errors import Usage
from effbench.core.views import Layer
from effbench.formats.integer import IntLinear
from effbench.formats.packing import word_count
from effbench.methods.quant.awq import AWQ
from effbench.methods.quant.fp8_weight import FP8Weight
from effbench.methods.quant.gptq import GPTQ
from effbench.methods.quant.nf4 import NF4
from effbench.methods.quant.quip_sharp import QuIPSharp
from effbench.methods.quant.rtn import RTN
from effbench.methods.quant.squeezellm import SqueezeLLM
from effbench.nn.kinds.weights import stream
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, stored_bytes


def test_settings_no_data_can_mend_are_usage_errors() -> None:
    for make in (
        lambda: RTN(bits=5),
        lambda: RTN(group_size=0),
        lambda: RTN(grid="awq", mse=True),
        lambda: GPTQ(bits=1),
        lambda: GPTQ(group_size=None, static_groups=True),
        lambda: GPTQ(damp=0.0),
        lambda: AWQ(bits=16),
        lambda: AWQ(grid=0),
        lambda: QuIPSharp(bits=8),
        lambda: NF4(block=0),
        lambda: SqueezeLLM(bits=8),
        lambda: SqueezeLLM(outliers=1.0),
        lambda: FP8Weight(granularity="group"),  # type: ignore[arg-type]
    ):
        with pytest.raises(Usage):
            make()


def compress(method: Any, layer: Layer) -> IntLinear:
    module = method.compress(layer)
    assert isinstance(module, IntLinear)
    return module


@pytest.mark.parametrize("width", [576, 960, 100])  # 4.5, 7.5 and less than one group
@pytest.mark.parametrize(
    "method",
    [
        RTN(bits=3),
        RTN(bits=4, symmetric=True, mse=True),
        RTN(grid="awq"),
        GPTQ(bits=3),
        GPTQ(act_order=True),
        GPTQ(static_groups=True, act_order=True),
        AWQ(bits=3),
        AWQ(scale="duo"),
    ],
    ids=str,
)
def test_the_last_group_may_be_shorter(method: Any, width: int) -> None:
    """Packed with a scale of its own, which is as good as those of whole groups, and counted."""
    module = compress(method, make_layer(out=16, width=width))
    groups = -(-width // 128)
    assert module.scale.shape == (16, groups) and module.group_size == 128
    per_row = word_count(width, method.bits) * 4 + groups * 2
    beside = sum(tensor.nbytes for tensor in (module.zero, module.g_idx) if tensor is not None)
    assert sum(stored_bytes(module, torch.bfloat16)) == 16 * per_row + beside
    layer = make_layer(out=16, width=width)
    off = (dense_weight(module) - layer.weight).square()
    whole, rest = off[:, : width // 128 * 128], off[:, width // 128 * 128 :]
    assert width < 128 or rest.mean() < 3 * whole.mean()  # errors of GPTQ grow along a row
    x = torch.randn(3, width)
    assert torch.allclose(module(x), x @ dense_weight(module).T, atol=1e-4)


def test_groups_that_divide_are_what_they_were() -> None:
    """A row of whole groups and a short one is the row of whole groups beside the row of the short one."""
    layer, left, right = (make_layer(out=16, width=160) for _ in range(3))
    left.weight, right.weight = layer.weight[:, :128], layer.weight[:, 128:]
    both = torch.cat([dense_weight(compress(RTN(), part)) for part in (left, right)], 1)
    assert torch.equal(dense_weight(compress(RTN(), layer)), both)


@pytest.mark.parametrize(
    "method",
    [
        RTN(group_size=32),
        RTN(grid="awq", group_size=32, bits=2),
        GPTQ(group_size=32),
        GPTQ(group_size=32, act_order=True, symmetric=True),
        NF4(),
        SqueezeLLM(bits=3),
        FP8Weight(),
    ],
    ids=str,
)
def test_pruned_weights_stay_zero(method: Any) -> None:
    layer = make_layer(pruned=0.5)
    weight = dense_weight(method.compress(layer))
    assert layer.kept is not None and not weight[~layer.kept].any()
    assert weight[layer.kept].count_nonzero() > 0.5 * layer.kept.sum()


EVERY = [RTN(), GPTQ(), AWQ(), NF4(), FP8Weight(), SqueezeLLM(), QuIPSharp(bits=4, tune_iters=0)]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.key)
def test_on_whole_models(method: Any, kind: str) -> None:
    model = tiny(kind)
    ids = torch.arange(24)[None]
    before = model(ids).logits
    if hasattr(method, "group_size"):
        method = type(method)(group_size=32)
    run = stub_run(model)
    stream(run, method)
    after = model(ids).logits
    linears = [module for _, module in Blocks(model).linears()]
    assert not any(isinstance(module, nn.Linear) for module in linears)
    error = (after - before).norm() / before.norm()
    assert 1e-4 < error < 0.3
    again = tiny(kind)
    stream(stub_run(again), method)
    assert torch.equal(again(ids).logits, after)
