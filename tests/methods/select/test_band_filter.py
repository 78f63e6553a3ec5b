"""The band filter: which examples an epoch leaves out, and what it knows of their losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys_training import fit, seen

from effbench.checks import Reading, toy_run
from effbench.core.errors import Usage
from effbench.methods.select.band_filter import BandFilter
from effbench.nn.run import ModelRun
from effbench.nn.train.examples import measure_losses


def read_epochs(run: ModelRun, epochs: int, kept: int, **settings: Any) -> tuple[list[set[str]], list[torch.Tensor]]:
    """The examples that each epoch of a fit reads, and the losses of all examples as the model begins it."""
    names = {example.ids: example.id for example in run.data.train}
    read: list[tuple[int, ...]] = []
    losses = [measure_losses(run, run.model, run.data.train)]
    run.train.chain("batch").append(Reading(read))
    per_epoch = -(-kept // 4)

    def look(run: Any) -> None:
        if (run.step.index + 1) % per_epoch == 0:
            losses.append(measure_losses(run, run.model, run.data.train))

    seen(run, look)
    fit(run, steps=epochs * per_epoch, **settings)
    ids = [names[row] for row in read]
    return [set(ids[start : start + kept]) for start in range(0, len(ids), kept)], losses


def test_each_epoch_leaves_out_the_lowest_and_the_highest_of_the_last_known_losses() -> None:
    run = toy_run()
    run.apply(BandFilter(low=0.125, high=0.25))  # 8 and 16 of 64
    names = [example.id for example in run.data.train]
    epochs, measured = read_epochs(run, 3, 40, lr=1e-2)
    known = measured[0].clone()
    for number, ids in enumerate(epochs):
        assert len(ids) == 40  # each once
        if number == 0:
            order = known.argsort()
            assert ids == {names[place] for place in order[8:48]}
        places = [place for place, name in enumerate(names) if name in ids]
        known[places] = measured[number + 1][places]
    assert len({frozenset(ids) for ids in epochs}) == 3  # losses that have changed make another band


def test_the_losses_are_those_of_the_steps_that_read_them() -> None:
    run = toy_run()
    run.apply(BandFilter())
    method = run.train.slot("sampler")
    fit(run, steps=1, lr=1e-9)
    state = run.state(method)
    assert len(state["places"]) == 52 and torch.allclose(
        state["losses"], measure_losses(run, run.model, run.data.train), atol=1e-5
    )
    again = toy_run()
    again.apply(BandFilter())
    method = again.train.slot("sampler")
    before = measure_losses(again, again.model, again.data.train)
    fit(again, steps=13, lr=1e-2)  # an epoch
    state = again.state(method)
    left_out = sorted({*range(64)} - {*state["places"]})
    assert torch.allclose(state["losses"][left_out], before[left_out], atol=1e-5)
    assert (state["losses"] - before).abs()[state["places"][4:]].min() > 1e-4


def test_a_share_is_cut_around_the_middle_of_the_band() -> None:
    run = toy_run()
    losses = measure_losses(run, run.model, run.data.pool)
    run.apply(BandFilter(keep=0.25, low=0.0, high=0.5))
    order = losses.argsort()
    assert sorted(int(example.id) for example in run.data.train) == sorted(order[8:24].tolist())
    with pytest.raises(Usage, match="leave nothing"):
        BandFilter(low=0.5, high=0.5)
