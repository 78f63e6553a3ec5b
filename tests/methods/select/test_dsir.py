"""DSIR: its counts and weights are those of data-selection, and its draws are without replacement."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_texts import golden

from effbench.checks import toy_run
from effbench.core.errors import Usage
from effbench.core.views import Example
from effbench.methods.select.dsir import DSIR
from effbench.nn.data import RandomTokens
from effbench.nn.run import ModelRun

GOLDEN = golden("dsir")


class Written:
    """A tokenizer whose only token of an example stands for all of its text."""

    pad_token_id = 0

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def decode(self, ids: list[int], **options: Any) -> str:
        return self.texts[ids[0]]


def written(pool: list[str], target: list[str]) -> ModelRun:
    run = toy_run()
    run.tokenizer = Written([*pool, *target])
    examples = [Example(str(place), (place,)) for place in range(len(pool) + len(target))]
    run.data.pool, run.data.target = examples[: len(pool)], examples[len(pool) :]
    return run


def read(name: str) -> list[str]:
    return bytes(GOLDEN[name].tolist()).decode().split("\n")


@pytest.mark.parametrize(("ngrams", "buckets"), [(2, 10_000), (1, 64)])
def test_counts_and_weights_are_those_of_data_selection(ngrams: int, buckets: int) -> None:
    run, method = written(read("pool"), read("target")), DSIR(ngrams=ngrams, buckets=buckets)
    counts = torch.bincount(method.hash_text(read("pool")[0]), minlength=buckets)
    assert torch.equal(counts, GOLDEN[f"counts.{ngrams}.{buckets}"].long())
    expected = GOLDEN[f"weights.{ngrams}.{buckets}"]
    torch.testing.assert_close(method.weigh_up(run.data.pool, run), expected, rtol=1e-12, atol=1e-12)


def test_a_draw_is_without_replacement_by_the_weights() -> None:
    run = written(["x", "x y", "y", "z y z"], ["x x y", "z"])
    weights: Tensor = DSIR().weigh_up(run.data.pool, run).exp()
    p = weights / weights.sum()
    expected = torch.zeros(4, dtype=torch.float64)  # probability of being among the first two that are drawn
    for first, second in itertools.permutations(range(4), 2):
        chance = p[first] * p[second] / (1 - p[first])
        expected[first] += chance
        expected[second] += chance
    found = torch.zeros(4, dtype=torch.float64)
    for seed in range(2000):
        run.seed = seed
        found[DSIR().score(run.data.pool, run).topk(2).indices] += 1 / 2000
    assert float((expected - 0.5).abs().max()) > 0.2  # so that the largest two, or any two, would be seen
    torch.testing.assert_close(found, expected, rtol=0, atol=0.045)  # four deviations


def test_what_is_of_the_target_is_chosen() -> None:
    inside = [f"ships sail the sea at dawn number {i}" for i in range(10)]
    outside = [f"markets fell by a point in trade {i}" for i in range(40)]
    run = written([*outside, *inside], ["ships at sea", "they sail at dawn", "the number of ships"])
    run.apply(DSIR())
    assert {int(example.id) for example in run.data.train} == {*range(40, 50)}


def test_clauses_of_a_script_without_spaces_are_no_words() -> None:
    """No clause of the target is one of the pool; what they have in common are pairs of letters."""
    inside = ["清晨船在海上", "船在海上航行", "很多船在海上"]
    outside = ["市场今天下跌", "股票价格上涨", "贸易指数变化", "价格今天稳定"]
    run = written([*outside, *inside], ["很多船清晨航行", "船在海上很慢"])
    weights = DSIR().weigh_up(run.data.pool, run)
    assert weights[4:].min() > weights[:4].max()
    assert len(DSIR(ngrams=1).hash_text("船在海上。Ship at sea")) == 3 + 1 + 3


def test_texts_are_what_tokens_spell_and_numbers_without_a_tokenizer() -> None:
    run = toy_run()
    run.tokenizer = None
    run.data.pool = [Example("a", (1, 2, 3)), Example("b", (4, 5))]
    run.data.target = [Example("c", (2, 3))]
    first, second = DSIR().weigh_up(run.data.pool, run).tolist()
    assert first > second


def test_without_a_target_it_is_wrong_usage() -> None:
    run = toy_run()
    run.data = RandomTokens(96)
    with pytest.raises(Usage, match=r"dsir.*random tokens has no target part"):
        run.apply(DSIR())
    run.apply(DSIR(aim="validation"))
    with pytest.raises(Usage, match="at least 1"):
        DSIR(buckets=0)
