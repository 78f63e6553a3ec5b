"""MinHash pairs of datasketch: signatures, what shares a band, and the exact Jaccard indices of those pairs."""

from __future__ import annotations

import random

import golden
import torch
from datasketch import MinHash, MinHashLSH

TEXTS, LENGTH, WORDS, PERMUTATIONS, BANDS, ROWS = 60, 40, 5, 128, 21, 6

chance = random.Random(0)
texts = [[chance.randrange(2000) for _ in range(LENGTH)] for _ in range(TEXTS)]
for place in range(40, TEXTS):  # the last ones are others with another end, of 1 to 20 words
    changed = place - 39
    texts[place] = texts[place - 40][: LENGTH - changed] + [chance.randrange(2000) for _ in range(changed)]
grams = [{" ".join(f"w{word}" for word in text[i : i + WORDS]) for i in range(LENGTH - WORDS + 1)} for text in texts]

index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
signatures = []
for place, found in enumerate(grams):
    signature = MinHash(num_perm=PERMUTATIONS)
    for gram in found:
        signature.update(gram.encode())
    index.insert(place, signature)
    signatures.append(signature)
pairs = sorted(
    {(min(place, other), max(place, other)) for place in range(TEXTS) for other in index.query(signatures[place])}
    - {(place, place) for place in range(TEXTS)}
)
golden.write(
    "minhash",
    __file__,
    ["datasketch"],
    {
        "texts": torch.tensor(texts, dtype=torch.int16),
        "signatures": torch.tensor([[int(value) for value in each.hashvalues] for each in signatures]),
        "pairs": torch.tensor(pairs),
        "estimated": torch.tensor([signatures[one].jaccard(signatures[other]) for one, other in pairs]),
        "exact": torch.tensor(
            [len(grams[one] & grams[other]) / len(grams[one] | grams[other]) for one, other in pairs]
        ),
    },
    bands=BANDS,
    rows=ROWS,
)
