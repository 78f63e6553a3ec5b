"""Extractive: sentences whose embedding is nearest to that of the question (RECOMP; Xu et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from effbench.core.kinds import Shorten
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._units import compare, cut_units, keep_best
from effbench.nn.embedders import list_files


@dataclass(frozen=True)
class Extractive(Shorten):
    """Sentences are ranked by the inner product enc(sentence) . enc(question), and the best that have room stay.

    Embeddings have length 1. What stays is in the order of the prompt. A text that is longer than the window of the
    embedder is read in chunks, of which the one that is nearest counts.
    """

    paper = "arXiv:2310.04408"
    caveats = (
        "the paper trains its encoder, Contriever, to find sentences that make the answer likely; here it is as it is",
        "the paper's embeddings have any length; here all have length 1",
        "the paper takes a number of sentences, in the order of their rank; here those with room in a share of tokens",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    asks = True
    tuned = {"by": ("model", "all-minilm-l6-v2")}

    unit: Literal["sentence", "phrase"] = "sentence"  # what stays or goes; phrases: noun phrases and words
    by: str = "model"  # what embeds: the unchanged model, all-minilm-l6-v2, or a folder of sentence-transformers

    def files(self) -> tuple[Path, ...]:
        return list_files(self.by)

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1 or not "".join(segments.contexts).strip():
            return segments
        units = cut_units(segments, self.unit)
        scores = compare(run, self, units, segments.question, self.by)
        return keep_best(self, segments, run.tokenizer, units, scores)
