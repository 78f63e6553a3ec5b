"""Sampling: tokens are drawn by their probabilities, and a prompt's text is its own by its number."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from toys_cache import run_of, text

from effbench.checks import toy_run
from effbench.core.errors import Usage
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.sampling import Sampling

STEPS = ["", "h2o(keep=0.4)", "kivi(group=8,residual=8)", "streaming_llm(sinks=2,window=9)", "sliding_window(window=8)"]
LENGTHS = (30, 12, 3, 1)


def drawn(sampling: Sampling, logits: torch.Tensor, count: int) -> torch.Tensor:
    """[V] how often each token is drawn."""
    chances = sampling.chances(range(1))
    tokens = torch.cat([sampling.draw(logits[None], chances) for _ in range(count)])
    return torch.bincount(tokens, minlength=len(logits))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_tokens_are_drawn_by_their_tempered_and_cut_probabilities(temperature, top_p):
    """Chi-square against the distribution written out over a vocabulary of six."""
    logits = torch.tensor([2.0, 0.5, 1.5, -1.0, 0.0, 1.0])
    weights = [2.718281828459045 ** (float(value) / temperature) for value in logits]
    ranked = sorted(range(6), key=lambda token: -weights[token])
    stay, mass = [], 0.0
    for token in ranked:
        if mass < top_p:
            stay.append(token)
        mass += weights[token] / sum(weights)
    expected = torch.zeros(6, dtype=torch.float64)
    expected[stay] = torch.tensor([weights[token] for token in stay], dtype=torch.float64)
    expected /= expected.sum()
    sampling = Sampling(temperature, top_p, seed=3)
    torch.testing.assert_close(sampling.warp(logits).double(), expected, atol=1e-6, rtol=0)
    counts = drawn(sampling, logits, 4000)
    assert int(counts[expected == 0].sum()) == 0
    if len(stay) > 1:
        assert stats.chisquare(counts[stay], 4000 * expected[stay]).pvalue > 1e-3


@pytest.mark.parametrize("steps", STEPS)
def test_temperature_zero_is_greedy(steps):
    engine, prompts = open_engine(run_of(steps)), [text(n, seed=n) for n in LENGTHS]
    assert engine.generate(prompts, 12, set(), sampling=Sampling(0.0)) == engine.generate(prompts, 12, set())


@pytest.mark.parametrize("steps", STEPS)
def test_a_sampled_text_does_not_depend_on_its_batch(steps):
    """Prompts have chance of their own by number: company behind them, and its padding, changes nothing."""
    run, sampling = run_of(steps), Sampling(1.0, 0.9, seed=5)
    prompts = [text(n, seed=n) for n in LENGTHS]
    whole = open_engine(run).generate(prompts, 16, set(), sampling=sampling)
    for count in (1, 2, 3):
        assert open_engine(run).generate(prompts[:count], 16, set(), sampling=sampling) == whole[:count]
    stop = whole[0][3]  # one text that ends early leaves the others as they are
    stopped = open_engine(run).generate(prompts, 16, {stop}, sampling=sampling)
    assert stopped == [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in whole]
    assert open_engine(run).generate(prompts, 16, set(), sampling=Sampling(1.0, 0.9, seed=6)) != whole


def test_prompts_that_are_alike_are_continued_in_unlike_ways():
    made = open_engine(toy_run()).generate([text(9)] * 6, 12, set(), sampling=Sampling())
    assert len(set(map(tuple, made))) == 6


@pytest.mark.parametrize("steps", [*STEPS, "sparsegpt(sparsity=0.1), speculative(k=3)"])
def test_a_sampled_text_does_not_depend_on_its_place_in_the_call(steps):
    """With its number, a prompt has the same text in another order, in other batches and alone."""
    run, sampling = run_of(steps), Sampling(1.0, 0.9, seed=5)
    prompts, numbers = [text(n, seed=n) for n in LENGTHS], [7, 2**40, 0, 3]
    whole = open_engine(run).generate(prompts, 10, set(), sampling=sampling, numbers=numbers)
    for part in ([3, 0], [2, 1, 0, 3], [1], [2]):
        some, named = [prompts[i] for i in part], [numbers[i] for i in part]
        made = open_engine(run).generate(some, 10, set(), sampling=sampling, numbers=named)
        assert made == [whole[i] for i in part]
    plain = open_engine(run).generate(prompts, 10, set(), sampling=sampling)
    assert plain == open_engine(run).generate(prompts, 10, set(), sampling=sampling, numbers=range(4))
    assert plain[0] != whole[0] and plain[3] == whole[3]


def test_a_number_for_each_prompt():
    with pytest.raises(ValueError):
        open_engine(toy_run()).generate([text(9)] * 2, 3, set(), sampling=Sampling(), numbers=[1])


@pytest.mark.parametrize("name", ["temperature", "top_p"])
@pytest.mark.parametrize("value", [-0.1, math.inf, -math.inf, math.nan, 1.5, 0.0])
def test_settings_that_mean_nothing_are_refused(name, value):
    if name == "temperature" and value in (1.5, 0.0):
        assert Sampling(temperature=value).temperature == value
        return
    with pytest.raises(Usage, match=name) as caught:
        Sampling(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-30, 1e-300])
def test_temperatures_towards_zero_are_greedy(temperature):
    logits = torch.tensor([[1e4, 2e4, -torch.inf, 1.9e4], [3.0, 1.0, 2.0, 0.0]])
    assert Sampling(temperature, 0.9).warp(logits).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
