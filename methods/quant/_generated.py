"""Texts that a model makes for training on its own predictions (Liu et al., 2023, section 2.1)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from effbench.core.views import Example
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.sampling import Sampling
from effbench.nn.train.teacher import BOUND, count_shared, keep_tensors, name_teacher, recall, shrink

if TYPE_CHECKING:
    from effbench.core.run import Run

GREEDY = (3, 4, 5)  # tokens behind the first that are the likeliest ones: as many, drawn for each text
ROWS = 64  # texts that are made together


def generate(run: Run, role: str, number: int, length: int) -> list[Example]:
    """So many texts of at most `length` tokens by the model of a role, from a first token drawn from all that it knows.

    The next three to five tokens are the likeliest ones, the others are sampled from the whole of the model's
    distribution, up to the token that ends a text. They are kept on disk where the run has a place for that.
    """
    known, end = count_shared(run, role), getattr(run.tokenizer, "eos_token_id", None)
    told = f"texts {name_teacher(run, role)} {end} {number} {length} {run.seed}"
    key = hashlib.sha256(told.encode()).hexdigest()
    kept = None if run.cache is None else recall(run.cache, key)
    if kept is None:
        texts = _generate(run, role, number, length, known, set() if end is None else {int(end)})
        lengths = torch.tensor([len(text) for text in texts])
        kept = {"ids": torch.tensor([token for text in texts for token in text]), "lengths": lengths}
        if run.cache is not None:
            keep_tensors(run.cache, key, kept)
            shrink(run.cache, BOUND)
    parts = kept["ids"].split(kept["lengths"].tolist())
    return [Example(f"generated {i}", tuple(part.tolist())) for i, part in enumerate(parts)]


def _generate(run: Run, role: str, number: int, length: int, known: int, stops: set[int]) -> list[list[int]]:
    engine = open_engine(run, run.role(role), known)
    chance = torch.Generator().manual_seed(run.seed)
    firsts = torch.randint(known, (number,), generator=chance).tolist()
    surely = [GREEDY[i] for i in torch.randint(len(GREEDY), (number,), generator=chance).tolist()]
    texts: dict[int, list[int]] = {}
    for places in torch.arange(number).split(ROWS):
        begun = engine.generate([[firsts[i]] for i in places.tolist()], max(GREEDY), stops)
        starts = {i: [firsts[i], *more[: surely[i]]] for i, more in zip(places.tolist(), begun, strict=True)}
        texts |= starts
        for count in GREEDY:  # together they would be padded
            some: list[Any] = [i for i, start in starts.items() if surely[i] == count == len(start) - 1]
            sampled = engine.generate(
                [starts[i] for i in some], length - 1 - count, stops, sampling=Sampling(seed=run.seed), numbers=some
            )
            texts |= {i: starts[i] + more for i, more in zip(some, sampled, strict=True)}
        run.progress("texts", len(texts), number)
    return [texts[i] for i in range(number)]
