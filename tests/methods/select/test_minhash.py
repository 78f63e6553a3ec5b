"""MinHash deduplication: against datasketch, by exact Jaccard indices, and on the pool with planted duplicates."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.checks import toy_run
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE
from effbench.core.recipe import parse_step
from effbench.core.views import Example
from effbench.methods.select.minhash_dedup import MinHashDedup
from effbench.nn.data import open_data
from effbench.nn.run import ModelRun
from effbench.sources.duplicates import Signatures, find_recall, jaccard

GOLDEN = load_file(PACKAGE.parent / "tests" / "golden" / "minhash.safetensors")
TEXTS = [[f"w{word}" for word in text] for text in GOLDEN["texts"].tolist()]
PAIRS = [tuple(pair) for pair in GOLDEN["pairs"].tolist()]


class Spelled:
    """A tokenizer whose tokens are words."""

    pad_token_id = 0

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def decode(self, ids: list[int], **options: Any) -> str:
        return " ".join(self.words[i] for i in ids)


def deduplicate(texts: list[list[str]], **settings: Any) -> tuple[ModelRun, list[int]]:
    """The run, and the places of the texts that stay."""
    run = toy_run()
    words = sorted({word for text in texts for word in text})
    places = {word: place for place, word in enumerate(words)}
    run.tokenizer = Spelled(words)
    run.data.pool = [Example(str(i), tuple(places[word] for word in text)) for i, text in enumerate(texts)]
    run.apply(MinHashDedup(**settings))
    return run, [int(example.id) for example in run.data.train]


def test_bands_make_the_pairs_of_datasketch_from_its_signatures() -> None:
    signatures = Signatures()
    assert (signatures.bands, signatures.rows) == (21, 6)
    rows = GOLDEN["signatures"].numpy().astype("uint64")
    having: dict[bytes, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        for key in signatures.cut(row):
            having[key].append(place)
    pairs = {pair for places in having.values() for pair in itertools.combinations(places, 2)}
    assert sorted(pairs) == PAIRS and len(PAIRS) >= 10
    estimated = [Signatures.compare(rows[one], rows[other]) for one, other in PAIRS]
    assert estimated == pytest.approx(GOLDEN["estimated"].tolist())


def test_pairs_of_datasketch_that_are_exactly_so_alike_go_and_no_others() -> None:
    signatures = Signatures()
    grams = [signatures.shingle(text) for text in TEXTS]
    exact = [jaccard(grams[one], grams[other]) for one, other in PAIRS]
    assert exact == pytest.approx(GOLDEN["exact"].tolist())
    every = itertools.combinations(range(len(TEXTS)), 2)
    indices = {(one, other): jaccard(grams[one], grams[other]) for one, other in every}
    for threshold in (0.5, 0.7, 0.85):
        near = {other for (_, other), value in indices.items() if value >= threshold}
        theirs = {other for (_, other), value in zip(PAIRS, exact, strict=True) if value >= threshold}
        assert len(near) >= 2 and theirs <= near and (threshold < 0.7 or theirs == near)
        _, left = deduplicate(TEXTS, threshold=threshold, recall=0.999)
        assert left == sorted({*range(len(TEXTS))} - near)


def test_what_a_signature_takes_for_near_is_compared_exactly() -> None:
    """With one hash function every pair that agrees in it is compared; by the estimate alone all those would go."""
    settings: dict[str, Any] = {"permutations": 1, "recall": 0.1}
    signatures = Signatures(1)
    signed = [int(signatures.sign(signatures.shingle(text))[0]) for text in TEXTS]
    alike = [(a, b) for a, b in itertools.combinations(range(len(TEXTS)), 2) if signed[a] == signed[b]]
    grams = [signatures.shingle(text) for text in TEXTS]
    near = {b for a, b in alike if jaccard(grams[a], grams[b]) >= 0.7}
    assert near < {b for _, b in alike}
    assert deduplicate(TEXTS, **settings)[1] == sorted({*range(len(TEXTS))} - near)


def test_of_a_chain_both_ends_stay_and_texts_of_few_words_are_one_shingle() -> None:
    first = [f"a{i}" for i in range(40)]
    second = first[:-4] + [f"b{i}" for i in range(4)]
    third = [f"c{i}" for i in range(4)] + second[4:]
    signatures = Signatures()
    one, two, three = map(signatures.shingle, (first, second, third))
    assert jaccard(one, two) >= 0.7 <= jaccard(two, three) and jaccard(one, three) < 0.7
    assert deduplicate([first, second, third], recall=0.99)[1] == [0, 2]
    assert deduplicate([second, first, third], recall=0.99)[1] == [0]  # the better ranked of two stays
    short = [["x"], ["x", "y"], ["y", "x"], ["x", "y"], ["x", "y", "z", "u"], ["x"]]
    assert deduplicate(short)[1] == [0, 1, 2, 4]


class Letters(Spelled):
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(self.words[i] for i in ids)


def test_near_duplicates_go_where_a_script_has_no_spaces_and_other_texts_stay() -> None:
    chance, letters = random.Random(0), [chr(0x4E00 + place) for place in range(400)]
    texts = ["".join(chance.choices(letters, k=120)) for _ in range(20)]
    texts = [f"{text[:50]}，{text[50:80]} (GPT 4) {text[80:]}。" for text in texts]
    near = [f"{text[:60]}{letters[place]}{text[61:]}" for place, text in enumerate(texts[:8])]
    far = ["".join(chance.sample(text, len(text))) for text in texts[:8]]  # the same letters
    every = [*texts, *near, *far, "好", "好的", "好", "的"]
    run = toy_run()
    run.tokenizer = Letters([*letters, *"，。 (GPT4)好的"])
    run.data.pool = [
        Example(str(place), tuple(map(run.tokenizer.words.index, text))) for place, text in enumerate(every)
    ]
    run.apply(MinHashDedup(recall=0.999))
    assert [int(example.id) for example in run.data.train] == [*range(20), *range(28, 38), 39]


def test_the_recall_at_the_threshold_is_what_the_log_says() -> None:
    run, _ = deduplicate(TEXTS)
    said = run.log.notes["minhash_dedup()"]
    assert said["recall at the threshold"] == 1 - (1 - 0.7 ** said["rows"]) ** said["bands"] >= 0.9
    assert find_recall(128, said["rows"] + 1, 0.7) < 0.9  # with longer bands it would be missed
    generator = torch.Generator().manual_seed(0)
    alike = torch.rand(20_000, 128, generator=generator) < 0.7  # numbers that two signatures share
    kept = alike[:, : said["rows"] * said["bands"]].view(-1, said["bands"], said["rows"])
    assert float(kept.all(2).any(1).double().mean()) == pytest.approx(said["recall at the threshold"], abs=0.008)
    with pytest.raises(Usage, match=r"at most 0\.7"):
        MinHashDedup(permutations=1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_duplicates_are_found_whichever_of_them_is_ranked_first(seed: int) -> None:
    """What goes is near one that stays, with a precision above 90 %, and of near ones no two stay, with this recall."""
    run = toy_run(seed=seed)
    run.tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    run.data = open_data(sources.data("tiny:planted"), run.tokenizer)
    run.apply(parse_step("random_selection(keep=1.0)"))
    ranking = [example.id for example in run.data.train]
    run.apply(MinHashDedup())
    kept = {example.id for example in run.data.train}
    near = {example.id: set(example.meta["near"]) for example in run.data.pool}
    turned = [name for name in ranking if name not in kept]
    rightly = [name for name in turned if {*ranking[: ranking.index(name)]} & near[name] & kept]
    assert len(rightly) > 0.9 * len(turned) and len(turned) >= 190
    redundant = [name for name in ranking if near[name] and ({*ranking[: ranking.index(name)]} & near[name] & kept)]
    assert len(rightly) > 0.9 * len(redundant)
    (_, report) = run.log.selections
    assert report["turned_away"] == len(turned) and report["rightly"] == len(rightly) / len(turned)


def test_planted_duplicates_are_found_with_precision_and_slots_filled_from_the_ranking() -> None:
    run = toy_run()
    run.tokenizer = AutoTokenizer.from_pretrained(tiny.MODEL)
    run.data = open_data(sources.data("tiny:planted"), run.tokenizer)
    run.apply(MinHashDedup())
    (report,) = run.log.selections
    assert report["turned_away"] >= 190 and report["rightly"] == 1.0 and report["pairs_kept"] < 0.05
    assert report["kept"]["examples"] == 2000 - report["turned_away"]
    run.data.train, run.data.reserve = None, []
    run.log.selected.clear()
    run.apply(parse_step("random_selection(keep=0.8)"))
    ranking = [example.id for example in [*run.data.train, *run.data.reserve]]
    run.apply(MinHashDedup())
    assert len(run.data.train) == 1600
    last = ranking.index(run.data.train[-1].id)
    assert last == 1599 + run.log.selections[-1]["turned_away"]
