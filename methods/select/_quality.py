"""How good a text is by itself: fluent, well formed, coherent. Each as scores, the larger the better."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.train.examples import spell
from effbench.nn.train.passes import score_losses
from effbench.sources.words import is_unspaced, list_words

ENDS = (".", "!", "?", "…", "。", "！", "？")
OPENERS, CLOSERS = "\"'“‘([«「『（《【", "\"'”’)]»」』）》】"
BRACKETS = ("()", "[]", "{}", "“”", "«»", "「」", "『』", "（）", "《》", "【】")


def even_out(scores: Tensor) -> Tensor:
    """Ranks of scores [N] in [0, 1], equal ones alike: all scores have one range then, and no outlier sets it."""
    _, places, sizes = scores.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = sizes.cumsum(0) - (sizes + 1) / 2
    return ranks[places].double() / max(1, len(scores) - 1)


def rate_perplexity(losses: Tensor) -> Tensor:
    """Closeness of log-perplexities [N] to their median: what is repetitive lies below, noise above."""
    return -(losses - losses.median()).abs()


def rate_form(run: Run, examples: Sequence[Example]) -> Tensor:
    """Share of the rules of `_follow` that each text keeps [N]."""
    return torch.tensor([_follow(spell(run, example)) for example in examples], dtype=torch.float64)


def rate_coherence(run: Run, examples: Sequence[Example], losses: Tensor) -> Tensor:
    """Loss of each text with its sentences shuffled less that in their true order [N], by the unchanged model.

    Zero, as for sentences that do not build on each other, where there are fewer than two.
    """
    shuffled = [shuffle(run, example) for example in examples]
    places = [place for place, example in enumerate(shuffled) if example is not None]
    gaps = torch.zeros(len(examples), dtype=torch.float64)
    if places:
        mixed = [example for example in shuffled if example is not None]
        after = score_losses(run, "coherence", run.reference, mixed)
        gaps[places] = (after - losses[places]).double()
    return gaps


def shuffle(run: Run, example: Example) -> Example | None:
    """The example with the sentences that it teaches in another order; None if there are fewer than two.

    Its prompt, its first token and special tokens at its end stay where they are.
    """
    begin, end = max(1, example.prompt), len(example.ids)
    special = set(getattr(run.tokenizer, "all_special_ids", ()))
    while end > begin and example.ids[end - 1] in special:
        end -= 1
    sentences: list[tuple[int, ...]] = []
    start = begin
    for place in range(begin, end):
        if place + 1 == end or _ends_sentence(run, example.ids[place]):
            sentences.append(example.ids[start : place + 1])
            start = place + 1
    if len(set(sentences)) < 2:
        return None
    chance, mixed = random.Random(f"{run.seed}/{example.id}/coherence"), list(sentences)
    while mixed == sentences:
        chance.shuffle(mixed)
    ids = (*example.ids[:begin], *(token for sentence in mixed for token in sentence), *example.ids[end:])
    return dataclasses.replace(example, ids=ids)


def _ends_sentence(run: Run, token: int) -> bool:
    if run.tokenizer is None:
        return False
    text: str = run.share(("token", token), lambda: run.tokenizer.decode([token]))
    return text.strip().rstrip(CLOSERS).endswith(ENDS)


def _follow(text: str) -> float:
    """Share of rules that a text keeps: of Gopher (Rae et al., 2021), of C4 (Raffel et al., 2020), and of any print.

    What Gopher says of words is said of English, and a text in a script without spaces keeps it.
    """
    words = list_words(text)
    if not words:
        return 0.0
    text = " ".join(text.split())
    unspaced = any(map(is_unspaced, words))
    symbols = text.count("#") + text.count("…") + text.count("...")
    repeated = sum(one == other for one, other in itertools.pairwise(words))
    rules = (
        unspaced or 3 <= sum(map(len, words)) / len(words) <= 10,  # Gopher
        unspaced or sum(any(map(str.isalpha, word)) for word in words) >= 0.8 * len(words),  # Gopher
        symbols <= 0.1 * len(words),  # Gopher
        text.rstrip(CLOSERS).endswith(ENDS),  # C4
        not text.lstrip(OPENERS)[:1].islower(),
        all(text.count(pair[0]) == text.count(pair[1]) for pair in BRACKETS),
        repeated == 0,
    )
    return sum(rules) / len(rules)
