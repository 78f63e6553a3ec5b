"""Data sets of the Hub as papers read them: `data=hub:NAME`.

Perplexities of the literature are comparable only where the same rows were joined in the same way, empty ones
included, and cut into windows of the same length. Special tokens are those that the tokenizer adds to the whole.
"""

from __future__ import annotations

from typing import NamedTuple

WINDOW = 512  # tokens of a window, where neither settings nor data say
TEXT_TOKENS = 16384  # of held-out text that are measured, where neither settings nor data say


class Rows(NamedTuple):
    """The column `text` of a split, joined."""

    path: str
    split: str
    configuration: str | None = None
    file: str | None = None  # the one file that is read, of many
    separator: str = "\n\n"
    first: int | None = None  # rows; None for all
    apart: bool = False  # whether a calibration window lies in one row, as in C4, instead of in all rows joined


class Protocol(NamedTuple):
    """What is measured, and what methods calibrate and train on."""

    heldout: Rows
    learned: Rows
    tokens: int | None = None  # of the held-out text; None for all
    window: int = 2048  # tokens


WIKITEXT2 = Rows("Salesforce/wikitext", "test", "wikitext-2-raw-v1")
WIKITEXT2_TRAIN = WIKITEXT2._replace(split="train")
C4 = Rows("allenai/c4", "validation", file="en/c4-validation.00000-of-00008.json.gz", separator=" ", first=1100)
C4_TRAIN = Rows("allenai/c4", "train", file="en/c4-train.00000-of-01024.json.gz", separator=" ", apart=True)
PILE_VALIDATION = Rows("mit-han-lab/pile-val-backup", "validation")

PROTOCOLS = {
    "wikitext2-gptq": Protocol(WIKITEXT2, WIKITEXT2_TRAIN),
    "wikitext2-wanda": Protocol(WIKITEXT2, C4_TRAIN),
    "wikitext2-awq": Protocol(WIKITEXT2, PILE_VALIDATION),
    "c4-gptq": Protocol(C4, C4_TRAIN, tokens=256 * 2048),
}
