"""fp16: the scale goes as torch's own, gradients come back right, and what a float16 cannot hold is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from toys_training import fit, seen

from effbench.checks import _stop_after, _Stopped, toy_run
from effbench.core.errors import Diverged, Usage
from effbench.core.kinds import Train
from effbench.core.recipe import parse_step
from effbench.core.run import Step
from effbench.methods.precision.fp16 import FP16, Scaling
from effbench.nn.run import ModelRun

TORCH = {"growth_factor": 2.0, "backoff_factor": 0.5}


def gradients(seed: int, overflow: str) -> list[Tensor]:
    """Scaled gradients of two tensors, one of which may have overflowed."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(5, 3, generator=generator) * 1e6, torch.randn(7, generator=generator) * 1e-3]
    if overflow:
        found[seed % 2].view(-1)[seed % 5] = float(overflow)
    return found


@pytest.mark.parametrize("scale", [65536.0, 1e9, 1000.0])
def test_scale_and_gradients_are_those_of_torch(scale: float) -> None:
    overflows = [*["inf"] * 3, "", "", "", "nan", "", "", "", "", "", "", "-inf", *[""] * 10]
    run, method = toy_run(), FP16(scale=scale, growth_every=3, cap=2.0**40)
    scaling = Scaling(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3, **TORCH)  # type: ignore[arg-type]
    scaler.scale(torch.zeros(()))  # makes the scale
    trace = []
    for step, overflow in enumerate(overflows):
        run.step = Step(step, len(overflows))
        ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients(step, overflow)] for _ in range(2))
        for parameters in (ours, theirs):
            for parameter, gradient in zip(parameters, gradients(step, overflow), strict=True):
                parameter.grad = gradient
        optimizer = torch.optim.SGD(theirs, lr=1.0)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        finite = scaling.unscale(ours, run)
        for one, other in zip(ours, theirs, strict=True):
            assert one.grad is not None and other.grad is not None
            assert torch.equal(one.grad.nan_to_num(), other.grad.nan_to_num())
        taken = any(parameter.any() for parameter in theirs)
        scaler.update()
        scaling.settle(finite, run)
        assert finite == taken == (not overflow)
        trace.append(run.state(method)["scale"])
        assert (trace[-1], run.state(method)["clean"]) == (scaler.get_scale(), scaler._get_growth_tracker())
    assert len(set(trace)) > 3  # it grew and backed off


def test_a_scale_grows_to_its_cap_and_no_further() -> None:
    run = toy_run()
    for start, expected in ((2.0**22, [2.0**23, 2.0**24, 2.0**24]), (2.0**30, [2.0**30] * 3)):
        method = FP16(scale=start, growth_every=1)
        trace = []
        for _ in range(3):
            Scaling(method).settle(True, run)
            trace.append(run.state(method)["scale"])
        assert trace == expected


def test_a_planted_overflow_is_skipped_and_the_fit_goes_on() -> None:
    run, plain = toy_run(), toy_run()
    run.apply(FP16(scale=1e9))
    report, expected = fit(run, clip=1.0), fit(plain, clip=1.0)
    assert report["skipped"] > 5 and report["steps"] == expected["steps"] and report["tokens"] == expected["tokens"]
    assert run.log.notes["loss_scale"] == 1e9 / 2 ** report["skipped"]
    assert report["loss_last"] == pytest.approx(expected["loss_last"], abs=0.02)
    usual = toy_run()
    usual.apply(FP16())
    assert "skipped" not in fit(usual, clip=1.0)


def test_a_scale_that_falls_below_the_floor_has_diverged() -> None:
    run = toy_run()
    run.apply(FP16(scale=4.0))

    @dataclasses.dataclass(frozen=True)
    class Huge(Train):
        def loss(self, batch: Any, out: Any, run: Any) -> dict[str, Tensor]:
            return {"huge": 1e9 * out.logits.float().sum()}

    run.apply(Huge())
    with pytest.raises(Diverged, match="overflow in float16 at a loss scale of 1:"):
        fit(run)


@dataclasses.dataclass(frozen=True)
class Tiny(Train):
    """A loss whose gradient in every logit is 2^-26, which no float16 holds."""

    claims: ClassVar = ("train.loss",)

    def loss(self, batch: Any, out: Any, run: Any) -> dict[str, Tensor]:
        return {"tiny": 2.0**-26 * out.logits.float().sum()}


def head_gradient(method: Train | None) -> Tensor:
    run = toy_run()
    run.apply(Tiny())
    if method is not None:
        run.apply(method)
    found: list[Tensor] = []
    seen(run, lambda run: found.append(run.model.lm_head.weight.grad.clone()))
    fit(run, steps=1, weight_decay=0.0)
    return found[0]


def test_a_gradient_of_two_to_the_minus_26_is_zero_unscaled_and_right_when_scaled() -> None:
    expected = head_gradient(None)
    assert expected.abs().max() > 0
    assert head_gradient(FP16(scale=1.0)).abs().max() == 0
    torch.testing.assert_close(head_gradient(FP16()), expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    """AdamW hides a constant factor; the norm that hooks see does not."""
    norms = []
    for scale in (1.0, 4096.0):
        run = toy_run()
        run.apply(FP16(scale=scale))
        seen(run, lambda run: norms.append(torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item()))
        fit(run, steps=1, clip=1e-2)
    assert norms == pytest.approx([1e-2, 1e-2], rel=1e-3)


def test_masters_gradients_and_states_are_float32_also_of_a_16_bit_model() -> None:
    run = toy_run()
    run.model.bfloat16()
    run.apply(FP16())
    types: set[torch.dtype] = set()
    seen(run, lambda run: types.update(t.dtype for p in run.model.parameters() for t in (p, p.grad)))
    fit(run, steps=1)
    assert types == {torch.float32}
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.bfloat16}


def test_a_resume_restores_scale_and_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth every 3 steps: a count that began anew would double the scale elsewhere."""
    monkeypatch.setattr("effbench.nn.train.fit.EVERY", 0.0)

    def prepared(folder: str) -> tuple[ModelRun, FP16]:
        run, method = toy_run("opt"), FP16(scale=1e9, growth_every=3)
        run.folder = tmp_path / folder
        run.apply(method)
        return run, method

    whole, expected = prepared("whole")
    told = fit(whole, steps=6)
    cut, _ = prepared("cut")
    cut.progress = _stop_after(2, cut.progress)
    with pytest.raises(_Stopped):
        fit(cut, steps=6)
    again, method = prepared("cut")
    report = fit(again, steps=6)
    assert report["resumed"] == [2] and report["skipped"] == told["skipped"] > 5
    assert again.state(method) == whole.state(expected) and again.state(method)["scale"] != 1e9
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("scale=0.5", "must be at least 1"),
        ("growth_every=0", "must be at least 1"),
        ("cap=0.1", "cap=0.1 is below scale=65536"),
        ("cap=1", "cap=1 is below scale=65536"),
        ("cap=512.0,scale=1024.0", "cap=512 is below scale=1024"),
        ("cap=1e6,scale=1e9", r"cap=1e\+06 is below scale=1e\+09"),
    ],
)
def test_bad_settings_are_wrong_usage(setting: str, said: str) -> None:
    with pytest.raises(Usage, match=said):
        parse_step(f"fp16({setting})")


def test_a_scale_may_begin_above_the_cap_by_default_or_at_it() -> None:
    """The one is a planted overflow."""
    for setting in ("scale=1e9", "scale=512.0,cap=512.0"):
        parse_step(f"fp16({setting})")


def test_of_sharded_gradients_a_rank_brings_back_its_own(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        for value, finite in ((1024.0, True), (float("inf"), False)):
            weight.grad = distribute_tensor(torch.full((4, 3), value), mesh, [Shard(0)])
            assert Scaling(FP16(scale=1024.0)).unscale([weight], toy_run()) == finite
            assert (weight.grad.to_local() == value / 1024).all()
    finally:
        distributed.destroy_process_group()
