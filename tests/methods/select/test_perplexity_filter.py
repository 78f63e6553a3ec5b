"""The perplexity filter: against perplexities computed one by one, and where its model comes from."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy
import pytest
import torch

from effbench import sources
from effbench.checks import toy, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.methods.select.perplexity_filter import PerplexityFilter
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun


def perplexities(model: Any, run: ModelRun) -> list[float]:
    """Of each example of the pool by itself, by the model's own loss."""
    found = []
    for example in run.data.pool:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            found.append(math.exp(float(model(ids, labels=ids).loss)))
    return found


def chosen(run: ModelRun) -> list[int]:
    return [int(example.id) for example in run.data.train]


def ranking(run: ModelRun) -> list[int]:
    return [int(example.id) for example in [*run.data.train, *run.data.reserve]]


def test_the_band_comes_first_from_the_least_on_and_then_what_is_near_it() -> None:
    run = toy_run()
    values = perplexities(run.model, run)
    run.apply(PerplexityFilter(reference="reference", low=25, high=75, keep=0.25))
    order = sorted(range(64), key=values.__getitem__)
    assert chosen(run) == order[16:32]
    assert ranking(run)[:32] == order[16:48]
    low, high = numpy.percentile(numpy.log(values), [25, 75])
    outside = sorted(order[:16] + order[48:], key=lambda i: max(low - math.log(values[i]), math.log(values[i]) - high))
    assert ranking(run)[32:] == outside


def test_or_the_nearest_to_the_median_of_the_pool() -> None:
    run = toy_run()
    logs = numpy.log(perplexities(run.model, run))
    run.apply(PerplexityFilter(reference="model", first="median", low=0, high=100, keep=0.25))
    median = sorted(logs)[31]
    assert chosen(run) == sorted(range(64), key=lambda i: abs(logs[i] - median))[:16]


def test_the_model_of_the_curated_slice_is_a_copy_that_has_learned_it() -> None:
    run = toy_run()
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    target = set(run.data.target[0].ids)
    run.data.pool[5] = run.data.target[0]
    run.data.pool[9] = run.data.target[1]
    run.apply(PerplexityFilter(steps=30, lr=3e-3, keep=2 / 64))
    assert {example.id for example in run.data.train} == {"t0", "t1"} and target
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    assert not run.log.fits  # it is no fit of the recipe
    run = toy_run()
    run.data.target = []
    with pytest.raises(Usage, match="has no target part"):
        run.apply(PerplexityFilter())


def test_a_model_of_other_tokens_ends_as_unsupported() -> None:
    run = toy_run()
    run.shelve("other", toy(vocab_size=100), None)
    with pytest.raises(Unsupported, match="other predicts 100 tokens, the model 96"):
        run.apply(PerplexityFilter(reference="other"))
    with pytest.raises(Usage, match="no model is called 'gone'"):
        run.apply(PerplexityFilter(reference="gone"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_noise_is_ranked_last_and_what_is_like_the_target_first(seed: int) -> None:
    """Of as many as are noise those that are ranked last are noise, of each kind, with a precision above 90 %."""
    run = open_run(sources.model("tiny"), sources.data("tiny:planted"), "cpu", None, seed)
    run.apply(PerplexityFilter())
    noise = Counter(example.meta["noise"] for example in run.data.pool if example.meta["noise"])
    assert noise == {"shuffled": 70, "gibberish": 70, "wrong": 60}
    last = [*run.data.train, *run.data.reserve][-200:]
    found = Counter(example.meta["noise"] for example in last)
    assert sum(found[kind] for kind in noise) > 0.9 * len(last)
    assert all(found[kind] > 0.9 * number for kind, number in noise.items())
    (report,) = run.log.selections
    assert report["noise_last"] == (200 - found[""]) / 200
    assert report["planted"]["noise"] == 0.0 and report["planted"]["in"] > 0.8
