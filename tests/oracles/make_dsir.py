"""What data-selection says of the n-gram counts and importance weights of texts made up here."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from data_selection.hashed_ngram_dsir import HashedNgramDSIR, get_ngram_counts
from golden import write
from torch import Tensor

LINE = "the a Queen's cat, dog; runs -- don't (see) 3.14 über été! state-of-the-art e-mail: x_1 ... why?! it's"


def texts(seed: int, number: int, share: float) -> list[str]:
    """Sentences of uneven length, in which some words are likelier by `share`."""
    chance = random.Random(seed)
    words = LINE.split()
    weights = [1 + share * place for place in range(len(words))]
    return [" ".join(chance.choices(words, weights, k=chance.randint(1, 30))) for _ in range(number)]


def tensors(ngrams: int, buckets: int) -> dict[str, Tensor]:
    """Counts of the first text, and the logarithm of each weight."""
    pool, target = texts(0, 40, 0.0), texts(1, 10, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, lines in (("pool", pool), ("target", target)):
            paths.append(Path(folder) / f"{name}.jsonl")
            paths[-1].write_text("".join(f"{json.dumps({'text': line})}\n" for line in lines))
        dsir = HashedNgramDSIR(
            [str(paths[0])],
            [str(paths[1])],
            f"{folder}/cache",
            num_proc=1,
            ngrams=ngrams,
            num_buckets=buckets,
            min_example_length=0,
        )
        dsir.fit_importance_estimator("all")
        dsir.compute_importance_weights()
        weights = np.load(next((Path(folder) / "cache" / "log_importance_weights").glob("*.npy")))
    counts = get_ngram_counts(pool[0], n=ngrams, num_buckets=buckets)
    return {
        f"counts.{ngrams}.{buckets}": torch.tensor(counts).short(),
        f"weights.{ngrams}.{buckets}": torch.tensor(weights),
    }


if __name__ == "__main__":
    made = tensors(2, 10_000) | tensors(1, 64)
    letters = {name: "\n".join(lines) for name, lines in (("pool", texts(0, 40, 0.0)), ("target", texts(1, 10, 0.5)))}
    made |= {name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name, text in letters.items()}
    write("dsir", __file__, ["data-selection", "nltk"], made)
