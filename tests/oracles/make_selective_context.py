"""Selective Context of its authors: self-information of units, and which of them go, for tokens and phrases drawn."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import golden
import numpy as np
import torch

REPOSITORY, COMMIT = "liyucheng09/Selective_Context", "3074343653bbf3559a87a588667e843744bc6f2a"
folder = golden.clone(REPOSITORY, COMMIT, "src", absent=("spacy", "nltk", "nltk.tokenize"))
sys.path.insert(0, str(folder / "src"))

from selective_context import SelectiveContext  # noqa: E402

SENTENCES, RATIOS = 12, (0.2, 0.35, 0.5, 0.65, 0.8)

chance = random.Random(0)


def draw_cuts(text: str, places: list[int], most: int) -> list[str]:
    """The text cut at up to `most` of these places."""
    ends = sorted(chance.sample(places, min(most, len(places))))
    return [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]


sentences, tokens, infos, phrases = [], {}, {}, {}
for number in range(SENTENCES):
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 7))) for _ in range(chance.randint(2, 12))]
    text = f"{number} {' '.join(words)}."
    spaces = [place for place, letter in enumerate(text) if letter == " "] + [len(text) - 1]
    sentences.append(text)
    phrases[text] = draw_cuts(text, spaces, len(spaces) - chance.randint(0, 3))
    tokens[text] = draw_cuts(text, [place for place in range(1, len(text)) if text[place - 1] != " "], len(words) * 2)
    infos[text] = [chance.expovariate(0.3) for _ in tokens[text]]

compressor = SelectiveContext.__new__(SelectiveContext)  # without its models
compressor.sent_level_self_info, compressor.phrase_mask_token = True, ""
compressor.keep_leading_word, compressor.mask_token = False, ""
compressor.get_self_information = lambda text: (tokens[text], infos[text])
compressor.nlp = lambda text: [
    SimpleNamespace(text=phrase.strip(), whitespace_=" " if after.startswith(" ") else "")
    for phrase, after in zip(phrases[text], [*phrases[text][1:], ""], strict=True)
]
levels = compressor._lexical_unit(sentences)
tensors = {
    "token_ends": torch.tensor([end for text in sentences for end in np.cumsum([*map(len, tokens[text])])]),
    "token_counts": torch.tensor([len(tokens[text]) for text in sentences]),
    "phrase_ends": torch.tensor([end for text in sentences for end in np.cumsum([*map(len, phrases[text])])]),
    "phrase_counts": torch.tensor([len(phrases[text]) for text in sentences]),
}
for level in levels:
    tensors[level.unit_type] = torch.tensor(level.self_info, dtype=torch.float64)
    for ratio in RATIOS:
        compressor.mask_ratio = ratio
        names = [*map(str, range(len(level.text)))]
        _, gone = compressor.self_info_mask(names, level.self_info, level.unit_type)
        tensors[f"{level.unit_type}.{ratio}"] = torch.tensor([name not in gone for name in names])
golden.write("selective_context", __file__, [], tensors, repository=REPOSITORY, commit=COMMIT)
