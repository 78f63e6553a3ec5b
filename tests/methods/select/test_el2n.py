"""EL2N: the norm of the error, averaged over fits or over moments of one, and nothing left of them."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from effbench.checks import toy_run
from effbench.core.errors import Usage
from effbench.core.recipe import parse_step
from effbench.core.views import Example
from effbench.methods.select import el2n
from effbench.methods.select.el2n import EL2N, measure_errors
from effbench.nn.run import ModelRun
from effbench.nn.train import fit as library
from effbench.nn.train.fit import fit
from effbench.nn.train.loop import Loop
from effbench.nn.train.settings import FitSettings

SHORT = {"steps": 3, "lr": 1e-2, "batch_size": 4, "max_length": 32}
SETTINGS = FitSettings(**SHORT, schedule="constant")


def score(run: ModelRun, **settings: Any) -> Tensor:
    return EL2N(**SHORT | settings).score(run.data.pool, run)


def test_an_error_is_the_norm_of_a_difference_of_distributions() -> None:
    run = toy_run(shape={"initializer_range": 0.2})
    examples = [Example("a", run.data.pool[0].ids[:9], 4), Example("b", run.data.pool[1].ids[:5]), Example("c", (1,))]
    expected = []
    for example in examples[:2]:
        with torch.no_grad():
            p = run.model(torch.tensor([example.ids])).logits[0].softmax(-1)
        norms = []
        for place in range(max(1, example.prompt), len(example.ids)):
            onehot = torch.eye(96)[example.ids[place]]
            norms.append(float((p[place - 1] - onehot).square().sum().sqrt()))
        expected.append(sum(norms) / len(norms))
    found = measure_errors(run, examples, "errors")
    torch.testing.assert_close(found, torch.tensor([*expected, 0.0], dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_runs_are_fits_of_other_seeds() -> None:
    total = torch.zeros(64, dtype=torch.float64)
    for number in range(2):
        run = toy_run()
        run.seed = zlib.crc32(f"0/el2n/{number}".encode())
        fit(run, SETTINGS)
        total += measure_errors(run, run.data.pool, "errors")
    torch.testing.assert_close(score(toy_run(), times=2), total / 2, rtol=0, atol=0)
    single = score(toy_run(), times=1)
    assert not torch.allclose(single, total / 2, atol=1e-6)


def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Tensor]], list[tuple[int, int, float]]]:
    """The weights at each look, and of each step: its number, the optimizer's own count, and the learning rate."""
    seen: list[dict[str, Tensor]] = []
    taken: list[tuple[int, int, float]] = []
    measure, update = el2n.measure_errors, Loop._update

    def look(run: ModelRun, *given: Any) -> Tensor:
        seen.append({name: value.clone() for name, value in run.model.state_dict().items()})
        return measure(run, *given)

    def count(loop: Loop) -> None:
        assert loop.run.step is not None
        counts = {int(state["step"]) for state in loop.optimizer.state.values()} or {0}
        taken.append((loop.run.step.index, max(counts), loop.optimizer.param_groups[0]["lr"]))
        update(loop)

    monkeypatch.setattr(el2n, "measure_errors", look)
    monkeypatch.setattr(Loop, "_update", count)
    return seen, taken


@pytest.mark.parametrize(
    "settings", [{}, {"warmup": 0.5}, {"schedule": "cosine"}, {"layout": "by_length"}], ids=lambda given: str(given)
)
def test_epochs_are_moments_of_one_fit(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, taken = watch(monkeypatch)
    epochs = score(toy_run(), times=3, average="epochs", **settings)
    looked, steps = list(seen), list(taken)
    taken.clear()
    run = toy_run()
    run.seed = zlib.crc32(b"0/el2n/0")
    whole = EL2N(**SHORT | settings).with_steps(9)
    moments: list[dict[str, Tensor]] = []
    total = torch.zeros(64, dtype=torch.float64)

    def note(number: int) -> None:
        if number % 3 == 0:
            moments.append({name: value.clone() for name, value in run.model.state_dict().items()})
            total.add_(measure_errors(run, run.data.pool, f"own-{number}"))

    run.progress = lambda unit, done, _: note(done) if unit == "training step" else None
    fit(run, whole)
    assert steps == taken and [count for _, count, _ in steps] == list(range(9))
    assert len(looked) == len(moments) == 3
    for one, other in zip(looked, moments, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    torch.testing.assert_close(epochs, total / 3, rtol=0, atol=0)


def test_a_killed_fit_that_is_watched_goes_on_with_what_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(toy_run(), times=3, average="epochs")
    monkeypatch.setattr(library, "EVERY", -1.0)
    for last in (4, 6, 8):  # before, at and behind a look

        def kill(unit: str, done: int, _: int, last: int = last) -> None:
            if unit == "training step" and done == last:
                raise KeyboardInterrupt

        run = toy_run()
        run.folder, run.progress = tmp_path / str(last), kill
        with pytest.raises(KeyboardInterrupt):
            score(run, times=3, average="epochs")
        run = toy_run()
        run.folder = tmp_path / str(last)
        seen, taken = watch(monkeypatch)
        torch.testing.assert_close(score(run, times=3, average="epochs"), expected, rtol=0, atol=0)
        assert len(taken) == 9 - (last - 1) and len(seen) == 3 - (last - 1) // 3


def test_a_16_bit_model_is_looked_at_as_the_fit_computes() -> None:
    run = toy_run()
    run.model.to(torch.bfloat16)
    found = score(run, times=2, average="epochs", train="last:1")  # of which the fit has one block in float32
    assert found.isfinite().all() and found.unique().numel() > 32


def test_the_hardest_are_kept_and_a_band_leaves_them_out() -> None:
    run = toy_run()
    scores = score(run, times=1)
    run.apply(EL2N(**SHORT, times=1, keep=0.25))
    assert {int(e.id) for e in run.data.train} == {*scores.argsort(descending=True)[:16].tolist()}
    low, high = torch.quantile(scores, torch.tensor([0.2, 0.8], dtype=torch.float64))
    banded = toy_run()
    banded.apply(EL2N(**SHORT, times=1, keep=0.25, band=(0.2, 0.8)))
    inside = scores[[int(e.id) for e in banded.data.train]]
    assert float(inside.max()) <= high and float(inside.min()) > scores.median()
    banded = toy_run()
    banded.apply(EL2N(**SHORT, times=1, keep=0.9, band=(0.2, 0.8)))
    inside = scores[[int(e.id) for e in banded.data.train]]
    assert ((low <= inside[:38]) & (inside[:38] <= high)).all()  # what lies outside comes last


def test_fits_leave_no_trace_and_the_plan_waits_for_the_fit_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "EVERY", -1.0)  # checkpoints after each step, which the next fit must not go on from

    def run_it(selects: bool) -> ModelRun:
        run = toy_run()
        run.folder = tmp_path / str(selects)
        run.apply(parse_step("lora(rank=2)"))
        run.apply(parse_step("lora_plus()"))
        waiting = set(run.waiting)
        if selects:
            state = {name: value.clone() for name, value in run.model.state_dict().items()}
            run.apply(EL2N(**SHORT, times=2, keep=1.0))
            assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())
            assert run.waiting == waiting and not run.log.fits and run.log.near_duplicates is None
            assert run.seed == 0 and run.folder == tmp_path / "True"
            run.data.train = None  # type: ignore[assignment]  all of them, in their own order
        report = fit(run, SETTINGS)
        assert report["steps"] == 3 and "resumed" not in report
        return run

    plain, selected = run_it(False).model.state_dict(), run_it(True).model.state_dict()
    assert plain.keys() == selected.keys() and all(torch.equal(plain[name], selected[name]) for name in plain)


def test_a_scratch_fit_does_not_count_as_the_training_that_a_step_waits_for() -> None:
    run = toy_run()
    run.apply(parse_step("lora(rank=2)"))
    run.apply(EL2N(**SHORT, times=1))
    run.settle()  # before a fit there is nothing to settle
    assert any(type(module).__name__ == "LoRALinear" for module in run.model.modules())


def test_a_crash_inside_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}

    def crash(*_: Any) -> Tensor:
        raise RuntimeError("lost")

    monkeypatch.setattr(el2n, "measure_errors", crash)
    with pytest.raises(RuntimeError, match="lost"):
        score(run)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.seed == 0 and not run.log.fits


def test_bad_settings_are_wrong_usage() -> None:
    for settings in ({"times": 0}, {"band": (0.8, 0.2)}, {"lr": (1e-3, 1e-4)}, {"steps": 0}, {"band": (0.2, 1.2)}):
        with pytest.raises(Usage):
            EL2N(**settings)
