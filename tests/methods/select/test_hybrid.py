"""Hybrid selection: the greedy order of its objective, its scores, its second stage, and what fills it up."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_select import blobs, draw_rows, golden, kept, pooled

from effbench.checks import VOCABULARY, toy_run
from effbench.core.errors import Usage
from effbench.core.recipe import parse_step
from effbench.core.views import Example
from effbench.methods.select import _quality as quality
from effbench.methods.select.hybrid import Hybrid, maximise
from effbench.methods.select.minhash_dedup import MinHashDedup
from effbench.nn.train.examples import measure_losses


def similarities(points: Tensor) -> Tensor:
    cosines = points @ points.T
    return (cosines - cosines.min()) / (1 - cosines.min())


def objective(similarity: Tensor, scores: Tensor, coverage: float, chosen: list[int]) -> float:
    if not chosen:
        return 0.0
    location = similarity[:, chosen].max(1).values.mean()
    return float(coverage * location + (1 - coverage) * scores[chosen].sum() / scores.sum())


def draw(number: int, seed: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    points = torch.randn(number, 5, generator=chance, dtype=torch.float64)
    return torch.nn.functional.normalize(points, dim=1), torch.rand(number, generator=chance, dtype=torch.float64)


def test_facility_location_goes_in_the_order_of_apricot() -> None:
    tensors = golden()
    points, expected = tensors["points"], tensors["facility_order"].tolist()
    found = maximise(points, [1.0] * len(points), 1.0)
    similarity, scores = similarities(points), torch.ones(len(points), dtype=torch.float64)
    for number, gain in enumerate(tensors["facility_gains"].tolist()):
        before, after = (objective(similarity, scores, 1.0, found[:count]) for count in (number, number + 1))
        assert len(points) * (after - before) == pytest.approx(gain, abs=1e-9)
    distinct = int((tensors["facility_gains"] > 1e-9).sum())  # behind them nothing is left to gain
    assert distinct > 40 and found[:distinct] == expected[:distinct]


@pytest.mark.parametrize("coverage", [0.0, 0.3, 0.7, 1.0])
def test_the_lazy_order_is_the_plain_one(coverage: float) -> None:
    points, scores = draw(30, 1)
    similarity, chosen = similarities(points), []
    for _ in range(30):
        free = [place for place in range(30) if place not in chosen]
        chosen.append(max(free, key=lambda place: objective(similarity, scores, coverage, [*chosen, place])))
    assert maximise(points, scores.tolist(), coverage) == chosen


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_near_the_best_set(seed: int) -> None:
    points, scores = draw(11, seed)
    similarity, found = similarities(points), maximise(points, scores.tolist(), 0.6)
    assert float(similarity.min()) >= 0
    for k in (1, 2, 3, 5):
        values = [objective(similarity, scores, 0.6, list(chosen)) for chosen in itertools.combinations(range(11), k)]
        reached = objective(similarity, scores, 0.6, found[:k])
        assert max(values) * (1 - 1 / math.e) <= reached <= max(values) + 1e-12
        assert k > 1 or reached == pytest.approx(max(values))
    assert objective(similarity, scores, 0.6, found) == pytest.approx(1)


def test_alike_examples_are_ordered_by_their_scores() -> None:
    assert maximise(torch.eye(3)[[0, 0, 0, 0]], [0.1, 0.4, 0.3, 0.2], 0.5) == [1, 2, 3, 0]


def test_facility_location_covers_clusters() -> None:
    points = blobs([20, 10, 5])
    assert sorted(place >= 20 and 1 + (place >= 30) for place in maximise(points, [1.0] * 35, 1.0)[:3]) == [0, 1, 2]


# Scores


def test_scores_are_ranks_in_one_range() -> None:
    assert quality.even_out(torch.tensor([3.0, -1.0, 1e9, 3.0, 5.0])).tolist() == [0.375, 0, 1, 0.375, 0.75]
    assert quality.even_out(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.5, 0.5, 0.5]
    assert quality.even_out(torch.tensor([2.0])).tolist() == [0.0]


def test_perplexity_is_best_in_the_middle() -> None:
    rated = quality.rate_perplexity(torch.tensor([0.1, 2.0, 2.1, 2.4, 9.0]))
    assert rated.argsort(descending=True).tolist() == [2, 1, 3, 0, 4]


def spell(run: Any, text: str) -> tuple[int, ...]:
    return tuple(run.tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("The reader sees a line.", "The reader sees a line"),
        ("The reader sees a line.", "the reader sees a line."),
        ("The reader sees a line.", "The The reader sees a line."),
        ("The reader (she) sees a line.", "The reader (she sees a line."),
        ("The reader sees a line.", "The 12 34 56."),
        ("The reader sees a line.", "The reader # # # sees a line."),
        ("The reader sees a line.", "I a b c d e f g h."),
        ("读者看到一行，然后又看到一行。", "读者看到一行，然后又看到一行"),
        ("读者（她）看到「一行」。", "读者（她看到「一行」。"),
        ("他说：「读者看到一行。」", "他说：「读者看到一行。"),
        ("คนอ่านเห็นหนึ่งบรรทัด!", "คนอ่านเห็น(หนึ่งบรรทัด!"),
    ],
)
def test_each_rule_of_form_counts(good: str, bad: str) -> None:
    assert quality._follow(good) == 1
    assert quality._follow(bad) < 1


def test_shuffled_sentences_are_the_same_tokens() -> None:
    run = toy_run()
    stop = spell(run, ".")[0]
    ids = (0, 5, 6, stop, 7, 8, 9, stop, 10, stop, 11, 0)
    mixed = quality.shuffle(run, Example("a", ids))
    assert mixed is not None and mixed.ids != ids and sorted(mixed.ids) == sorted(ids)
    assert mixed.ids[0] == 0 and mixed.ids[-1] == 0
    text = ",".join(map(str, mixed.ids))
    assert all(sentence in text for sentence in (f"5,6,{stop}", f"7,8,9,{stop}", f"10,{stop}", "11"))
    assert quality.shuffle(run, Example("a", ids)) == mixed  # belongs to the seed
    asked = quality.shuffle(run, Example("a", ids, prompt=4))
    assert asked is not None and asked.ids[:4] == ids[:4] and asked.ids != ids
    assert quality.shuffle(run, Example("a", (0, 5, 6, stop, 0))) is None
    assert quality.shuffle(run, Example("a", (0, 5, stop, 5, stop))) is None  # the same sentence twice


def test_coherence_is_what_shuffling_costs() -> None:
    run = toy_run()
    stop = spell(run, ".")[0]
    rows = [(0, *row[:6], stop, *row[6:12], stop, *row[12:], stop) for row in draw_rows(6)]
    rows.append((0, 60, 61, 62))
    examples = [Example(str(place), row) for place, row in enumerate(rows)]
    losses = measure_losses(run, run.reference, examples)
    found = quality.rate_coherence(run, examples, losses)
    for place, example in enumerate(examples[:-1]):
        mixed = quality.shuffle(run, example)
        assert mixed is not None
        expected = float(measure_losses(run, run.reference, [mixed]) - losses[place])
        assert float(found[place]) == pytest.approx(expected, abs=1e-5) and expected != 0
    assert float(found[-1]) == 0


def test_weights_say_which_scores_count() -> None:
    run = pooled([row[: 8 + place % 9] for place, row in enumerate(draw_rows(40))])
    losses = measure_losses(run, run.reference, run.data.pool)
    hardest = losses.argsort(descending=True, stable=True)[:8].tolist()
    run.apply(parse_step("hybrid(coverage=0.0, quality=0.0, diversity=0.0)"))
    assert kept(run) == hardest
    other = pooled([example.ids for example in run.data.pool])
    other.apply(parse_step("hybrid(coverage=0.0, quality=0.0, difficulty=0.0)"))
    assert kept(other) != hardest


def test_form_is_read_from_the_tokens() -> None:
    run = toy_run()
    texts = "What comes next is far from it.", "What comes next is far from it"
    rated = quality.rate_form(run, [Example(text, spell(run, text)) for text in texts])
    assert rated.tolist() == [1, 6 / 7]


# Stages


@pytest.mark.parametrize("second", ["kmeans", "dpp"])
def test_the_second_stage_chooses_among_the_best(second: str) -> None:
    plain, staged = pooled(draw_rows(80)), pooled(draw_rows(80))
    plain.apply(parse_step("hybrid(clusters=4)"))
    ranking = [*kept(plain), *(int(example.id) for example in plain.data.reserve)]
    staged.apply(parse_step(f"hybrid(clusters=4, second={second!r})"))
    assert set(kept(staged)) <= set(ranking[:32]) and len(kept(staged)) == 16
    assert set(kept(staged)) != set(ranking[:16])
    behind = [int(example.id) for example in staged.data.reserve]
    assert sorted([*kept(staged), *behind]) == list(range(80)) and behind[16:] == ranking[32:]


@pytest.mark.parametrize("step", ["hybrid(coverage=0.0)", "hybrid()", "dpp()", "kmeans_diversity()", "d2_pruning()"])
def test_near_duplicates_are_filled_up_from_the_ranking(step: str) -> None:
    """Section 4.4 of the seed: score and diversity, then near-duplicates within the subset, refilled."""
    originals = draw_rows(50, 32)
    copies = [(*row[:-1], 1 + row[-1] % (VOCABULARY - 1)) for row in originals]
    run = pooled([*originals, *copies])
    run.apply(parse_step(step))
    ranking = [*kept(run), *(int(example.id) for example in run.data.reserve)]
    assert len(kept(run)) == 20
    run.apply(MinHashDedup())
    expected: list[int] = []
    for place in ranking:
        if place % 50 not in {other % 50 for other in expected}:
            expected.append(place)
    assert kept(run) == expected[:20]
    if step == "hybrid(coverage=0.0)":  # which takes the copies as well, if nothing keeps it from that
        assert len({place % 50 for place in ranking[:20]}) < 20


def test_all_that_is_told_is_weighed_where_there_is_no_tokenizer() -> None:
    run = pooled(draw_rows(30))
    run.tokenizer = None
    run.apply(parse_step("hybrid(clusters=4)"))
    assert len(kept(run)) == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"coverage": 1.1},
        {"quality": -1.0},
        {"quality": 0.0, "diversity": 0.0, "difficulty": 0.0},
        {"clusters": 0},
        {"candidates": 0.5},
    ],
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        Hybrid(**settings)
