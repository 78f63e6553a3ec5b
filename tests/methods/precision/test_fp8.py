"""fp8: casts, scales and products are torchao's, and those of float64; what a saturating cast hides is counted."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from toys_training import fit, seen
from transformers.pytorch_utils import Conv1D

from effbench import ops
from effbench.checks import toy_run
from effbench.core.errors import Diverged, Unsupported, Usage
from effbench.core.kinds import Train
from effbench.core.recipe import parse, parse_step
from effbench.core.run import Step
from effbench.core.views import Example
from effbench.methods.precision.fp8 import FP8, MARGIN, Delayed, next_scale
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import MaskedLinear
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import IGNORED

GOLDEN = Path(__file__).parent.parent.parent / "golden"


def read(name: str) -> dict[str, Tensor]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


TORCHAO, DELAYED = read("float8"), read("float8_delayed")
HISTORY = 3  # of the golden tensors
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # bits of mantissa, least exponent, largest number


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-6 * theirs.abs().max())


def rounded(x: Tensor, kind: tuple[int, int, float]) -> Tensor:
    """float64 numbers to the nearest ones of a format, ties to even: by hand."""
    mantissa, least, largest = kind
    exponent = torch.frexp(x)[1].double() - 1  # 2^e <= |x| < 2^(e+1)
    step = 2.0 ** (exponent.clamp(min=least) - mantissa)
    return ((x / step).round() * step).clamp(-largest, largest)


def opened(method: FP8, linears: int = 1) -> tuple[ModelRun, Delayed]:
    run, delayed = toy_run(), Delayed(method)
    run.step = Step(0, 8)
    delayed.open(run, linears)
    return run, delayed


@contextlib.contextmanager
def passing(run: ModelRun, delayed: Delayed, tokens: int) -> Iterator[None]:
    """A pass of the fit, of so many tokens that all count."""
    with delayed.forward(run):
        delayed.counted = torch.ones(tokens, dtype=torch.bool)
        yield


# Casts


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_casts_and_scales_are_those_of_torchao(name: str) -> None:
    quantize, x = ops.load("fp8_quantize"), TORCHAO["x"]
    codes, largest, infinite = quantize(x, TORCHAO[f"{name}.scale"], name == "e5m2")
    assert torch.equal(codes, TORCHAO[f"{name}.codes"]) and infinite == 0 and largest == x.abs().max()
    found = next_scale(torch.full((3,), float(largest)), torch.ones(3), 0)
    assert found[2 if name == "e5m2" else 0] == TORCHAO[f"{name}.scale"]
    edges, largest, infinite = quantize(TORCHAO["edges"], torch.ones(()), name == "e5m2")
    assert torch.equal(edges, TORCHAO[f"{name}.edges"])
    assert infinite == 2 and largest == math.inf  # which the codes do not show
    kind = torch.float8_e5m2 if name == "e5m2" else torch.float8_e4m3fn
    assert edges.view(kind).float().isfinite().all()


@pytest.mark.parametrize(("gradients", "kind"), [(False, E4M3), (True, E5M2)])
def test_casts_round_to_the_nearest_number(gradients: bool, kind: tuple[int, int, float]) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 6, 4096)
    codes, *_ = ops.load("fp8_quantize")(x, torch.tensor(4.0), gradients)
    values = codes.view(torch.float8_e5m2 if gradients else torch.float8_e4m3fn).double()
    assert torch.equal(values, rounded(4 * x.double(), kind))


def test_not_a_number_is_counted() -> None:
    codes, largest, infinite = ops.load("fp8_quantize")(torch.tensor([1.0, math.nan]), torch.ones(()))
    assert infinite == 1 and largest.isnan() and codes.view(torch.float8_e4m3fn).float()[1].isnan()


# Scales


def test_scales_stay_where_the_history_says_nothing() -> None:
    before = torch.arange(1.0, 7.0)
    after = next_scale(torch.tensor([0.0, math.inf, math.nan, 4.0, 1e-44, 4.0]), before, 0)
    assert after.tolist() == [1, 2, 3, 112, torch.finfo(torch.float32).max, 14336]


def test_the_margin_is_a_power_of_two() -> None:
    """Dividing by it instead gives infinity at the usual margin of 0, and no room at all at 1."""
    largest = torch.full((3,), 2.0)
    scales = [next_scale(largest, torch.ones(3), margin) for margin in (0, 1, 3)]
    assert scales[0].tolist() == [224, 224, 28672]
    assert torch.equal(scales[1], scales[0] / 2) and torch.equal(scales[2], scales[0] / 8)


@pytest.mark.parametrize("margin", [0, 7, 14, 15])
def test_up_to_the_greatest_margin_the_largest_magnitude_is_a_normal_number(margin: int) -> None:
    scale = next_scale(torch.full((3,), 1.7), torch.ones(3), margin)[0]
    codes, *_ = ops.load("fp8_quantize")(torch.tensor([1.7]), scale)
    normal = codes.view(torch.float8_e4m3fn).float() >= torch.finfo(torch.float8_e4m3fn).smallest_normal
    assert bool(normal) is (margin <= MARGIN)


def test_the_largest_of_the_history_counts_not_the_last() -> None:
    run, delayed = opened(method := FP8(history=3))
    told = []
    for size in (8.0, 1.0, 2.0, 1.0, 1.0):
        run.state(method)["largest"].fill_(size)
        delayed.settle(True, run)
        told.append(448 / float(run.state(method)["scale"][0]))
    assert told == [8, 8, 8, 2, 2]


def test_delayed_scaling_is_that_of_torchao() -> None:
    run, delayed = opened(method := FP8(history=HISTORY))
    layer = nn.Linear(40, 24, bias=False)
    for step in range(len(DELAYED["x"])):
        expected = {name: values[step] for name, values in DELAYED.items()}
        assert torch.equal(run.state(method)["scale"], expected["scales"])
        layer.weight.data, layer.weight.grad = expected["weight"].clone(), None
        x = expected["x"].clone().requires_grad_()
        with passing(run, delayed, len(x)):
            y = delayed.apply(run, 0, layer, layer.forward, x)
        y.backward(expected["g"])
        assert x.grad is not None and layer.weight.grad is not None
        assert close(y, expected["y"]) and close(x.grad, expected["x.grad"])
        assert close(layer.weight.grad, expected["weight.grad"])
        assert delayed.unscale([layer.weight], run)
        delayed.settle(True, run)
    assert len({float(value) for value in DELAYED["scales"][:, 0]}) > 3


def test_delayed_scaling_is_what_float64_says() -> None:
    """Two linears, margin 1, a history of 2: all three products of each from numbers rounded by hand."""
    run, delayed = opened(method := FP8(history=2, margin=1), linears=2)
    generator = torch.Generator().manual_seed(1)
    seen: list[list[float]] = [[] for _ in range(6)]
    scales = [1.0] * 6
    tops = [448.0, 448.0, 57344.0] * 2
    for step in range(5):
        for number in range(2):
            layer = nn.Linear(16, 8)
            x = ((3.0 ** (step % 3)) * torch.randn(6, 16, generator=generator)).requires_grad_()
            g = 1e-3 * (step + 1) * torch.randn(6, 8, generator=generator)
            with passing(run, delayed, len(x)):
                y = delayed.apply(run, number, layer, layer.forward, x)
            y.backward(g)
            parts = [x.detach().double(), layer.weight.detach().double(), g.double()]
            a, w, d = (
                rounded(part * scales[3 * number + place], E5M2 if place == 2 else E4M3) / scales[3 * number + place]
                for place, part in enumerate(parts)
            )
            assert x.grad is not None and layer.weight.grad is not None
            assert close(y.double(), a @ w.T + layer.bias.double()) and close(x.grad.double(), d @ w)
            assert close(layer.weight.grad.double(), d.T @ a)
            for place, part in enumerate(parts):
                seen[3 * number + place].append(float(part.abs().max()))
        delayed.settle(True, run)
        scales = [top / max(largest[-2:]) / 2 for top, largest in zip(tops, seen, strict=True)]
        assert run.state(method)["scale"].tolist() == pytest.approx(scales, rel=1e-6)
        scales = run.state(method)["scale"].double().tolist()  # rounded to float32


# Linears


@pytest.mark.parametrize("sort", ["linear", "conv1d", "masked"])
def test_a_linear_computes_what_torchao_emulates(sort: str) -> None:
    run, delayed = opened(method := FP8())
    weight, bias = TORCHAO["weight"], TORCHAO["bias"]
    layer: Any = nn.Linear(40, 24)
    if sort == "conv1d":
        layer = Conv1D(24, 40)
    elif sort == "masked":
        layer = MaskedLinear.of(weight, torch.ones_like(weight, dtype=torch.bool), bias)
    layer.weight.data, layer.bias.data = (weight.T if sort == "conv1d" else weight).clone(), bias.clone()
    x = TORCHAO["inputs"].clone().requires_grad_()
    largest = torch.stack([TORCHAO[name].abs().max() for name in ("inputs", "weight", "gradient")])
    run.state(method)["scale"] = next_scale(largest, torch.ones(3), 0)
    with passing(run, delayed, len(x)):
        y = delayed.apply(run, 0, layer, layer.forward, x)
    y.backward(TORCHAO["gradient"])
    grad = layer.weight.grad.T if sort == "conv1d" else layer.weight.grad
    assert close(y, TORCHAO["y"]) and close(x.grad, TORCHAO["inputs.grad"])  # type: ignore[arg-type]
    assert close(grad, TORCHAO["weight.grad"]) and close(layer.bias.grad, TORCHAO["bias.grad"])
    assert torch.equal(run.state(method)["largest"], largest)


def test_what_is_evaluated_in_a_fit_is_as_it_is() -> None:
    run, delayed = opened(method := FP8())
    layer = nn.Linear(16, 8).eval()
    x = torch.randn(4, 16)
    assert torch.equal(delayed.apply(run, 0, layer, layer.forward, x), layer(x))
    with delayed.forward(run), torch.no_grad():  # a text that is written to be learned from
        assert not torch.equal(delayed.apply(run, 0, layer, layer.forward, x), layer(x))
    assert not run.state(method)["largest"].any()


def test_linears_of_the_blocks_and_no_others_are_rounded() -> None:
    run = toy_run()
    run.apply(method := FP8())
    patched: list[str] = []
    states: list[dict[str, Tensor]] = []

    def watch(run: Any) -> None:
        patched[:] = [name for name, module in run.model.named_modules() if "forward" in vars(module)]
        states.append({name: tensor.clone() for name, tensor in run.state(method).items()})

    seen(run, watch)
    fit(run, steps=3, accumulate=2)
    linears = [path for path, _ in Blocks(run.model).linears()]
    assert sorted(patched) == sorted(linears) and not any("head" in name or "embed" in name for name in patched)
    assert not any("forward" in vars(module) for module in run.model.modules())
    assert run.log.simulated and run.log.to_json()["simulated"]
    history, scale = states[-1]["history"], states[-1]["scale"]
    assert (history[:, :3] > 0).all() and not history[:, 3:].any()  # a column a step, also where it has two parts
    assert torch.equal(scale, next_scale(history.amax(1), torch.ones(len(history)), 0)) and (scale != 1).all()
    assert set(states[0]["largest"].tolist()) == {0.0}


STILL = {"opt": {"dropout": 0.0}, "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


def noted(architecture: str, lengths: Sequence[int], before: str = "", **changes: Any) -> Tensor:
    """The largest magnitudes of the first two steps [3 L, 2] of a fit on examples of these lengths."""
    run = toy_run(architecture, shape=STILL.get(architecture, {}))
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randint(1, 95, (length,), generator=generator).tolist() for length in lengths]
    run.data.pool = [Example(str(i), tuple(ids), 0) for i, ids in enumerate(draw)]
    for step in parse(", ".join(filter(None, [before, "fp8()"]))).steps:
        run.apply(step)
    states: list[dict[str, Tensor]] = []
    method = next(method for method in run.train.methods if isinstance(method, FP8))
    seen(run, lambda run: states.append({name: tensor.clone() for name, tensor in run.state(method).items()}))
    fit(run, **{"steps": 2, "batch_size": len(lengths), "lr": 1e-3} | changes)
    return states[-1]["history"][:, :2]


@pytest.mark.parametrize(
    ("architecture", "before"),
    [
        ("llama", ""),
        ("llama", "prompt_tuning(length=3)"),
        ("opt", ""),
        ("opt", "prompt_tuning(length=3)"),
        ("gpt2", "lora()"),
        ("mixtral", ""),
    ],
)
def test_how_a_step_is_cut_changes_no_scale(architecture: str, before: str) -> None:
    """Whole and padded, packed, or one example at a time, of which the longest has no padding at all."""
    cuts: list[dict[str, Any]] = [{}, {"accumulate": 4}, {"layout": "packed"}]
    if "prompt" in before:
        cuts.pop()  # examples of one row share the soft prompt, and its gradients are summed before they are rounded
    whole, *others = (noted(architecture, [24, 6, 9, 15], before, **changes) for changes in cuts)
    assert (whole[0::3] > 0).all() and (whole[1::3] > 0).all()  # inputs and weights
    for other in others:
        torch.testing.assert_close(other, whole, rtol=1e-3, atol=0)  # sums in another order may round to other codes


@pytest.mark.parametrize("policy", ["every", "sqrt"])
def test_what_is_computed_again_counts_once(policy: str) -> None:
    """When a part is computed again, tokens that count are no longer known, or those of another part are."""
    plain, again = (
        noted("llama", [24, 6, 9, 15], before, accumulate=2) for before in ("", f"checkpointing(policy='{policy}')")
    )
    assert torch.equal(plain, again)


def test_examples_of_which_nothing_is_learned_do_not_count() -> None:
    """Alone in a part they are left out."""

    @dataclasses.dataclass(frozen=True)
    class Masking(Train):
        def batch(self, batch: dict[str, Tensor], run: Any) -> dict[str, Tensor]:
            return batch | {"labels": batch["labels"].masked_fill(batch["input_ids"][:, :1] % 2 == 0, IGNORED)}

    found = []
    for accumulate in (1, 4):
        run = toy_run()
        run.data.pool = [Example(str(i), (i + 1, *range(20 + i, 30 + 5 * i)), 0) for i in range(4)]
        run.apply(Masking())
        run.apply(method := FP8())
        histories: list[Tensor] = []
        seen(run, lambda run, into=histories, method=method: into.append(run.state(method)["history"].clone()))
        fit(run, steps=1, accumulate=accumulate)
        found.append(histories[0][:, 0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_a_method_that_feeds_other_rows_tells_padding_by_its_mask() -> None:
    run, delayed = opened(method := FP8())
    run.train.claim("forward", object(), method)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    with delayed.forward(run, {}):
        delayed.see(run, run.model, (), {"inputs_embeds": torch.zeros(2, 3, 4), "attention_mask": mask})
        assert delayed.counted is not None and delayed.counted.tolist() == [True, True, True, True, False, False]
        with torch.no_grad():
            delayed.see(run, run.model, (), {"inputs_embeds": torch.zeros(2, 3, 4), "attention_mask": mask})
        assert delayed.counted is None


def test_a_base_under_lora_is_rounded_and_packed_linears_are_not() -> None:
    plain, run = toy_run(), toy_run()
    for one, steps in ((plain, "lora()"), (run, "lora(), fp8()")):
        for step in parse(steps).steps:
            one.apply(step)
    assert fit(plain)["loss_first"] != fit(run)["loss_first"]
    packed = toy_run()
    for step in parse("nf4(), lora(), fp8()").steps:
        packed.apply(step)
    with pytest.raises(Unsupported, match="every linear of the blocks is packed"):
        fit(packed)


@pytest.mark.parametrize("policy", ["every", "sqrt", "selective"])
def test_what_is_computed_again_is_the_same(policy: str) -> None:
    plain, run = toy_run("opt", shape={"dropout": 0.0}), toy_run("opt", shape={"dropout": 0.0})
    plain.apply(FP8())
    for step in parse(f"checkpointing(policy='{policy}'), fp8()").steps:
        run.apply(step)
    fit(plain), fit(run)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), run.model.parameters(), strict=True))


def test_an_infinity_that_saturates_is_not_hidden() -> None:
    """Every number after the cast is finite, and so is the loss."""

    run = toy_run()
    run.apply(FP8())

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if run.step is not None and run.step.index == 1:
            output.register_hook(lambda gradient: gradient.clamp(min=math.inf))

    run.model.model.layers[0].mlp.down_proj.register_forward_hook(spoil)
    with pytest.raises(Diverged, match="rounded to 8 bits are not finite at step 2"):
        fit(run)


@pytest.mark.parametrize("setting", ["history=0", "margin=-1", "margin=15", "margin=200", "margin=2000"])
def test_bad_settings_are_wrong_usage(setting: str) -> None:
    with pytest.raises(Usage, match="must"):
        parse_step(f"fp8({setting})")
