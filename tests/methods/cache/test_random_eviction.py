"""Random eviction: luck is a token's own, by seed, layer and head, and the newest stay."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from toys_cache import fill, kept, logprobs, run_of, text

from effbench.checks import toy_run
from effbench.core.recipe import parse_step
from effbench.core.views import Slots
from effbench.methods.cache.random_eviction import RandomEviction


def judge(seed: int, layer: int, places: torch.Tensor) -> torch.Tensor:
    """Luck of tokens at places [B, Hkv, S]."""
    count = torch.full((len(places),), int(places.max()) + 1)
    view = Slots(layer, places, torch.ones_like(places, dtype=torch.bool), count, count)
    return RandomEviction().score(view, seed)


def test_luck_is_uniform_and_independent():
    """Of places beyond what is drawn at once too; layers, heads and seeds share none."""
    places = torch.arange(5000).expand(1, 3, -1)
    luck = torch.cat([judge(seed, layer, places)[0] for seed in (0, 1) for layer in (0, 1)])
    assert all(stats.kstest(row.numpy(), "uniform").pvalue > 1e-3 for row in luck)
    assert (luck.corrcoef() - torch.eye(12)).abs().max() < 0.06


def test_luck_does_not_depend_on_when_a_token_is_judged():
    places = torch.arange(3000).expand(2, 2, -1)
    some = torch.tensor([2999, 7, 1500]).expand(2, 2, -1)
    assert torch.equal(judge(3, 1, places).gather(2, some), judge(3, 1, some))
    assert torch.equal(judge(3, 1, places[..., :100]), judge(3, 1, places)[..., :100])


def test_of_the_others_those_with_most_luck_stay():
    """Half of ten slots are the newest tokens at every length; the seed of the run says which the others are."""
    run = run_of("random_eviction(budget=10)")
    for length in (40, 41, 70):
        for number, layer in enumerate(fill(run, text(length), 40).slot_layers):
            luck = judge(run.seed, number, torch.arange(length).expand(1, 4, -1))[0]
            for head, places in enumerate(kept(layer)):
                assert places[5:] == list(range(length - 5, length))
                # A token outside was worse than all that stay from before it left.
                lost = [j for j in range(length - 5) if j not in places]
                assert max(luck[head, lost]) < min(luck[head, places[:5]])


def test_seeds_differ_and_one_seed_is_one_choice():
    def choice(seed: int) -> list[list[int]]:
        run = toy_run(seed=seed)
        run.model = toy_run().model
        run.apply(parse_step("random_eviction(budget=10)"))
        return kept(fill(run, text(40), 40).slot_layers[0])

    assert choice(0) == choice(0) != choice(1)


@pytest.mark.parametrize("step", ["random_eviction(budget=1)", "h2o(budget=1)", "streaming_llm(sinks=0,window=1)"])
def test_a_cache_of_one_token_changes_the_score_of_one_token(step):
    """Choices of one token are read from what has settled, too."""
    pairs = [(text(30, seed), [9]) for seed in range(6)]
    plain, short = logprobs(toy_run(), pairs), logprobs(run_of(step), pairs)
    assert all(abs(a - b) > 1e-3 for a, b in zip(plain, short, strict=True))
