"""BM25 of rank-bm25: scores of generated documents for questions, of Okapi's formula with its own floor."""

from __future__ import annotations

import random

import golden
import torch
from rank_bm25 import BM25Okapi

DOCUMENTS, WORDS, QUESTIONS, LONGEST, SETTINGS = 24, 40, 12, 30, ((1.5, 0.75), (1.2, 0.75), (0.9, 0.4))

chance = random.Random(0)
weights = [1 / (rank + 1) for rank in range(WORDS)]  # the first words are in more than half of the documents
documents = [chance.choices(range(WORDS), weights, k=chance.randint(3, LONGEST)) for _ in range(DOCUMENTS)]
questions = [chance.choices(range(WORDS + 4), k=chance.randint(1, 6)) for _ in range(QUESTIONS)]  # the last are nowhere
tensors = {}
for k1, b in SETTINGS:
    okapi = BM25Okapi([[f"w{word}" for word in document] for document in documents], k1=k1, b=b)
    rows = [okapi.get_scores([f"w{word}" for word in question]) for question in questions]
    tensors[f"{k1}.{b}"] = torch.tensor([row.tolist() for row in rows], dtype=torch.float64)


def even(rows: list[list[int]]) -> torch.Tensor:
    """Rows of one length, filled up with -1."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int16)


tensors |= {"documents": even(documents), "questions": even(questions)}
golden.write("bm25", __file__, ["rank-bm25"], tensors)
