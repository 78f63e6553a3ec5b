"""rsLoRA, DoRA, VeRA and AdaLoRA on one linear against peft, and what all low-rank methods do beside any linear."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from toys_training import fit
from transformers.pytorch_utils import Conv1D

from effbench.checks import probe, toy_run
from effbench.core.errors import Usage
from effbench.core.kinds import Swap
from effbench.core.recipe import parse, parse_step
from effbench.core.views import Site
from effbench.formats.codebook import LutLinear, spread
from effbench.methods.peft._lowrank import LowRankLinear
from effbench.methods.peft.adalora import AdaLoRA, SVDLinear
from effbench.methods.peft.dora import DoRA, DoRALinear
from effbench.methods.peft.lora import LoRA
from effbench.methods.peft.rslora import RsLoRA
from effbench.methods.peft.vera import VeRA, VeRALinear
from effbench.methods.quant.nf4 import LEVELS, quantize
from effbench.nn.model.linear import MaskedLinear, dense_weight, make_linear
from effbench.nn.run import ModelRun

with safe_open(Path(__file__).parent.parent.parent / "golden" / "low_rank.safetensors", "pt") as file:
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    FACTS = file.metadata()

RANK, ALPHA = int(FACTS["rank"]), float(FACTS["alpha"])
PAIR = {"a": "lora_A", "b": "lora_B"}
ONE: dict[str, tuple[Swap, dict[str, str]]] = {  # settings as peft's, and what peft calls the trained tensors
    "rslora": (RsLoRA(rank=RANK, alpha=ALPHA), PAIR),
    "dora": (DoRA(rank=RANK, alpha=ALPHA), PAIR | {"m": "lora_magnitude_vector"}),
    "dora_dropout": (DoRA(rank=RANK, alpha=ALPHA, dropout=0.4), PAIR | {"m": "lora_magnitude_vector"}),
    "vera": (VeRA(rank=RANK), {"b": "vera_lambda_b", "d": "vera_lambda_d"}),
    "adalora": (AdaLoRA(rank=2, initial_rank=RANK, alpha=ALPHA), {"p": "lora_B", "singular": "lora_E", "q": "lora_A"}),
}
METHODS: list[Swap] = [LoRA(rank=4), RsLoRA(rank=4), DoRA(rank=4), VeRA(rank=16), AdaLoRA()]
LINEARS = ["plain", "bias", "conv1d", "square", "nf4", "masked"]


def site(out: int, width: int, seed: int = 3) -> Site:
    prepared = {"seed": seed, "width": width, "height": out}
    return Site(path="q_proj", kind="linear", role="q", block=0, seed=0, prepared=prepared)


def golden(kind: str) -> tuple[Swap, Any, dict[str, str], dict[str, Tensor]]:
    """The method, its module beside peft's linear, names, and peft's numbers."""
    method, names = ONE[kind]
    found = {name.removeprefix(f"{kind}."): tensor for name, tensor in GOLDEN.items() if name.startswith(f"{kind}.")}
    linear = make_linear(found["weight"].clone(), found["bias"])
    return method, method.replace(linear, site(24, 40)), names, found


@pytest.mark.parametrize("kind", ONE)
def test_outputs_gradients_and_merged_weight_are_those_of_peft(kind: str) -> None:
    method, module, names, found = golden(kind)
    for ours, theirs in names.items():
        assert getattr(module, ours).shape == found[theirs].shape, ours
        getattr(module, ours).data = found[theirs].clone()
    torch.manual_seed(7)
    y = module.train()(found["x"])
    loss = y.square().mean()
    if isinstance(method, AdaLoRA):
        stub: Any = SimpleNamespace(model=nn.ModuleList([module]))
        loss = loss + method.loss({}, None, stub)["orthogonality"]
    loss.backward()
    torch.testing.assert_close(loss, found["loss"], rtol=0, atol=1e-6)
    gradients = {f"{theirs}.grad": getattr(module, ours).grad for ours, theirs in names.items()}
    merged = method.settle(module)
    for name, value in ({"y": y, "merged": merged.weight} | gradients).items():
        torch.testing.assert_close(value, found[name], rtol=0, atol=1e-6, msg=name)
    assert torch.equal(merged.bias, found["bias"])


@pytest.mark.parametrize("kind", ONE)
def test_they_start_where_peft_starts(kind: str) -> None:
    _, module, names, found = golden(kind)
    for ours, theirs in names.items():
        start, own = found[f"start.{theirs}"], getattr(module, ours)
        if start.std() == 0 or theirs == "lora_magnitude_vector":  # not drawn
            torch.testing.assert_close(own, start, rtol=0, atol=1e-6, msg=ours)
        else:
            assert float(own.std()) == pytest.approx(float(start.std()), rel=0.2), ours
    if kind == "vera":
        assert torch.equal(module.shared_a, found["vera_A"]) and torch.equal(module.shared_b, found["vera_B"])


def linear(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    out, width = (32, 32) if kind == "square" else (48, 32)
    weight = 0.1 * torch.randn(out, width, generator=generator)
    bias = torch.randn(out, generator=generator)
    if kind in ("conv1d", "square"):
        conv = Conv1D(out, width)
        conv.weight.data, conv.bias.data = weight.T.contiguous().to(dtype), bias.to(dtype)
        return conv
    if kind == "nf4":
        codes, absmax = quantize(weight, 16)
        return LutLinear.of(codes, LEVELS, bits=4, block=16, absmax=absmax, bias=bias)
    if kind == "masked":
        return MaskedLinear.of(weight.to(dtype), torch.rand(out, width, generator=generator) > 0.5, bias.to(dtype))
    return make_linear(weight.to(dtype), None if kind == "plain" else bias.to(dtype))


def stir(module: nn.Module) -> None:
    """Move what is trained, magnitudes too, as a fit does."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters(recurse=False):
        if name != "bias":
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_beside_any_linear_it_starts_as_that_and_merges_as_it_computes(method: Swap, kind: str) -> None:
    plain = linear(kind)
    decoded, x = dense_weight(plain).clone(), torch.randn(5, 32)
    expected = plain(x)
    method = dataclasses.replace(method, merge="masked" if kind == "masked" else "dense")
    module = method.replace(plain, site(*decoded.shape)).eval()
    assert torch.allclose(module(x), expected, atol=1e-6) and torch.equal(module.dense_weight(), decoded)
    stir(module)
    separate = module(x).detach()
    assert float((separate - expected.detach()).abs().max()) > 0.05
    merged = method.settle(module)
    assert torch.allclose(merged(x), separate, atol=1e-5)
    assert not isinstance(merged, LowRankLinear) and torch.equal(merged.bias, module.bias) if kind != "plain" else True
    if kind == "masked":
        assert isinstance(merged, MaskedLinear) and not merged.weight[decoded == 0].any()


@pytest.mark.parametrize("kind", ["bias", "nf4", "masked"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_dropout_acts_in_training_alone(method: Swap, kind: str) -> None:
    module = dataclasses.replace(method, dropout=0.5).replace(linear(kind), site(48, 32))
    stir(module)
    x = torch.randn(3, 32)
    module.train()
    assert not torch.allclose(module(x), module(x))
    module.eval()
    whole = module(x)
    assert torch.equal(module(x), whole)
    module.train()
    with torch.no_grad():
        mean = torch.stack([module(x) for _ in range(400)]).mean(0)  # what is dropped is made up for
    assert float((mean - whole).norm() / whole.norm()) < 0.15


@pytest.mark.parametrize("method", [method for method in METHODS if method.key != "vera"], ids=lambda m: m.key)
def test_the_product_counts_by_alpha_and_rank(method: Any) -> None:
    def product(**settings: Any) -> Tensor:
        torch.manual_seed(0)
        module = dataclasses.replace(method, **settings).replace(linear("plain"), site(48, 32))
        stir(module)
        if isinstance(module, DoRALinear):
            module.m.data = torch.linalg.vector_norm(super(DoRALinear, module).dense_weight(), dim=1)
        return module.dense_weight() - dense_weight(linear("plain"))

    assert torch.allclose(product(alpha=64.0), 2 * product(alpha=32.0), atol=1e-5)
    module = method.replace(linear("plain"), site(48, 32))
    ranks = {"rslora": math.sqrt(4), "adalora": 12 + 1e-5}
    assert module.scaling == pytest.approx(32.0 / ranks.get(method.key, 4))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_sums_are_in_float32_and_rounded_once(method: Swap) -> None:
    module = method.replace(linear("plain", torch.bfloat16), site(48, 32)).eval()
    stir(module)
    exact = module.dense_weight()
    assert exact.dtype == torch.float32 and not torch.equal(exact, exact.bfloat16().float())
    merged = dataclasses.replace(method, merge="masked").settle(module)
    assert merged.weight.dtype == torch.bfloat16 and torch.equal(merged.weight, exact.bfloat16())
    x = torch.randn(7, 32).bfloat16()
    y = module(x)
    wide = nn.functional.linear(x.float(), exact)
    assert y.dtype == torch.bfloat16 and float((y.float() - wide).norm() / wide.norm()) < 2**-8


def counts(run: ModelRun, method: Swap) -> tuple[int, list[tuple[int, int]]]:
    """Trainable numbers after a method, and the shapes of the linears that it adapts."""
    shapes = [dense_weight(module).shape for path, module in run.linears().items() if method.wants(path)]
    run.apply(method)
    return sum(p.numel() for p in run.model.parameters() if p.requires_grad), [(out, width) for out, width in shapes]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_trained_is_counted_by_the_right_formulas(architecture: str) -> None:
    names = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc")}[architecture]
    for targets in ("all", names):
        found = {}
        for method in METHODS:
            run = toy_run(architecture)
            found[method.key], shapes = counts(run, dataclasses.replace(method, targets=targets))
        lora = sum(4 * (out + width) for out, width in shapes)
        assert found["lora"] == found["rslora"] == lora
        assert found["dora"] == lora + sum(out for out, _ in shapes)
        assert found["vera"] == sum(out + 16 for out, _ in shapes)
        assert found["adalora"] == sum(12 * (out + width + 1) for out, width in shapes)


def test_the_error_of_a_merge_into_four_bits_is_that_of_rounding_again() -> None:
    for method in METHODS:
        base = linear("nf4")
        module = method.replace(base, site(48, 32))
        stir(module)
        exact = module.dense_weight()
        merged = method.settle(module)
        assert isinstance(merged, LutLinear)
        codes, absmax = quantize(exact, 16)
        again = LEVELS[codes] * spread(absmax, 16, (48, 32))
        assert torch.allclose(dense_weight(merged), again, atol=1e-6)
        gap = float(LEVELS.sort().values.diff().max()) / 2  # of neighbours, in units of a block's largest weight
        assert bool(((dense_weight(merged) - exact).abs() <= gap * spread(absmax, 16, (48, 32)) + 1e-6).all())


def test_magnitudes_are_constants_where_the_direction_is_differentiated() -> None:
    module: Any = DoRA(rank=4).replace(linear("bias"), site(48, 32))
    stir(module)
    x, target = torch.randn(9, 32), torch.randn(9, 48)
    (module(x) * target).sum().backward()
    a, b, m = (getattr(module, name).detach().double().requires_grad_() for name in "abm")
    direction = dense_weight(linear("bias")).double() + module.scaling * b @ a
    norm = direction.norm(dim=1)
    bias = module.bias.double()
    for held, agrees in ((norm.detach(), True), (norm, False)):  # with the norm differentiated it is another gradient
        y = x.double() @ ((m / held)[:, None] * direction).T + bias
        expected = torch.autograd.grad((y * target).sum(), (a, b, m), retain_graph=True)
        close = [
            torch.allclose(getattr(module, name).grad.double(), gradient, atol=1e-4)
            for name, gradient in zip("abm", expected, strict=True)
        ]
        assert all(close[:2]) == agrees and close[2]


def test_a_row_of_zeros_stays_one() -> None:
    plain = linear("plain")
    plain.weight.data[3] = 0
    module = DoRA(rank=4).replace(plain, site(48, 32))
    y = module(torch.randn(5, 32))
    y.square().sum().backward()
    assert not y[:, 3].any() and all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_both_vectors_of_vera_get_gradients() -> None:
    def first(initial: float) -> VeRALinear:
        module = VeRALinear.of(linear("plain"), rank=8, seed=0, width=32, height=48, initial=initial)
        for _ in range(2):
            module.zero_grad()
            module(torch.ones(2, 32)).sum().backward()
            module.b.data -= 0.1 * module.b.grad
            module.d.data -= 0.1 * module.d.grad
        return module

    module = first(0.1)
    assert module.b.grad.any() and module.d.grad.any()
    frozen = first(0.0)  # both zero: nothing ever moves
    assert not frozen.b.grad.any() and not frozen.d.grad.any()
    with pytest.raises(Usage, match="initial must not be 0"):
        VeRA(initial=0)


def test_all_linears_share_one_pair() -> None:
    run = toy_run(seed=5)
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    run.apply(VeRA(rank=16))
    modules = [module for module in run.model.modules() if isinstance(module, VeRALinear)]
    assert len({module.shared_a.data_ptr() for module in modules}) == 1
    assert len({module.shared_b.data_ptr() for module in modules}) == 1
    assert modules[0].shared_a.shape == (16, 256) and modules[0].shared_b.shape == (256, 16)
    fit(run, steps=2)
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters() if n in before)
    again = VeRALinear(128, 128, rank=16, seed=5, width=256, height=256)
    assert again.shared_a.data_ptr() == modules[0].shared_a.data_ptr()
    other = VeRALinear(128, 128, rank=16, seed=6, width=256, height=256)
    assert not torch.equal(other.shared_a, again.shared_a)
    run.model.bfloat16()
    run.model.float()  # what was rounded on the way is drawn again
    assert torch.equal(modules[1].shared_a, again.shared_a)
    assert not any("shared" in name for name in run.model.state_dict())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_over_four_bits_a_run_trains_it_and_merges(method: Swap, architecture: str) -> None:
    runs = {}
    for merge in ("masked", "dense", "separate"):
        run = toy_run(architecture, shape={"layers": 1})
        run.apply(parse_step("nf4()"))
        start = probe(run)
        run.apply(dataclasses.replace(method, merge=merge))
        assert torch.allclose(probe(run), start, atol=1e-5)
        fit(run, steps=6, lr=1e-2)
        runs[merge] = run
    before = probe(runs["dense"])
    assert not torch.allclose(before, start, atol=1e-2)
    for run in runs.values():
        run.settle()
    assert torch.allclose(probe(runs["dense"]), before, atol=1e-4)
    assert torch.allclose(probe(runs["separate"]), before, atol=1e-4)
    assert all(type(module) is nn.Linear for module in runs["dense"].linears().values())
    assert all(isinstance(module, LutLinear) for module in runs["masked"].linears().values())
    kept = [module for module in runs["separate"].model.modules() if isinstance(module, SVDLinear)]
    if kept:
        assert sum(len(module.q) for module in kept) == 8 * len(kept)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("dora(rank=0)", "rank must be at least 1"),
        ("rslora(alpha=0)", "alpha must be above 0"),
        ("vera(dropout=1)", "dropout must be in"),
        ("adalora(rank=0)", "rank must be at least 1"),
        ("adalora(rank=13)", "initial_rank must be at least rank"),
        ("adalora(warmup=0.5, final=0.5)", "leave no part"),
        ("adalora(beta=1)", "beta must be in"),
        ("vera(alpha=2)", "alpha"),
    ],
)
def test_wrong_usage(step: str, message: str) -> None:
    with pytest.raises(Usage, match=message):
        parse_step(step)


def count_left(run: ModelRun, rank: int) -> int:
    linears = [
        module for module in run.model.modules() if isinstance(module, SVDLinear) and module.initial_rank == rank
    ]
    return sum(int((module.singular != 0).sum()) for module in linears)


def test_two_steps_of_adalora_keep_budgets_of_their_own() -> None:
    """Inner and outer ones of a linear alike, of unlike ranks."""
    run = toy_run()
    for step in ("adalora(rank=2, initial_rank=3)", "adalora(rank=1, initial_rank=4)"):
        run.apply(parse_step(step))
    fit(run, steps=10, lr=1e-2)
    linears = sum(isinstance(module, SVDLinear) and module.initial_rank == 3 for module in run.model.modules())
    assert (count_left(run, 3), count_left(run, 4)) == (2 * linears, linears)


@pytest.mark.parametrize("second", ["adalora(adapter='b')", "lora(adapter='b')"])
def test_an_adapter_that_is_not_chosen_waits(second: str) -> None:
    run = toy_run()
    for step in ("adalora(adapter='a', rank=2, initial_rank=3)", second):
        run.apply(parse_step(step))
    fit(run, steps=10, lr=1e-2)
    assert count_left(run, 3) == 0  # lambdas are as they began


def test_rates_of_factors_need_a_low_rank_step_since_the_last_fit() -> None:
    for steps in ("lora(), fit(), lora_plus(), fit()", "lora(), fit(), wanda(), lora_plus(), fit()"):
        with pytest.raises(Usage, match=r"lora_plus\(\) needs a low-rank step before it"):
            parse(steps).check_fits()
    parse("fit(), lora(), lora_plus(), fit()").check_fits()
