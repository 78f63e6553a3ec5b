"""Selective Context: tokens, phrases or sentences that a model would have expected go (Li et al., 2023)."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import Judge, Judged, note_chunks, open_judge
from effbench.methods.prompt._units import Unit, join_units, keep_best, split_phrases, split_sentences


@dataclass(frozen=True)
class SelectiveContext(Judged):
    """Self-information -ln p(x_t | x_<t) of the tokens of each sentence by itself; its mean over a unit is the unit's.

    With `share="units"` units at or above the percentile of all that leaves `keep` of them stay, however long they
    are; else the highest ones that have room in the budget. With `force` units stay that have such words.
    """

    paper = "arXiv:2310.06201"
    published = "selective_context(share='units')"
    caveats = (
        "the model is by default the one that is measured; the paper's are GPT-2, OPT and LLaMA",
        "phrases are found by HanTa's tags of English words and a pattern of them; the paper's are spaCy's noun chunks",
        "tokens are those of the prompt; the authors' code reads each sentence anew, without the space in front of it",
        "the mean over a unit, as in the authors' code; the paper's formula is a sum",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    trials = ({"unit": "sentence"}, {"unit": "token", "share": "units", "force": True})
    tuned = {"unit": ("token", "phrase", "sentence")}

    unit: Literal["token", "phrase", "sentence"] = "phrase"  # what stays or goes as a whole
    share: Literal["tokens", "units"] = "tokens"  # of what `keep` is a share; units: those of the contexts

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1 or not "".join(segments.contexts).strip():
            return segments
        judge = open_judge(run, self.compressor)
        pieces, forced = self.read(segments, judge)
        units: list[Unit] = []
        scores: list[float] = []
        stay: set[int] = set()
        begin = len(segments.system + segments.instruction)
        for i, context in enumerate(segments.contexts):
            own = [n for n, piece in enumerate(pieces) if piece.part == i + 2]
            places = [min(pieces[n].place + len(pieces[n].text) - begin, len(context)) for n in own]  # where they end
            sentences = lead(split_sentences(context))
            losses = judge_sentences(judge, sentences, [pieces[n].ids for n in own], places)
            ends = self.cut(sentences, places, len(context))
            scores += inform(ends, [end for n, end in zip(own, places, strict=True) for _ in pieces[n].ids], losses)
            held = [end for n, end in zip(own, places, strict=True) if pieces[n] in forced]
            stay |= {len(units) + find_unit(ends, end) for end in held}
            units += [Unit(i, context[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
            begin += len(context)
        if not segments.question.strip():  # the prompt keeps its end
            stay.add(len(units) - 1)
        note_chunks(run, self, judge.chunks)
        apart = self.unit != "token" or self.force
        if self.share == "tokens":
            # Of the model's tokens one may hold several of the compressor's.
            counted = judge.tokenizer if self.unit == "token" else run.tokenizer
            return keep_best(self, segments, counted, units, scores, stay, apart)
        return join_units(segments, units, stay | find_high(scores, self.keep), apart)

    def cut(self, sentences: Sequence[str], places: Sequence[int], length: int) -> list[int]:
        """Where the units of a context of this length end, whose tokens end at these places."""
        parts = [*itertools.chain.from_iterable(map(split_phrases, sentences))] if self.unit == "phrase" else sentences
        ends = sorted(set(places)) if self.unit == "token" else [*itertools.accumulate(map(len, parts))]
        return [*ends[:-1], length] if sentences else []


def lead(sentences: Sequence[str]) -> list[str]:
    """The same with the white space in front that was behind the one before; the last keeps its own, too."""
    moved = ["", *(text[len(text.rstrip()) :] for text in sentences)]
    led = [space + text.rstrip() for space, text in zip(moved, sentences, strict=False)]
    return [*led[:-1], led[-1] + moved[-1]] if led else []


def judge_sentences(
    judge: Judge, sentences: Sequence[str], pieces: Sequence[Sequence[int]], places: Sequence[int]
) -> list[float]:
    """-ln p of the tokens of pieces that end at these places, those of each sentence read by themselves."""
    stops = [*itertools.accumulate(map(len, sentences))]
    groups = itertools.groupby(zip(pieces, places, strict=True), lambda piece: find_unit(stops, piece[1]))
    read = [[token for ids, _ in group for token in ids] for _, group in groups]
    return [*itertools.chain.from_iterable(judge.losses([([judge.first], [], ids) for ids in read]))]


def find_unit(ends: Sequence[int], place: int) -> int:
    """The unit that the character before a place is in, by where units end."""
    return min(bisect.bisect_left(ends, place), len(ends) - 1)


def inform(ends: Sequence[int], token_ends: Sequence[int], losses: Sequence[float]) -> list[float]:
    """Mean self-information of units that end at these places; -inf for one without tokens.

    A token in which several units end is shared by those; one in which none ends is that of the unit that it is in.
    """
    own: list[list[float]] = [[] for _ in ends]
    start = 0
    for end, loss in zip(token_ends, losses, strict=True):
        ending = range(bisect.bisect_right(ends, start), bisect.bisect_right(ends, end))
        for i in ending or [find_unit(ends, end)]:
            own[i].append(loss / max(1, len(ending)))
        start = end
    return [sum(found) / len(found) if found else -np.inf for found in own]


def find_high(scores: Sequence[float], keep: float) -> set[int]:
    """Numbers of the units whose score is not below the percentile of all that leaves a share `keep`."""
    threshold = np.percentile([score for score in scores if score > -np.inf], 100 * (1 - keep))
    return {i for i, score in enumerate(scores) if score >= threshold}
