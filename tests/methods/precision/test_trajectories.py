"""Every precision trains every architecture as float32 does, and computes softmax, norms and the loss in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys_training import fit

from effbench.checks import TOYS, toy_run
from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.recipe import parse, parse_step
from effbench.nn.run import ModelRun

ROUNDED = ["bf16()", "fp16()", "fp8()"]


def prepared(steps: str, architecture: str = "llama") -> ModelRun:
    run = toy_run(architecture)
    for step in parse(steps).steps:
        run.apply(step)
    return run


def trajectory(steps: str, architecture: str, folder: Path) -> Tensor:
    """The loss of each step on one batch; without dropout."""
    run = prepared(steps, architecture)
    for module in run.model.modules():
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    run.data.pool = run.data.pool[:4]
    run.folder = folder / (steps or "none")
    fit(run, steps=6, lr=3e-3)
    return torch.tensor([json.loads(line)["loss"] for line in (run.folder / "fit-1.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("architecture", TOYS)
def test_the_loss_goes_as_that_of_float32(architecture: str, tmp_path: Path) -> None:
    expected = trajectory("fp32()", architecture, tmp_path)
    assert torch.equal(expected, trajectory("", architecture, tmp_path))
    fell = float(expected[0] - expected.min())
    for steps, tolerance in zip(ROUNDED, (0.05, 0.02, 0.1), strict=True):
        distance = (trajectory(steps, architecture, tmp_path) - expected).abs()
        assert 0 < distance.max() < tolerance * fell, (steps, distance, fell)


# What stays in float32

SENSITIVE = ("softmax", "norm", "nll_loss", "rsqrt", "mean")  # RMS norms are made of the last two


class Watch(TorchDispatchMode):
    """Notes softmaxes, norms and losses that are given or give narrow numbers, and all that it looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: set[str] = set()
        self.looked: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if any(part in name for part in SENSITIVE):
            self.looked.add(name)
            tensors = [
                value for value in (*args, *(out if isinstance(out, tuple) else (out,))) if torch.is_tensor(value)
            ]
            if any(tensor.is_floating_point() and tensor.itemsize < 4 for tensor in tensors):
                self.narrow.add(name)
        return out


@pytest.mark.parametrize("architecture", TOYS)
@pytest.mark.parametrize("steps", [*ROUNDED, "fp16(), attention_transfer()"])
def test_softmax_norms_and_loss_are_float32(steps: str, architecture: str) -> None:
    run = prepared(steps, architecture)
    with Watch() as watch:
        fit(run, steps=1)
    assert watch.narrow == set()
    assert {"_log_softmax", "nll_loss_forward", "nll_loss_backward"} <= watch.looked
    norms = {"native_layer_norm", "native_layer_norm_backward"}, {"rsqrt", "mean"}
    assert any(norm <= watch.looked for norm in norms)
    routed = architecture == "mixtral"  # by a softmax over experts
    assert ("_softmax" in watch.looked) == (routed or "attention" in steps)  # that of attention is fused, see below


def test_narrow_ones_are_found() -> None:
    """What the test above would see."""

    @dataclasses.dataclass(frozen=True)
    class Narrow(Train):
        claims: ClassVar = ("train.loss",)

        def loss(self, batch: Any, out: Any, run: Any) -> dict[str, Tensor]:
            return {
                "narrow": nn.functional.cross_entropy(
                    out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
                )
            }

    run = prepared("fp16()", "opt")
    run.apply(Narrow())
    run.model.model.decoder.final_layer_norm.register_forward_pre_hook(lambda _, args: (args[0].half(),))
    with Watch() as watch:
        fit(run, steps=1)
    assert {"_log_softmax", "nll_loss_forward", "native_layer_norm"} <= watch.narrow


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_within_fused_attention_is_float32(dtype: torch.dtype) -> None:
    """Scores 480 + j/16, which 16 bits cannot tell apart."""
    query = torch.tensor([8.0, 1.0]).view(1, 1, 1, 2).to(dtype)
    key = torch.stack([torch.full((16,), 60.0), torch.arange(16) / 16], 1).view(1, 1, 16, 2).to(dtype)
    weights = nn.functional.scaled_dot_product_attention(
        query, key, torch.eye(16).view(1, 1, 16, 16).to(dtype), scale=1.0
    )
    exact = (torch.arange(16) / 16).softmax(0)
    assert len({480 + j / 16 for j in range(16)} & set(map(float, (480 + torch.arange(16) / 16).to(dtype)))) < 8
    torch.testing.assert_close(weights.flatten().float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


# Switches


@pytest.mark.parametrize("before", ["high", "highest"])
def test_fp32_switches_tf32_off_and_back(before: str) -> None:
    kept = torch.get_float32_matmul_precision()
    seen: list[str] = []

    @dataclasses.dataclass(frozen=True)
    class Noting(Train):
        def on_step(self, run: Any) -> None:
            seen.append(torch.get_float32_matmul_precision())

    torch.set_float32_matmul_precision(before)
    try:
        run = prepared("fp32()")
        run.apply(Noting())
        fit(run, steps=1)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(kept)


def test_tf32_needs_a_device_that_has_it() -> None:
    with pytest.raises(Unsupported, match="cpu has no TF32"):
        toy_run().apply(parse_step("tf32()"))


def test_tf32_is_switched_on_for_a_fit_and_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.get_float32_matmul_precision()
    (method,) = parse("tf32()").steps
    run = toy_run()
    with method.context(run):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == kept
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    run.device = torch.device("cuda")
    with pytest.raises(Unsupported, match="Ampere"):
        run.apply(method)


@pytest.mark.parametrize("steps", ["fp32()", "lora(), fp32()", "lora(), fp8()"])
def test_a_16_bit_model_is_float32_inside(steps: str) -> None:
    run = toy_run()
    run.model.bfloat16()
    for step in parse(steps).steps:
        run.apply(step)
    types: set[torch.dtype] = set()

    @dataclasses.dataclass(frozen=True)
    class Noting(Train):
        def loss(self, batch: Any, out: Any, run: Any) -> dict[str, Tensor]:
            types.update(parameter.dtype for parameter in run.model.parameters())
            types.add(out.logits.dtype)
            return {}

    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    run.apply(Noting())
    fit(run, steps=1)
    assert types == {torch.float32}
    assert all(torch.equal(run.model.get_parameter(name), value) for name, value in before.items())
    assert all(p.dtype == torch.bfloat16 for name, p in run.model.named_parameters() if name in before)


# The formats


@pytest.mark.parametrize(
    ("dtype", "exponent", "mantissa", "bits", "largest", "digits"),
    [
        (torch.float32, 8, 23, 32, 3.4e38, 7),
        (torch.float16, 5, 10, 16, 6.5e4, 3.3),
        (torch.bfloat16, 8, 7, 16, 3.4e38, 2.4),
        (torch.float8_e4m3fn, 4, 3, 8, 448, 1.2),
        (torch.float8_e5m2, 5, 2, 8, 57344, 0.9),
    ],
)
def test_formats_are_as_the_table_has_them(
    dtype: torch.dtype, exponent: int, mantissa: int, bits: int, largest: float, digits: float
) -> None:
    info = torch.finfo(dtype)
    assert info.bits == bits == 1 + exponent + mantissa
    assert info.eps == 2.0**-mantissa
    assert info.max == pytest.approx(largest, rel=0.01)
    assert (mantissa + 1) * 0.30103 == pytest.approx(digits, abs=0.25)
    bias = 2 ** (exponent - 1) - 1
    assert info.smallest_normal == 2.0 ** (1 - bias)
    # All of the exponents count, but for the last where it is kept for infinities: E4M3 has none, and 1.75 for it.
    top = (2 - 2 * info.eps) * 2.0 ** (bias + 1) if dtype == torch.float8_e4m3fn else (2 - info.eps) * 2.0**bias
    assert info.max == top


@pytest.mark.parametrize("steps", ["fp16(scale=1e9)", "fp8()"])
def test_each_of_several_rates_begins_with_the_first_scale(steps: str) -> None:
    runs = []
    for rates in ((3e-3, 1e-3), (1e-3, 3e-3)):
        run = prepared(steps)
        report = fit(run, lr=rates)
        alone = prepared(steps)
        expected = fit(alone, lr=report["lr"])
        assert report.get("skipped") == expected.get("skipped") and report["loss_last"] == expected["loss_last"]
        runs += [run, alone]
    parameters = [list(run.model.parameters()) for run in runs]
    for others in parameters[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parameters[0], others, strict=True))
