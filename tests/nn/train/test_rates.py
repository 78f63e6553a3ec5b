"""Several learning rates: each starts from the same state, and the run is left as the best one made it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from toys_training import METHODS, fit, linears, seen

from effbench.checks import DENSE, probe, toy_run
from effbench.core.errors import Diverged, Unsupported, Usage
from effbench.core.kinds import Train
from effbench.core.recipe import parse, parse_step
from effbench.core.run import Run
from effbench.formats.sparse import PrunedLinear
from effbench.nn.model.memento import ModelMemento
from effbench.nn.run import ModelRun, take_fingerprint
from effbench.nn.train import fit as library
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.windows import LEAST, VALIDATION, validation_windows

RATES = (1e-5, 3e-3)
STEPS = [*METHODS, "lora(dropout=0.1)", "magnitude()", "wanda(pattern='2:4'), lora(merge='dense')", "slicegpt()"]


def prepared(steps: str, architecture: str = "llama") -> ModelRun:
    run = toy_run(architecture)
    torch.manual_seed(3)  # dropout draws from torch's own generator
    for step in parse(steps).steps:
        run.apply(step)
    return run


@pytest.mark.parametrize("rates", [RATES, RATES[::-1], (1e-5, 3e-3, 1e-4)])
@pytest.mark.parametrize("steps", STEPS)
def test_the_run_is_as_if_the_best_rate_alone_had_been_tried(steps: str, rates: tuple[float, ...]) -> None:
    run = prepared(steps)
    report = fit(run, lr=rates)
    best = min(report["rates"], key=lambda rate: report["rates"][rate] or 0)  # the first of equal ones
    assert list(report["rates"]) == [str(rate) for rate in rates] and report["lr"] == float(best)
    same = steps == "learned_mask()"  # whose logits have a rate of their own, and whose weights stand still
    assert len(set(report["rates"].values())) == (1 if same else len(rates))
    alone = prepared(steps)
    expected = fit(alone, lr=float(best))
    assert all(report[key] == value for key, value in expected.items() if key != "cost")  # type: ignore[literal-required]
    assert torch.equal(probe(run), probe(alone))
    for other in (run, alone):
        other.finish()
    assert take_fingerprint(run.model) == take_fingerprint(alone.model)
    assert run.log.fits == [report]


@pytest.mark.parametrize("architecture", DENSE)
def test_every_architecture_goes_back_to_where_it_was(architecture: str) -> None:
    run = prepared("gmp()", architecture)
    before = take_fingerprint(run.model)
    restore = run.remember()
    modules = dict(run.model.named_modules())
    library.train(run, FitSettings(steps=3, batch_size=4, max_length=32), 0)
    assert take_fingerprint(run.model) != before
    restore()
    assert take_fingerprint(run.model) == before
    assert all(module is modules[path] for path, module in run.model.named_modules())


def test_lottery_tickets_choose_in_the_dense_fit_and_keep_the_rate() -> None:
    run = toy_run()
    run.apply(parse_step("lottery_ticket(steps=3, rounds=2, rewind=1, lr=(1e-5, 0.003), batch_size=4, max_length=32)"))
    first, *others = run.log.fits
    assert list(first["rates"]) == ["1e-05", "0.003"] and len(others) == 2
    assert all(report["lr"] == first["lr"] and "rates" not in report for report in others)
    assert all(isinstance(module, PrunedLinear) for module in linears(run).values())


def test_what_rates_are_chosen_by_is_not_trained_on() -> None:
    run = toy_run()
    read: set[tuple[int, ...]] = set()

    @dataclasses.dataclass(frozen=True)
    class Reading(Train):
        def batch(self, batch: dict[str, Any], run: Run) -> dict[str, Any]:
            read.update(map(tuple, batch["input_ids"].tolist()))
            return batch

    run.apply(Reading())
    report = fit(run, lr=RATES, steps=40)
    assert report["validation_tokens"] == 8 * 31 and report["available_tokens"] == 64 * 31
    assert read == {example.ids for example in run.data.pool}
    assert not read & {example.ids for example in run.data.validation}


def test_no_more_is_measured_than_a_choice_takes() -> None:
    run = toy_run()
    run.data.validation = run.data.validation * 100
    tokens = sum(len(window.ids) - 1 for window in validation_windows(run, 32))
    assert VALIDATION - 31 < tokens <= VALIDATION


@pytest.mark.parametrize("number", [8, 5, 4, 1, 0])
def test_no_rate_is_chosen_by_a_handful_of_tokens(number: int) -> None:
    run = toy_run()
    run.data.validation = run.data.validation[:number]
    if 31 * number >= LEAST:
        assert fit(run, lr=RATES)["validation_tokens"] == 31 * number
    else:
        with pytest.raises(Unsupported, match=f"it has {31 * number} tokens to predict, 128 are needed"):
            fit(run, lr=RATES)
        assert "rates" not in fit(run)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("fit(steps=3, max_length=32)", [1, 2, 3]),
        ("fit(steps=2, max_length=32, lr=(1e-5, 1e-4, 1e-3))", [1, 2, 3, 4, 5, 6]),
        ("lottery_ticket(steps=3, rounds=2, rewind=1, lr=(1e-5, 1e-4), max_length=32)", [*range(1, 7), 8, 9, 11, 12]),
    ],
)
def test_progress_counts_the_steps_of_all_fits(step: str, expected: list[int]) -> None:
    run = toy_run()
    told: list[tuple[str, int, int]] = []
    run.progress = lambda *news: told.append(news)
    run.apply(parse_step(step))
    assert told == [("training step", done, expected[-1]) for done in expected]


@pytest.mark.parametrize("rates", [(1e-5, 3e-3), (3e-3, 1e-5), (1e18, 1e-5, 3e-3)])
def test_one_rate_is_looked_into_and_waits_for_the_machine(rates: tuple[float, ...]) -> None:
    run, alone = toy_run(), toy_run()
    waits = list[str]()

    @contextlib.contextmanager
    def wait() -> Iterator[None]:
        waits.append("begin")
        yield
        waits.append("end")

    run.alone = wait
    report = fit(run, lr=rates, steps=8)
    expected = fit(alone, lr=report["lr"], steps=8)
    assert waits == ["begin", "end"] and torch.equal(probe(run), probe(alone))
    assert report["cost"].keys() == expected["cost"].keys()
    for key in ("activation_bytes", "step_peak_bytes", "flops_per_token", "gradient_bytes", "optimizer_bytes"):
        assert report["cost"][key] == expected["cost"][key]  # type: ignore[literal-required]
    assert len(report["cost"]["timed_ms"]) == 5


def test_a_rate_that_diverges_is_passed_over() -> None:
    run, alone = toy_run(), toy_run()
    report = fit(run, lr=(1e18, 1e-3), steps=8)
    assert report["rates"]["1e+18"] is None and report["lr"] == 1e-3
    fit(alone, steps=8)
    assert torch.equal(probe(run), probe(alone))


@pytest.mark.parametrize("steps", ["", "gmp()", "movement()", "learned_mask(pattern='unstructured')"])
def test_where_all_rates_diverge_the_model_is_what_it_was(steps: str) -> None:
    run = prepared(steps)
    before = take_fingerprint(run.model)
    with pytest.raises(Diverged, match=r"with any learning rate of 1e\+18, 2e\+18"):
        fit(run, lr=(1e18, 2e18), steps=8)
    assert take_fingerprint(run.model) == before and run.train.empty


def test_what_steps_and_samplers_keep_is_put_back() -> None:
    class Counting:
        def __init__(self, state: dict[str, Any]) -> None:
            self.state = state

        def draw(self, step: int, batch_size: int) -> list[int]:
            self.state.setdefault("drawn", []).append(step)
            return [len(self.state["drawn"]) % 58] * batch_size

    @dataclasses.dataclass(frozen=True)
    class Keeping(Train):
        def sampler(self, examples: Any, run: Run) -> Counting:
            return Counting(run.state(self))

        def on_step(self, run: Run) -> None:
            assert run.step is not None
            state = run.state(self)
            state["sum"] = state.get("sum", torch.zeros(())) + run.step.index
            run.log.notes.setdefault("steps", []).append(run.step.index)

    run, method = toy_run(), Keeping()
    run.apply(method)
    fit(run, lr=(1e-5, 1e-3, 1e-4))
    assert run.state(method)["drawn"] == run.log.notes["steps"] == [0, 1, 2, 3, 4]
    assert float(run.state(method)["sum"]) == 10


def test_what_cannot_be_copied_is_unsupported() -> None:
    run = toy_run()

    @dataclasses.dataclass(frozen=True)
    class Streaming(Train):
        def on_step(self, run: Run) -> None: ...

    method = Streaming()
    run.apply(method)
    run.state(method)["stream"] = (i for i in range(3))
    with pytest.raises(Unsupported, match=r"holds what cannot be copied: .*generator"):
        fit(run, lr=RATES)
    assert run.train.empty


def test_hooks_on_modules_stay_theirs() -> None:
    run = toy_run()
    calls: list[nn.Module] = []
    module = run.model.model.layers[0].mlp
    handle = module.register_forward_hook(lambda module, x, y: calls.append(module))
    run.train.on_exit(handle.remove)
    fit(run, lr=RATES)
    assert set(calls) == {module} and not module._forward_hooks and run.model.model.layers[0].mlp is module


def test_a_memento_holds_tensors_that_are_no_parameters() -> None:
    module = nn.BatchNorm1d(4)
    module.extra = torch.ones(3)  # type: ignore[assignment]
    module.names = ["a"]  # type: ignore[assignment]
    memento = ModelMemento(module)
    module(torch.randn(8, 4)).sum().backward()
    module.extra.add_(1)
    module.names.append("b")
    module.weight.requires_grad_(False)
    module.added = nn.Linear(2, 2)
    memento.restore()
    assert not module.running_mean.any() and int(module.num_batches_tracked) == 0  # type: ignore[union-attr, operator, arg-type]
    assert module.extra.tolist() == [1, 1, 1] and module.names == ["a"] and not hasattr(module, "added")
    assert module.weight.requires_grad and module.weight.grad is None


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("fit(lr=())", "lr is one number or several different ones"),
        ("fit(lr=(0.001,))", "lr is one number or several different ones"),
        ("fit(lr=[0.001, 0.001])", "lr is one number or several different ones"),
        ("fit(lr=(0.001, 0.0))", "lr must be above 0"),
        ("fit(lr=-1)", "lr must be above 0"),
        ("fit(lr='fast')", "lr"),
        ("lottery_ticket(lr=(0.001,))", "lr is one number or several different ones"),
        ("lottery_ticket(lr=0)", "lr must be above 0"),
    ],
)
def test_rates_that_cannot_be_tried_are_wrong_usage(step: str, message: str) -> None:
    with pytest.raises(Usage, match=message) as error:
        parse_step(step)
    assert "\n" not in str(error.value)


def test_rates_are_written_as_they_are_read() -> None:
    method = parse_step("fit(lr=[1e-4, 3e-4, 1], steps=5)")
    assert str(method) == "fit(steps=5, lr=(0.0001, 0.0003, 1.0))" and parse_step(str(method)) == method
    seen(run := toy_run(), lambda *_: None)
    assert "rates" not in fit(run)
