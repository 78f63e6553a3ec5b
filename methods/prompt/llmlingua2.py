"""LLMLingua-2: a trained classifier of tokens says which words of a prompt stay (Pan et al., 2024)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import (
    Judged,
    chunk,
    count_text,
    count_tokens,
    is_context,
    join,
    measure_room,
    note_chunks,
    open_judge,
)
from effbench.methods.prompt._labels import (
    align_compressions,
    classify,
    cut_words,
    list_texts,
    train_classifier,
    try_removals,
)
from effbench.nn.train.settings import FitSettings

LONGEST = 511  # tokens of a chunk in the authors' code, of the 512 that the paper's encoders read


@dataclass(frozen=True)
class LLMLingua2(Judged):
    """The classifier is a copy of the compressor that reads in both directions and is trained when the step is taken.

    A word is worth the mean probability of its tokens. In each chunk of each context those above a percentile stay.
    """

    paper = "arXiv:2403.12968"
    caveats = (
        "the paper trains XLM-RoBERTa on meetings; here a copy of the decoder, for 150 steps on its training text",
        "labels are aligned with the words that the compressor expects least; the paper's compressions are GPT-4's",
        "aligned words are compared in lower case; the paper compares them without their inflection",
        "tokens of one character stay together",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    tuned = {"lr": (1e-4, 3e-4, 1e-3)}
    trials = (
        {"steps": 4, "texts": 8, "batch_size": 4},
        {"steps": 2, "texts": 2, "batch_size": 2, "labels": "output"},
    )

    of: Literal["prompt", "contexts"] = "prompt"  # of what `keep` is a share; contexts: as in the authors' package
    labels: Literal["aligned", "output"] = "aligned"  # of words: found again in a compression of their text; or needed,
    # so that the compressor's answer is another one without them
    steps: int = 150  # of the fit
    length: int = 128  # tokens of a text that is learned, at most
    texts: int = 128  # that are learned
    batch_size: int = 10  # of them in a step
    lr: float = 3e-4  # peak of the learning rate

    def check(self) -> None:
        super().check()
        low = [name for name in ("steps", "texts", "batch_size") if getattr(self, name) < 1]
        self.require(not low, f"{', '.join(low)} must be at least 1")
        self.require(self.length >= 2, "length must be at least 2")
        self.require(self.lr > 0, "lr must be above 0")

    def apply(self, run: Run) -> None:
        if self.keep < 1:
            judge = open_judge(run, self.compressor)
            texts = [*list_texts(run, judge, self.texts, min(self.length, judge.window - 8))]
            labels = (align_compressions if self.labels == "aligned" else try_removals)(judge, texts)
            told = [(words, row) for words, row in zip(texts, labels, strict=True) if row]
            settings = FitSettings(self.steps, self.lr, self.batch_size, max_length=self.length)
            model, report = train_classifier(run, judge, told, settings)
            run.state(self)["classifier"] = model
            run.log.notes[self.label] = {
                "texts": len(told),
                "kept": sum(map(sum, labels)) / sum(map(len, labels)),
                "loss_first": report["loss_first"],
                "loss_last": report["loss_last"],
            }
        super().apply(run)

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1 or not "".join(segments.contexts).strip():
            return segments
        judge = open_judge(run, self.compressor)
        pieces, forced = self.read(segments, judge)
        shortened = [piece for piece in pieces if is_context(piece, segments)]
        kept = {*pieces} - {*shortened}
        rate = self.keep
        if self.of == "prompt":
            room, size = measure_room(self, segments, pieces)
            rate = round(room / size, 12)  # so that of contexts alone it is `keep`
        classifier = self._find_classifier(run)
        window = min(LONGEST, judge.window)
        texts = [[*group] for _, group in itertools.groupby(shortened, lambda piece: piece.part)]
        chunks = [[*chunk(text, window)] for text in texts]
        for part in itertools.chain.from_iterable(chunks):
            words = cut_words(part)
            probabilities = iter(classify(classifier, [token for piece in part for token in piece.ids]))
            worth = [sum(next(probabilities) for _ in range(count_tokens(word))) / count_tokens(word) for word in words]
            worth = [1.0 if forced.intersection(word) else value for word, value in zip(words, worth, strict=True)]
            sizes = [count_text(run.tokenizer, "".join(piece.text for piece in word)) for word in words]
            for word, stays in zip(words, select(worth, sizes, rate), strict=True):
                kept.update(piece for piece in word if stays or piece.stays or piece in forced)
        note_chunks(run, self, max(map(len, chunks)))
        return join(segments, [piece for piece in pieces if piece in kept], apart=self.force)

    def _find_classifier(self, run: Run) -> Any:
        """That of the step of the recipe that this is, whose `keep` may be another one where a bound is set."""
        steps = run.infer.chain("prompt")
        same = (step for step in steps if isinstance(step, LLMLingua2) and replace(step, keep=self.keep) == self)
        return run.state(next(same))["classifier"]


def select(worth: Sequence[float], sizes: Sequence[int], keep: float) -> list[bool]:
    """Words worth more than a percentile of the worth of all tokens, of which a word has so many for the model.

    Of the 100 percentiles it is the one behind the share that goes, as in the authors' code; what is worth 1 stays.
    """
    spread = torch.tensor(worth, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
    threshold = float(spread.quantile(min(100, int(100 * (1 - keep) + 1)) / 100))
    return [value > threshold or value == threshold == 1 for value in worth]
