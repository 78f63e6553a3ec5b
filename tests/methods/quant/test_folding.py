"""Scales that move from the inputs of linears into what comes before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_quant import stub_run, tiny
from transformers.activations import ACT2FN

from effbench.checks import check_folded_scales, toy_run
from effbench.core.errors import Unsupported
from effbench.core.kinds import Weights
from effbench.core.views import Block, Layer, SharedInput
from effbench.methods.quant.awq import AWQ
from effbench.nn.calibration import walk
from effbench.nn.kinds.weights import stream
from effbench.nn.model import blocks
from effbench.nn.model.linear import MaskedLinear, replace


@dataclass(frozen=True)
class Scaled(Weights):
    """Multiplies every input that can be scaled, and rounds nothing."""

    paper = "this test"
    needs = {"norm", "hessian", "raw"}

    factor: float = 3.0  # of all inputs

    def scales(self, block: Block, shared: Sequence[SharedInput]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for group in shared:
            width = block.layers([group])[0].weight.shape[1]
            found.append(None if group.previous is None else torch.linspace(0.2, 1, width) * self.factor)
        return found

    def compress(self, layer: Layer) -> nn.Module:
        linear = nn.Linear(layer.weight.shape[1], len(layer.weight), layer.bias is not None)
        linear.weight.data = layer.weight
        if layer.bias is not None:
            linear.bias.data = layer.bias
        return linear


@pytest.mark.parametrize(
    "method", [AWQ(bits=2), pytest.param(AWQ(scale="duo"), marks=pytest.mark.slow), Scaled()], ids=str
)
def test_moved_scales_change_nothing_in_any_architecture(method: Weights) -> None:
    check_folded_scales(method)


def test_a_negative_scale_is_found() -> None:
    with pytest.raises(AssertionError, match="opt with relu: moving the scales changes the outputs"):
        check_folded_scales(Scaled(factor=-1.0))


def test_a_scale_through_an_activation_that_it_does_not_pass_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "passes_scales", lambda activation: True)
    with pytest.raises(AssertionError, match="opt with gelu: moving the scales changes the outputs"):
        check_folded_scales(AWQ())


@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_which_activations_pass_a_scale(name: str) -> None:
    """Against values in float64 over many more factors and inputs."""
    activation: Any = ACT2FN[name].double() if isinstance(ACT2FN[name], nn.Module) else ACT2FN[name]
    x = torch.linspace(-30, 30, 1001, dtype=torch.float64)
    linear = all(torch.allclose(activation(x * f), activation(x) * f, atol=1e-9) for f in (0.001, 0.3, 2.0, 700.0))
    assert blocks.passes_scales(ACT2FN[name]) == linear == (name in ("relu", "leaky_relu", "linear", "prelu"))


def test_functions_that_are_no_modules_are_asked_too() -> None:
    found: dict[Callable[[Tensor], Tensor], bool] = {torch.abs: True, torch.sin: False, torch.square: False}
    assert {activation: blocks.passes_scales(activation) for activation in found} == found


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("true_sequence", [False, True])
def test_a_model_with_moved_scales_computes_what_it_did(kind: str, true_sequence: bool) -> None:
    @dataclass(frozen=True)
    class Mine(Scaled):
        @property
        def true_sequence(self) -> bool:
            return true_sequence

    model, ids = tiny(kind), torch.arange(24)[None]
    before = model(ids).logits
    run = stub_run(model)
    stream(run, Mine())
    assert (model(ids).logits - before).norm() < 1e-5 * before.norm()
    assert all(errors["weight_error"] == 0 for errors in run.log.layers.values()) and len(run.log.layers) in (12, 14)


def test_statistics_follow_the_scales() -> None:
    inputs = next(walk(toy_run(), Scaled.needs))
    shared = inputs.view.shared_inputs(inputs.module)
    inputs.gather(shared, Scaled.needs)
    inputs.fold(shared, Scaled().scales(inputs, shared))
    found = inputs.layers(shared)
    for layer in found:
        replace(inputs.run.model, layer.name, Scaled().compress(layer))
    inputs.gather(shared, Scaled.needs)
    for old, new in zip(found, inputs.layers(shared), strict=True):
        for field in ("norm", "mean_abs", "second_moment", "hessian", "raw"):
            was, now = (getattr(layer.inputs, field) for layer in (old, new))
            assert (now - was).norm() < 1e-4 * now.norm(), (old.name, field)


def test_a_scale_that_nothing_can_take_is_refused() -> None:
    inputs = next(walk(toy_run("gpt2"), {"norm"}))
    shared = inputs.view.shared_inputs(inputs.module)
    inputs.gather(shared, {"norm"})
    with pytest.raises(Unsupported, match=r"mlp\.c_proj: nothing can absorb a scale"):
        inputs.fold(shared[-1:], [torch.ones(256)])
    run = stub_run(tiny())
    run.targeted = lambda path: not path.endswith("v_proj")
    inputs = next(walk(run, {"norm"}))
    shared = inputs.view.shared_inputs(inputs.module)
    inputs.gather(shared, {"norm"})
    with pytest.raises(Unsupported, match="q_proj: nothing can absorb a scale"):
        inputs.fold(shared[:1], [torch.ones(64)])


def test_masked_weights_stay_zero_where_scales_move() -> None:
    model = tiny()
    for block in model.model.layers:  # type: ignore[union-attr, operator]
        up = block.mlp.up_proj
        block.mlp.up_proj = MaskedLinear.of(up.weight.data, up.weight.abs() > 0.01, None)
    before = model(torch.arange(24)[None]).logits
    stream(stub_run(model), Scaled())
    assert (model(torch.arange(24)[None]).logits - before).norm() < 1e-5 * before.norm()
