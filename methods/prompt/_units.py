"""Contexts by sentences or phrases, and which of them stay."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from effbench.core.errors import Refused
from effbench.core.kinds import Shorten
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import HEAD, TAIL, cut, find_room, is_context, note_chunks, round_down
from effbench.nn.embedders import embed_texts

SENTENCE = re.compile(r".+?(?:[.!?][\"'”’)\]]*\s+|[。！？]\s*|\n\s*|\Z)", re.DOTALL)  # with the white space behind it
WORD = re.compile(r"\d+(?:[.,]\d+)*|n['’]t\b|['’]\w+|\w+?(?=n?['’]\w)|\w+(?:-\w+)*|[^\w\s]")
# Tags of the British National Corpus: determiners and numbers, adjectives, participles, adverbs, nouns, the genitive.
KINDS = {
    **dict.fromkeys(("AT0", "DT0", "DPS", "CRD", "ORD"), "d"),
    **dict.fromkeys(("AJ0", "AJC", "AJS"), "a"),
    **dict.fromkeys(("VVG", "VVN"), "v"),
    **dict.fromkeys(("NN", "NN0", "NN1", "NN2", "NP0", "UNC", "ZZ0"), "n"),
    "AV0": "r",
    "POS": "s",
}
NOUN_PHRASE = re.compile(r"(?:d+(?:r?[av])*|(?:r?a)(?:r?[av])*)?n+(?:s(?:r?[av])*n+)*")


class Unit(NamedTuple):
    """What of a context stays or goes as a whole; the units of a context joined are the context."""

    context: int
    text: str


def cut_units(segments: Segments, unit: str) -> list[Unit]:
    """The contexts of a prompt by `unit`: context, sentence or phrase. Raises as `split_phrases`."""
    split = {"context": lambda text: [text], "sentence": split_sentences, "phrase": split_phrases}[unit]
    return [Unit(i, text) for i, context in enumerate(segments.contexts) for text in split(context)]


def split_sentences(text: str) -> list[str]:
    """Sentences and lines with the white space behind them; joined they are the text."""
    return SENTENCE.findall(text)


def split_phrases(text: str) -> list[str]:
    """Noun phrases, and words and signs outside of them, with the white space in front; joined they are the text.

    A noun phrase ends with its last noun: it is what spaCy calls a base one.
    """
    tagger = _open_tagger()
    ends: list[int] = []
    place = 0
    for sentence in split_sentences(text):
        words = [*WORD.finditer(sentence)]
        tags = tagger.tag_sent([word[0].replace("’", "'") for word in words]) if words else []
        kinds = "".join(
            KINDS.get(tag, "-") if word[0].strip("'’").isalnum() or tag == "POS" or len(word[0]) > 1 else "-"
            for word, (_, _, tag) in zip(words, tags, strict=True)
        )
        inside = {i for phrase in NOUN_PHRASE.finditer(kinds) for i in range(phrase.start(), phrase.end() - 1)}
        ends += [place + word.end() for i, word in enumerate(words) if i not in inside]
        place += len(sentence)
    ends = [*ends[:-1], len(text)] if ends else [len(text)] * bool(text)
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@functools.cache
def _open_tagger() -> Any:
    """HanTa's tagger of English words, by a hidden Markov model that its package carries."""
    from HanTa.HanoverTagger import HanoverTagger  # only phrases need it

    return HanoverTagger("morphmodel_en.pgz")


def compare(run: Run, method: Shorten, units: Sequence[Unit], question: str, by: str) -> list[float]:
    """Cosine of the embedding of each unit with that of the question; -inf for blank ones.

    The best chunk speaks for a unit that is longer than the embedder's window, the mean of all for such a question.
    Raises as `embed_texts`.
    """
    vectors, owners = embed_texts(run, [question, *(unit.text for unit in units)], by)
    note_chunks(run, method, int(owners.bincount().max()))
    asked = vectors[owners == 0].mean(0)
    best = torch.full((len(units) + 1,), -torch.inf).scatter_reduce(0, owners, vectors @ asked, "amax")
    return best[1:].tolist()


def keep_best(
    method: Shorten,
    segments: Segments,
    tokenizer: Any,
    units: Sequence[Unit],
    scores: Sequence[float],
    forced: Set[int] = frozenset(),
    apart: bool = True,
) -> Segments:
    """A prompt whose contexts are the units with the highest scores that have room in the budget, in their order.

    One that has no room is passed over; in the end the smallest of these stays, too, if the budget is then missed by
    less. Of equal ones the first stay; `forced` ones, by their numbers, stay whatever room there is. See `join_units`.
    Raises `Refused` where nothing has room, and as `find_room`.
    """
    fixed, sizes = measure(segments, tokenizer, units)
    budget = round_down(find_room(method, fixed + sum(sizes), fixed))
    kept, room = set(forced), budget - sum(sizes[i] for i in forced)
    ranked = sorted(set(range(len(units))) - kept, key=lambda i: (-scores[i], i))
    for i in ranked:
        if sizes[i] <= room:
            kept.add(i)
            room -= sizes[i]
    small = min((i for i in ranked if i not in kept), key=lambda i: sizes[i], default=None)
    if small is not None and sizes[small] - room < room:
        kept.add(small)
    if not any(units[i].text.strip() for i in kept):
        raise Refused(f"{method}: nothing that could stay whole has room in {budget} tokens")
    return join_units(segments, units, kept, apart)


def measure(segments: Segments, tokenizer: Any, units: Sequence[Unit]) -> tuple[int, list[int]]:
    """Tokens of what is no context, and of each unit, as they are in the prompt."""
    divided = replace(segments, contexts=tuple(unit.text for unit in units))
    fixed, sizes = 0, [0] * len(units)
    for piece in cut(divided, tokenizer):
        if is_context(piece, divided):
            sizes[piece.part - 2] += len(piece.ids)
        else:
            fixed += len(piece.ids)
    return fixed, sizes


def join_units(segments: Segments, units: Sequence[Unit], kept: Set[int], apart: bool = True) -> Segments:
    """A prompt whose contexts are the units with these numbers; a space keeps words `apart` that would become one."""
    contexts = [""] * len(segments.contexts)
    for i in sorted(kept):
        before, new = contexts[units[i].context], units[i].text
        glued = apart and i - 1 not in kept and TAIL.search(before[-2:]) and HEAD.match(new)
        contexts[units[i].context] += f" {new}" if glued else new
    return segments.with_contexts(contexts)
