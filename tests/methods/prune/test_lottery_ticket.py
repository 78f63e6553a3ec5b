"""Lottery tickets: rounds, rewinding and controls."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit, linears, seen

from effbench.checks import toy_run
from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.run import FitReport
from effbench.formats.sparse import PrunedLinear
from effbench.methods.prune import lottery_ticket
from effbench.methods.prune._training import TrainedMask
from effbench.methods.prune.lottery_ticket import LotteryTicket, copy_parameters
from effbench.nn.model.linear import kept
from effbench.nn.run import ModelRun
from effbench.nn.train import fit as library
from effbench.nn.train.loop import rate
from effbench.nn.train.samplers import Shuffled
from effbench.nn.train.settings import FitSettings


def test_a_fit_can_go_on_where_another_stopped() -> None:
    """Data order and learning rate after `start` are those of the steps that were left out."""
    rates: list[float] = []
    batches: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        def batch(self, batch: Any, run: Any) -> Any:
            batches.append(batch["input_ids"])
            return batch

        def optimizer(self, groups: Any, run: Any) -> Any:
            return Recorded(torch.optim.SGD(groups, lr=0.0), rates)

    run = toy_run()
    run.apply(Watch())
    report = fit(run, steps=7, start=4, schedule="cosine", warmup=0.3)
    assert report["steps"] == 3
    assert rates == [1e-3 * rate(step, 7, 0.3, "cosine") for step in (4, 5, 6)]
    sampler, examples = Shuffled(64, 0), run.data.train
    drawn = [sampler.draw(step, 4) for step in range(7)][4:]
    expected = [torch.tensor([examples[i].ids for i in indices]) for indices in drawn]
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


class Recorded:
    """An optimizer that writes down its learning rate at every step."""

    def __init__(self, inner: Any, rates: list[float]) -> None:
        self.inner = inner
        self.rates = rates

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self) -> None:
        self.rates.append(self.inner.param_groups[0]["lr"])
        self.inner.step()


def entries(
    run: ModelRun, monkeypatch: pytest.MonkeyPatch, watch: Any = None
) -> list[tuple[dict[str, Tensor], dict[str, Tensor | None], Any]]:
    """Parameters, masks and the step counted from at the beginning of each fit; `watch` sees the steps of the first."""
    found: list[Any] = []

    def fit(run: ModelRun, settings: FitSettings, start: int = 0) -> FitReport:
        masks = {path: kept(module) for path, module in linears(run).items()}
        if watch is not None and not found:
            seen(run, watch)
        found.append((copy_parameters(run.model, list(linears(run))), masks, start))
        return library.fit(run, settings, start)

    monkeypatch.setattr(lottery_ticket, "fit", fit)
    return found


SMALL = {"steps": 4, "batch_size": 4, "max_length": 32, "lr": 1e-3}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("rewind", [0, 2])
def test_rounds_start_from_the_rewound_weights_bit_for_bit(
    rewind: int, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run(architecture)
    if architecture == "gpt2":
        run.model.config.attn_pdrop = run.model.config.resid_pdrop = run.model.config.embd_pdrop = 0.0
        for module in run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.0
    paths = list(linears(run))
    states = [copy_parameters(run.model, paths)]
    found = entries(run, monkeypatch, lambda run: states.append(copy_parameters(run.model, paths)))
    run.apply(LotteryTicket(sparsity=0.6, rounds=3, rewind=rewind, **SMALL))
    assert len(found) == 4 and len(states) == 5
    assert [start for *_, start in found] == [0, rewind, rewind, rewind]
    point = states[rewind]
    masks_before: dict[str, Tensor] = {path: torch.ones_like(point[f"{path}.weight"]).bool() for path in paths}
    for number, (at_start, masks, _) in enumerate(found[1:], 1):
        for path in paths:
            mask = masks[path]
            assert mask is not None
            pruned = int(mask.numel() * (1 - 0.4 ** (number / 3)) + 1e-9)
            assert int((~mask).sum()) == pruned, (number, path)
            assert not (mask & ~masks_before[path]).any()
            assert torch.equal(at_start.pop(f"{path}.weight"), point[f"{path}.weight"] * mask)
            masks_before[path] = mask
        assert at_start and all(torch.equal(value, point[name]) for name, value in at_start.items())
    for path, module in linears(run).items():  # the first round prunes the smallest weights of the dense fit
        first, trained = found[1][1][path], states[4][f"{path}.weight"].abs()
        assert first is not None and trained[first].min() >= trained[~first].max()
        assert isinstance(module, PrunedLinear) and torch.equal(module.kept(), masks_before[path])
        assert not torch.equal(module.dense_weight(), point[f"{path}.weight"] * module.kept())  # trained
    assert not run.model.training


def test_the_control_differs_in_its_initial_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for control in ("none", "reinit"):
        run = toy_run()
        found[control] = entries(run, monkeypatch)
        rng = torch.get_rng_state()
        run.apply(LotteryTicket(rounds=2, control=control, **SMALL))  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), rng)
    for number, (ours, theirs) in enumerate(zip(found["none"], found["reinit"], strict=True)):
        assert ours[2] == theirs[2]
        for path, mask in ours[1].items():
            other = theirs[1][path]
            assert mask is other is None or (mask is not None and other is not None and torch.equal(mask, other))
        same = [torch.equal(ours[0][name], theirs[0][name]) for name in ours[0] if ours[0][name].std() > 0]
        assert all(same) if number < 2 else not any(same)
    values, masks, _ = found["reinit"][2]
    name = "model.layers.1.mlp.down_proj"
    mask = masks[name]
    assert mask is not None and float(values[f"{name}.weight"][mask].std()) == pytest.approx(0.02, rel=0.05)


def test_the_control_refuses_what_its_architecture_does_not_initialise() -> None:
    run = toy_run()
    run.model.config.intermediate_size = 64
    with pytest.raises(Unsupported, match="control='reinit'"):
        run.apply(LotteryTicket(rounds=1, control="reinit", **SMALL))


def test_hooks_before_it_wait_for_a_fit_of_the_recipe() -> None:
    entered = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        @contextlib.contextmanager
        def context(self, run: Any) -> Any:
            entered.append([module for module in run.model.modules() if isinstance(module, PrunedLinear)])
            yield

    run = toy_run()
    run.apply(Watch())
    run.apply(LotteryTicket(rounds=2, **SMALL))
    assert entered == [] and len(run.log.fits) == 3
    assert not [module for module in run.model.modules() if isinstance(module, TrainedMask)]
