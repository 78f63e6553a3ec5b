"""The loop: every slot and hook in its place, means over the whole step, and the same bits from a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit, seen

from effbench.checks import TOYS, toy_run
from effbench.core.errors import Conflict, Diverged, Unsupported
from effbench.core.kinds import Train
from effbench.core.recipe import parse, parse_step
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.run import ModelRun
from effbench.nn.train import fit as library
from effbench.nn.train.meter import Meter
from effbench.nn.train.samplers import Shuffled
from effbench.nn.train.slots import Activations, Parallel, Precision


def uneven(run: ModelRun, prompts: bool = True) -> ModelRun:
    """The run with documents of unlike lengths and prompts, in float64."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.randint(5, 31, (16,), generator=generator).tolist()
    run.data.pool = [
        Example(str(i), tuple(torch.randint(1, 95, (size,), generator=generator).tolist()), i % 3 * prompts)
        for i, size in enumerate(sizes)
    ]
    run.model.double()
    for module in run.model.modules():  # OPT and GPT-2 have dropout, which is drawn anew for every part
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return run


def parameters(run: ModelRun) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}


def distance(run: ModelRun, other: ModelRun) -> float:
    mine, theirs = parameters(run), parameters(other)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


# Means over the whole step


@pytest.mark.parametrize("architecture", TOYS)
@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 3}, {"accumulate": 8}, {"layout": "packed"}])
def test_it_does_not_matter_how_a_step_is_cut(architecture: str, changes: dict[str, Any]) -> None:
    whole, cut = uneven(toy_run(architecture)), uneven(toy_run(architecture))
    a = fit(whole, batch_size=8, steps=3)
    b = fit(cut, batch_size=8, steps=3, **changes)
    assert distance(whole, cut) < 1e-10
    assert (a["tokens"], a["loss_last"]) == (b["tokens"], pytest.approx(b["loss_last"], abs=1e-12))


@pytest.mark.parametrize("steps", [3, 4, 5, 11])
def test_the_loss_of_quarters_tells_how_a_fit_went(tmp_path: Path, steps: int) -> None:
    run = uneven(toy_run())
    losses = [line["loss"] for line in log_of(run, tmp_path, steps)]
    quarters = run.log.fits[-1]["loss_quarters"]
    assert (len(losses), len(quarters)) == (steps, 4 if steps > 3 else 0)
    if quarters:
        sizes = [round(steps * (i + 1) / 4) - round(steps * i / 4) for i in range(4)]
        assert sum(quarter * size for quarter, size in zip(quarters, sizes, strict=True)) == pytest.approx(sum(losses))
        assert quarters[0] == pytest.approx(sum(losses[: sizes[0]]) / sizes[0])
        assert quarters[3] == pytest.approx(sum(losses[-sizes[3] :]) / sizes[3])


def test_a_mean_of_means_would_differ() -> None:
    """What the test above would not see: parts of unlike length whose means were averaged."""
    run = uneven(toy_run())
    losses = []
    seen(run, lambda run: losses.append(run.step))
    report = fit(run, batch_size=8, steps=1, accumulate=2, lr=1e-12)
    examples = [run.data.train[i] for i in Shuffled(16, 0).draw(0, 8)]
    logits = [run.model(torch.tensor([example.ids])).logits[0] for example in examples]
    nll = [
        nn.functional.cross_entropy(row[:-1], torch.tensor(example.ids[1:]), reduction="none")[
            max(0, example.prompt - 1) :
        ]
        for row, example in zip(logits, examples, strict=True)
    ]
    assert report["loss_last"] == pytest.approx(float(torch.cat(nll).mean()), rel=1e-6)
    assert report["loss_last"] != pytest.approx(float(torch.stack([part.mean() for part in nll]).mean()), rel=1e-4)


def test_weights_of_examples_count_in_the_loss() -> None:
    """An example of weight 2 counts as two of weight 1."""
    one, two = uneven(toy_run()), uneven(toy_run())
    first, second = one.data.pool[:2]
    one.data.pool = [dataclasses.replace(first, weight=2.0), second]
    two.data.pool = [first, second, dataclasses.replace(first, id="again")]
    fit(one, batch_size=2, steps=2)
    fit(two, batch_size=3, steps=2)
    assert distance(one, two) < 1e-10


# Loss terms belong to their method


@dataclasses.dataclass(frozen=True)
class Constant(Train):
    """Adds a constant under a name that others use, too."""

    value: float = 1.0

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        return {"term": torch.tensor(self.value)}


@dataclasses.dataclass(frozen=True)
class Instead(Train):
    """Stands in the place of the cross-entropy."""

    claims: ClassVar = ("train.loss",)

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        return {"zero": out.logits.float().sum() * 0.0}


def log_of(run: ModelRun, folder: Path, steps: int = 2) -> list[dict[str, Any]]:
    run.folder = folder
    fit(run, steps=steps)
    return [json.loads(line) for line in (folder / "fit-1.jsonl").read_text().splitlines()]


def test_equal_names_of_two_methods_both_count(tmp_path: Path) -> None:
    run = toy_run()
    for value in (1.0, 2.0, 4.0):
        run.apply(Constant(value=value))
    first, _ = log_of(run, tmp_path)
    terms = first["terms"]
    cross_entropy = terms.pop("cross_entropy")
    assert sorted(terms.values()) == [1, 2, 4] and len(terms) == 3
    assert first["loss"] == pytest.approx(7 + cross_entropy)
    assert {"step", "lr", "tokens", "tokens_per_s"} <= first.keys() and first["step"] == 1


def test_a_method_may_stand_in_the_place_of_the_cross_entropy(tmp_path: Path) -> None:
    run = toy_run()
    run.apply(Instead())
    assert [line["loss"] for line in log_of(run, tmp_path)] == [0, 0]
    with pytest.raises(Conflict, match=r"train\.loss is already set"):
        parse("kd(), kd(alpha=0.9), fit()")
    parse("kd(), fit(), kd(alpha=0.9), fit()")


# Slots


class Doubled(Precision):
    """Scales the loss, and skips the first passes of every other step, whose gradients it spoils."""

    def __init__(self, passes: int = 2) -> None:
        self.passes = passes
        self.told: list[tuple[int, bool]] = []

    def scale(self, loss: Tensor, run: Run) -> Tensor:
        return loss * 1024

    def unscale(self, parameters: Any, run: Run) -> bool:
        assert run.step is not None
        index = run.step.index
        finite = index % 2 == 0 or sum(step == index for step, _ in self.told) == self.passes
        for parameter in parameters:
            parameter.grad.div_(1024 if finite else 0)
        return finite

    def settle(self, taken: bool, run: Run) -> None:
        assert run.step is not None
        self.told.append((run.step.index, taken))


def claiming(**values: Any) -> Train:
    @dataclasses.dataclass(frozen=True)
    class Claiming(Train):
        claims: ClassVar = tuple(f"train.{slot}" for slot in values)

        def slot_values(self) -> dict[str, Any]:
            return values

    return Claiming()


class Counted(Shuffled):
    """Counts what is asked of it and what it is told."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size, seed)
        self.drawn: list[int] = []
        self.losses: list[float] = []

    def draw(self, step: int, batch_size: int) -> list[int]:
        self.drawn.append(step)
        return super().draw(step, batch_size)

    def seen(self, places: Any, losses: Tensor) -> None:
        self.losses.extend(losses.tolist())


def reading(sampler: Shuffled) -> Train:
    @dataclasses.dataclass(frozen=True)
    class Reading(Train):
        def sampler(self, examples: Any, run: Run) -> Shuffled:
            return sampler

    return Reading()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_is_taken_again_to_the_same_bits(accumulate: int, tmp_path: Path) -> None:
    # OPT drops out; a factor of 1024 changes no bit of the gradients.
    runs, samplers, lines, reports = [], [], [], []
    for precision in (Precision(), doubled := Doubled()):
        run = toy_run("opt")
        sampler = Counted(len(run.data.train), run.seed)
        run.apply(claiming(precision=precision))
        run.apply(reading(sampler))
        present: list[bool] = []
        seen(run, lambda run, present=present: present.append(any(p.grad is not None for p in run.model.parameters())))
        run.folder = tmp_path / str(len(runs))
        report = fit(run, steps=4, clip=0.1, schedule="cosine", accumulate=accumulate, weight_decay=0.1)
        text = (run.folder / "fit-1.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
        runs.append(run), samplers.append(sampler), reports.append(report)
        assert present == [True] * 4
    plain, scaled = runs
    assert distance(plain, scaled) == 0
    assert doubled.told == [(0, True), *[(1, False)] * 2, (1, True), (2, True), *[(3, False)] * 2, (3, True)]
    assert samplers[0].drawn == samplers[1].drawn == [0, 1, 2, 3]
    assert samplers[0].losses == samplers[1].losses and len(samplers[0].losses) == 16
    assert [line.get("skipped") for line in lines[1]] == [None, 2, None, 2] and reports[1]["skipped"] == 4
    for key in ("loss", "lr", "tokens"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    assert "skipped" not in reports[0] and reports[0]["tokens"] == reports[1]["tokens"]


def test_a_step_is_not_taken_again_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effbench.nn.train.loop.PASSES", 3)
    run = toy_run()
    run.apply(claiming(precision=Doubled(passes=5)))
    with pytest.raises(Diverged, match="step 2 of 2 was skipped 3 times"):
        fit(run, steps=2)


def test_passes_that_are_skipped_cost_and_read() -> None:
    costs = []
    for precision in (Precision(), Doubled()):
        run = toy_run()
        run.apply(claiming(precision=precision))
        costs.append(fit(run, steps=8)["cost"]["flops_per_token"])
    assert costs[0] == costs[1]


def test_activations_and_parallel_are_read() -> None:
    calls: list[str] = []

    class Saving(Activations):
        def saving(self, run: Run) -> AbstractContextManager[Any]:
            calls.append("saving")
            return super().saving(run)

    class Watching(Parallel):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_"):
                calls.append(name)
            return super().__getattribute__(name)

    run = toy_run()
    run.apply(claiming(activations=Saving(), parallel=Watching()))
    fit(run, steps=1, clip=1.0)
    assert {"saving", "wrap", "shard", "total", "merge", "reduce", "clip", "data_rank"} <= set(calls)


# Where a fit is, and chance


def test_hooks_know_the_step() -> None:
    run = toy_run()
    steps: list[Any] = []
    seen(run, lambda run: steps.append(run.step))
    fit(run, steps=3)
    assert [(step.index, step.total, step.done) for step in steps] == [(0, 3, 1 / 3), (1, 3, 2 / 3), (2, 3, 1.0)]
    assert run.step is None


def test_chance_depends_on_the_step_and_leaves_the_process_as_it_was() -> None:
    drawn: list[list[float]] = []
    for waste in (0, 5):
        run = toy_run()
        mine: list[float] = []

        def draw(run: Any, waste: int = waste, mine: list[float] = mine) -> None:
            mine.append(float(torch.rand(())))
            torch.rand(waste)  # what a step draws does not move the next one

        seen(run, draw)
        torch.manual_seed(9)
        fit(run, steps=3)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(9)))
        drawn.append(mine)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 3


# Checkpoints


@dataclasses.dataclass(frozen=True)
class Averaging(Train):
    """Keeps a moving average of a weight, as AdaLoRA keeps its sensitivities, and pulls the weight to it."""

    def on_step(self, run: Run) -> None:
        weight = next(run.model.parameters())
        state = run.state(self)
        state["average"] = 0.5 * state.get("average", 0.0) + 0.5 * weight.detach()
        state["count"] = state.get("count", 0) + 1
        weight.data.mul_(0.9).add_(0.1 * state["average"])
        weight.data += 1e-3 * torch.rand(weight.shape)


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(
    "steps", ["", "lora(dropout=0.1)", "gmp()", "movement()", "learned_mask()", "learned_mask(pattern='unstructured')"]
)
@pytest.mark.parametrize("rates", [1e-3, (1e-3, 1e-2)])
def test_a_fit_that_was_killed_goes_on_to_the_same_bits(
    steps: str, rates: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "EVERY", 0.0)

    def prepare(folder: Path, kill: Any = lambda run: None) -> tuple[ModelRun, Averaging]:
        run, method = toy_run("opt"), Averaging()  # which has dropout
        run.folder = folder
        for step in parse(steps).steps:
            run.apply(step)
        run.apply(method)
        seen(run, kill)
        return run, method

    whole, kept = prepare(tmp_path / "whole")
    report = fit(whole, steps=4, lr=rates)

    def kill(run: Any) -> None:
        if run.step.index == 2:
            raise Killed

    killed, _ = prepare(tmp_path / "killed", kill)
    with pytest.raises(Killed):
        fit(killed, steps=4, lr=rates)
    again, anew = prepare(tmp_path / "killed")
    resumed = fit(again, steps=4, lr=rates)
    assert distance(whole, again) == 0
    assert torch.equal(whole.state(kept)["average"], again.state(anew)["average"])
    assert again.state(anew)["count"] == whole.state(kept)["count"] == 4
    for key in report.keys() - {"cost"}:
        assert report[key] == resumed[key], key  # type: ignore[literal-required]
    if not isinstance(rates, tuple):
        assert resumed["resumed"] == [2]


def test_a_state_is_whole_or_not_there(tmp_path: Path) -> None:
    from effbench.nn.train.checkpoint import read_state, write_state

    assert read_state(tmp_path / "a") is None
    state = {
        "n": 3,
        "t": torch.arange(4.0),
        "deep": [{"x": (torch.ones(2, dtype=torch.bfloat16), None, "text")}],
        5: 1.5,
    }
    here = torch.device("cpu")
    write_state(tmp_path / "a", 3, state, here)
    read = read_state(tmp_path / "a")
    assert read is not None and torch.equal(read["t"], state["t"]) and read[5] == 1.5
    assert torch.equal(read["deep"][0]["x"][0], state["deep"][0]["x"][0]) and read["deep"][0]["x"][1:] == (None, "text")
    write_state(tmp_path / "a", 4, {"n": 4}, here)
    assert read_state(tmp_path / "a") == {"n": 4} and [path.name for path in (tmp_path / "a").iterdir()] == ["4"]
    (tmp_path / "a" / "5" / "0.new").mkdir(parents=True)  # killed while it wrote
    assert read_state(tmp_path / "a") == {"n": 4}
    with pytest.raises(TypeError, match="is a Generator: a state between steps holds tensors, numbers and text"):
        write_state(tmp_path / "b", 1, {"g": torch.Generator()}, here)


# Nothing to learn


def test_a_step_without_a_label_is_unsupported() -> None:
    @dataclasses.dataclass(frozen=True)
    class Masking(Train):
        def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
            return batch | {"labels": torch.full_like(batch["labels"], -100)}

    run = toy_run()
    run.apply(Masking())
    with pytest.raises(Unsupported, match="all labels of step 1 are masked: there is nothing to learn"):
        fit(run)


def test_parts_without_a_label_cost_nothing() -> None:
    run = uneven(toy_run())

    @dataclasses.dataclass(frozen=True)
    class First(Train):
        def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
            labels = batch["labels"].clone()
            labels[batch["input_ids"][:, 0] % 2 == 0] = -100
            return batch | {"labels": labels}

    run.apply(First())
    assert math.isfinite(fit(run, steps=3, batch_size=4, accumulate=4)["loss_last"])


# Samplers


def test_batches_by_length_waste_less_and_hold_every_example_once() -> None:
    run = uneven(toy_run(), prompts=False)
    read: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Reading(Train):
        def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
            read.append(batch["attention_mask"])
            return batch

    wasted = {}
    for layout in ("padded", "by_length"):
        read.clear()
        run.apply(Reading())
        report = fit(run, steps=4, batch_size=4, layout=layout)
        assert report["distinct_tokens"] == report["available_tokens"]
        wasted[layout] = sum(int((mask == 0).sum()) for mask in read)
    assert wasted["by_length"] < 0.5 * wasted["padded"]


def test_an_order_is_kept_batch_for_batch() -> None:
    run = toy_run()
    read: list[tuple[int, ...]] = []

    @dataclasses.dataclass(frozen=True)
    class Reading(Train):
        def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
            read.extend(map(tuple, batch["input_ids"].tolist()))
            return batch

    run.apply(parse_step("curriculum()"))
    run.apply(Reading())
    fit(run, steps=17, batch_size=4)
    assert read == [example.ids for example in [*run.data.train, *run.data.train[:4]]]
    assert sorted(read[:64]) != read[:64]


def test_a_sampler_is_told_the_loss_of_every_example() -> None:
    told: list[tuple[list[int], Tensor]] = []

    class First:
        def draw(self, step: int, batch_size: int) -> list[int]:
            return [step, 5, 6]

        def seen(self, places: list[int], losses: Tensor) -> None:
            told.append((places, losses))

    @dataclasses.dataclass(frozen=True)
    class Sampling(Train):
        def sampler(self, examples: Any, run: Run) -> First:
            return First()

    for changes in ({}, {"layout": "packed"}, {"accumulate": 2}):
        told.clear()
        run = uneven(toy_run())
        run.apply(Sampling())
        fit(run, steps=1, batch_size=3, lr=1e-12, **changes)
        ((places, losses),) = told
        assert places == [0, 5, 6]
        for place, loss in zip(places, losses.tolist(), strict=True):
            example = run.data.train[place]
            ids = torch.tensor([example.ids])
            nll = nn.functional.cross_entropy(run.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            assert loss == pytest.approx(float(nll[max(0, example.prompt - 1) :].mean()), rel=1e-6)


# A fit inside a method


def test_a_fit_of_a_methods_own_neither_uses_nor_loses_hooks() -> None:
    run = toy_run()
    run.apply(Constant(value=3.0))
    with run.own_fits():
        inner = fit(run, steps=1)
    outer = fit(run, steps=1, lr=1e-9)
    assert inner["loss_first"] < outer["loss_first"] - 2 and run.train.empty
    with pytest.raises(Killed), run.own_fits():
        run.apply(Constant())
        raise Killed
    assert run.train.empty


# What a step costs


@pytest.mark.parametrize("prompt", [0, 20])
def test_operations_per_token_read_are_their_closed_form(prompt: int) -> None:
    """Whatever is learned of it: three products with each linear, and seven in attention, whose scores are computed
    again. A third more where a quarter of the batch is padding."""
    run = toy_run()
    rows = [tuple(range(1, 33))] * 4
    run.data.pool = [Example(str(i), row, prompt) for i, row in enumerate(rows)]
    cost = fit(run, steps=7, batch_size=4)["cost"]
    linears = sum(module.weight.numel() for module in run.model.modules() if isinstance(module, torch.nn.Linear))
    attention = 2 * (2 * 2 * 32 * 128)  # layers x (QK^T, PV) x 2 x context x width, per token
    assert cost["flops_per_token"] == pytest.approx(3 * 2 * linears + 7 / 2 * attention, rel=1e-3)
    run = toy_run()
    run.data.pool = [Example(str(i), row[: 32 if i % 2 else 16], prompt // 2) for i, row in enumerate(rows)]
    padded = fit(run, steps=7, batch_size=4)["cost"]
    assert padded["flops_per_token"] == pytest.approx(cost["flops_per_token"] * 4 / 3, rel=0.02)


def test_waiting_for_the_machine_is_not_time_of_the_fit() -> None:
    run = toy_run()

    def wait(*progress: object) -> None:
        time.sleep(0.1)
        run.waited += 0.1

    @contextlib.contextmanager
    def wait_alone() -> Iterator[None]:
        wait()
        yield

    run.alone, run.progress = wait_alone, wait
    begin = time.monotonic()
    cost = fit(run, steps=7)["cost"]
    assert cost["seconds"] < time.monotonic() - begin - 0.8


@pytest.mark.parametrize("steps", ["bf16()", "nf4(), lora(rank=2), bf16()", "rtn(), lora(rank=2), bf16()"])
def test_looking_into_a_step_changes_none(steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(look: bool) -> ModelRun:
        run = toy_run()
        for step in parse(steps).steps:
            run.apply(step)
        with monkeypatch.context() as patch:
            if not look:
                patch.setattr(Meter, "take", lambda self, place, step: step())
            fit(run, steps=8)
        return run

    assert distance(train(True), train(False)) == 0
