"""Quantization-aware training: fake quantizers are torchao's, and what is packed is what was trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_quant import golden
from toys_training import fit

from effbench import ops
from effbench.checks import DENSE, probe, probe_model, toy_run
from effbench.core.errors import Usage
from effbench.core.recipe import parse, parse_step
from effbench.formats.grid import fit_grid, split_groups
from effbench.formats.integer import IntLinear
from effbench.formats.nm import NMIntLinear
from effbench.formats.packing import word_count
from effbench.methods.quant._fake import FakeQuantLinear
from effbench.methods.quant.qat import QAT
from effbench.methods.quant.rtn import RTN
from effbench.nn.calibration import Inputs, view_layer
from effbench.nn.files import artifact
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, kept, make_linear, stored_bytes
from effbench.nn.run import ModelRun

GROUP = 32
CASES = ["affine2", "affine4", "affine8", "group4", "group4_even", "group2", "channel4", "token8"]


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


def fake(real: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """[rows, n] on grids of signed codes, scale and zero [rows, groups]."""
    groups = real.unflatten(1, (scale.shape[1], -1))
    top = 2 ** (bits - 1)
    rounded: Tensor = ops.load("fake_quantize")(groups, scale[..., None], zero[..., None], -top, top - 1)
    return rounded.flatten(1)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_torchaos(name: str) -> None:
    """But where a number lies half way between two points: torchao multiplies by the inverse of the scale."""
    tensors, _ = golden("qat")
    real, scale, zero, out, grad = (tensors[f"{name}.{part}"] for part in ("real", "scale", "zero", "out", "grad"))
    real.requires_grad_()
    found = fake(real, scale, zero, int(name.removesuffix("_even")[-1]))
    (gradient,) = torch.autograd.grad((found * tensors["direction"]).sum(), real)
    steps = (real.detach().unflatten(1, (scale.shape[1], -1)) / scale[..., None]).flatten(1)
    clear = (steps - steps.floor() - 0.5).abs() > 1e-4
    clear |= torch.tensor(name.endswith("_even"))  # a step is a power of two: both quotients are exact
    assert (~clear).sum() <= 2 * scale.numel()  # the largest of a group, which is half a step beyond its grid
    assert torch.equal(found[clear], out[clear])
    assert torch.allclose(gradient[clear], grad[clear], atol=1e-6)
    assert name.startswith(("channel", "token")) or 0 < (gradient == 0).sum() < gradient.numel()


@pytest.mark.parametrize("name", ["group4", "group2", "channel4"])
def test_the_grid_is_torchaos(name: str) -> None:
    tensors, _ = golden("qat")
    scale, weight, bits = tensors[f"{name}.scale"], tensors[f"{name}.real"], int(name[-1])
    grid = fit_grid(weight.unflatten(1, (scale.shape[1], -1)), bits, symmetric=True)
    assert torch.allclose(grid.scale[..., 0], scale, rtol=1e-6)
    assert (grid.zero == 2 ** (bits - 1)).all()  # of unsigned codes; torchao's are signed about 0


def test_a_linear_computes_and_learns_as_torchaos() -> None:
    tensors, _ = golden("qat")
    real, direction = tensors["group4_even.real"], tensors["direction"]
    module = FakeQuantLinear.of(make_linear(real, None), bits=4, group_size=GROUP, symmetric=True, grid="gptq")
    y = module(torch.eye(real.shape[1]))  # [in, out]: the rounded matrix
    assert torch.equal(y.T, tensors["group4_even.out"])
    (y.T * direction).sum().backward()
    assert torch.allclose(module.base.weight.grad, tensors["group4_even.grad"], atol=1e-6)


def test_the_gradient_is_the_identity_inside_and_zero_outside() -> None:
    """Of a grid of four points -1.0, -0.5, 0.0 and 0.5: rounding decides which code a number has, and so its side."""
    real = torch.tensor([[-9.0, -1.26, -1.24, -1.0, -0.3, 0.0, 0.3, 0.5, 0.74, 0.76, 9.0]]).double().requires_grad_()
    scale, zero = torch.tensor([[0.5]]).double(), torch.tensor([[2.0]]).double()
    out = ops.load("fake_quantize")(real, scale, zero, 0, 3)
    assert out.tolist() == [[-1.0, -1.0, -1.0, -1.0, -0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 0.5]]
    weights = torch.arange(1.0, 12.0).double()
    (gradient,) = torch.autograd.grad((out * weights).sum(), real)
    inside = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    assert torch.equal(gradient, inside * weights)


def rows_of(step: str, architecture: str, steps: int = 3, lr: float = 3e-3) -> ModelRun:
    run = toy_run(architecture)
    for method in parse(step).steps:
        run.apply(method)
    fit(run, steps=steps, lr=lr)
    return run


def fakes(run: ModelRun) -> dict[str, FakeQuantLinear]:
    return {path: module for path, module in Blocks(run.model).linears() if isinstance(module, FakeQuantLinear)}


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (2, True), (2, False)])
def test_what_is_packed_is_what_was_trained(bits: int, symmetric: bool, architecture: str, tmp_path: Path) -> None:
    """Logits are those of the last pass of training, codes are those of rtn, and files hold so many bits."""
    before = probe(toy_run(architecture))
    run = rows_of(f"qat(bits={bits}, symmetric={symmetric}, group_size=48)", architecture)
    trained = fakes(run)
    assert trained and len(trained) == len(run.linears())
    logits = probe(run)
    rounding = RTN(bits=bits, symmetric=symmetric, group_size=48)
    expected: dict[str, Any] = {}
    for path, module in trained.items():
        layer = view_layer(path, module.base, Inputs(set(), 1), seed=0)
        expected[path] = rounding.compress(layer)
        assert torch.equal(dense_weight(module), dense_weight(expected[path]))
    run.settle()
    assert torch.equal(probe(run), logits) and not torch.allclose(logits, before, atol=1e-2)
    for path, packed in Blocks(run.model).linears():
        assert isinstance(packed, IntLinear) and packed.bits == bits
        own, rtns = packed.like(), expected[path].like()
        assert own.keys() == rtns.keys() and all(torch.equal(own[name], rtns[name]) for name in own)
        out, groups = packed.out_features, -(-packed.in_features // 48)
        zeros = 0 if symmetric else word_count(out, bits) * groups * 4
        payload = out * word_count(packed.in_features, bits) * 4
        rest = 0 if packed.bias is None else 2 * out
        assert sum(stored_bytes(packed, torch.bfloat16)) == payload + out * groups * 2 + zeros + rest
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    assert torch.equal(probe_model(artifact.load(tmp_path / "model")), probe(run))


def test_without_a_fit_it_is_rtn() -> None:
    runs = []
    for step in ("qat(bits=3)", "rtn(bits=3, symmetric=True)"):
        runs.append(toy_run())
        runs[-1].apply(parse_step(step))
        runs[-1].finish()
    assert torch.equal(probe(runs[0]), probe(runs[1]))


def test_all_that_could_be_trained_is_trained() -> None:
    """Embeddings and norms too, which are not rounded; what earlier steps froze stays frozen."""
    run = toy_run()
    frozen = run.model.model.norm.weight.requires_grad_(False)
    start = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.apply(QAT())
    fit(run, steps=2)
    now = dict(run.model.named_parameters())
    same = {name for name, value in start.items() if name in now and torch.equal(now[name], value)}
    assert same == {"model.norm.weight"} and now["model.norm.weight"] is frozen
    assert type(run.model.lm_head) is nn.Linear and type(run.model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("step", ["wanda(sparsity=0.6)", "magnitude(pattern='2:4')"])
def test_pruned_weights_stay_zero(step: str) -> None:
    run = rows_of(f"{step}, qat(group_size=32)", "llama", lr=1e-2)
    masks = {path: kept(module) for path, module in fakes(run).items()}
    run.finish()
    for path, packed in Blocks(run.model).linears():
        assert isinstance(packed, NMIntLinear if "2:4" in step else IntLinear)
        weight, mask = dense_weight(packed), masks[path]
        assert mask is not None and not weight[~mask].any() and weight[mask].any()


def test_a_packed_linear_is_trained_from_its_decoded_weights() -> None:
    run = toy_run()
    run.apply(parse_step("nf4()"))
    before = {path: dense_weight(module) for path, module in Blocks(run.model).linears()}
    run.apply(QAT(bits=8))
    assert all(torch.equal(module.base.weight, before[path]) for path, module in fakes(run).items())


def test_at_two_bits_training_through_the_rounding_beats_rounding_after_training() -> None:
    """On what was trained on, with equal steps: the order that the method exists for."""
    losses = {}
    for first, last in (("qat(bits=2)", ""), ("", "rtn(bits=2, symmetric=True)")):
        run = toy_run()
        run.data.pool = run.data.pool[:16]
        for step in parse(first).steps:
            run.apply(step)
        fit(run, steps=20, lr=3e-4)
        for step in parse(last).steps:
            run.apply(step)
        run.finish()
        ids = torch.tensor([example.ids for example in run.data.pool])
        with torch.no_grad():
            losses[first] = float(run.model(ids, labels=ids).loss)
    assert losses["qat(bits=2)"] < losses[""] - 0.1, losses


def test_groups_of_a_short_rest_have_grids_of_their_own() -> None:
    weight = torch.randn(6, 80)
    module = FakeQuantLinear.of(make_linear(weight, None), bits=4, group_size=32, symmetric=False, grid="gptq")
    parts = [fit_grid(part, 4).as_stored().round(part).flatten(1) for part in split_groups(weight, 32)]
    assert torch.equal(dense_weight(module), torch.cat(parts, 1)) and len(parts) == 2


@pytest.mark.parametrize("bad", ["qat(bits=5)", "qat(group_size=0)"])
def test_settings_that_mean_nothing_are_refused(bad: str) -> None:
    with pytest.raises(Usage, match=r"bits must|group_size must"):
        parse_step(bad)
