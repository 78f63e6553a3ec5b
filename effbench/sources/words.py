"""Words of texts in any script, for what compares texts by them."""

from __future__ import annotations

import itertools

import regex

# Letters of the scripts that put no spaces between words: between these Unicode lets a line end anywhere (Chinese,
# Japanese and other ideographs and syllables: UAX 14, classes ID, CJ, NS), or only where a dictionary says (Thai, Lao,
# Khmer, Burmese and others: class SA). Wide Latin letters and single Korean ones are in these classes as well.
UNSPACED = r"[\p{L}&&[\p{lb=ID}\p{lb=CJ}\p{lb=NS}\p{lb=SA}]--[\p{Latin}\p{Hangul}]]"
RUN = regex.compile(rf"(?V1s)(?P<unspaced>(?:{UNSPACED}\p{{M}}*)+)|(?:(?!{UNSPACED}).)+")
LETTER = regex.compile(r"\P{M}\p{M}*")


def list_words(text: str) -> list[str]:
    """What stands between white space; in a script without spaces, each two neighbouring letters.

    A letter has its marks with it. Pairs overlap, and a letter between others than such is a word alone: that is how
    search engines index these scripts without a dictionary (the CJKAnalyzer of Lucene).
    """
    words = []
    for piece in text.split():
        if piece.isascii():
            words.append(piece)
            continue
        for run in RUN.finditer(piece):
            letters = LETTER.findall(run[0]) if run["unspaced"] else ()
            words += map("".join, itertools.pairwise(letters)) if len(letters) > 1 else [run[0]]
    return words


def is_unspaced(word: str) -> bool:
    """Whether a word is of a script without spaces, and so no word of a dictionary but a piece of text."""
    return bool(RUN.match(word)["unspaced"])
