"""Prompts token by token: each token with the characters it stands for and the part it belongs to."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from effbench.core.errors import Unsupported
from effbench.core.views import Segments


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token of a prompt, or the tokens that make one character together; pieces joined are the prompt."""

    text: str  # an exact slice of the prompt, with the white space in front that the tokens bring
    ids: tuple[int, ...]
    part: int  # 0: system, 1: instruction, 2 and so on: contexts, last: question
    stays: bool  # white space that ends a part, or the last token of the prompt


def list_parts(segments: Segments) -> tuple[str, ...]:
    """The parts of a prompt in their order, empty ones included."""
    return (segments.system, segments.instruction, *segments.contexts, segments.question)


def cut(segments: Segments, tokenizer: Any) -> list[Piece]:
    """The pieces of a prompt, as the model reads it without special tokens.

    A token that brings white space from before a part belongs to that part. Raises `Unsupported` for a tokenizer that
    does not say which characters its tokens stand for.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise Unsupported("prompts are shortened token by token, for which a fast tokenizer is needed")
    text = segments.text()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans: list[tuple[int, int, tuple[int, ...]]] = []
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        start = spans[-1][1] if spans else 0  # white space that offsets leave out goes with the token behind it
        if spans and end <= start:  # the same character again
            spans[-1] = (*spans[-1][:2], (*spans[-1][2], token))
        else:
            spans.append((start, end, (token,)))
    if spans:
        spans[-1] = (spans[-1][0], len(text), spans[-1][2])
    parts = list_parts(segments)
    ends = [*itertools.accumulate(map(len, parts))]
    blank = [end - len(part) + len(part.rstrip()) for part, end in zip(parts, ends, strict=True)]  # from where on
    pieces: list[Piece] = []
    for start, end, ids in spans:
        own = text[start:end]
        place = start + max(0, len(own.rstrip()) - 1)  # of the last character that is not white space
        part = min(bisect.bisect_right(ends, place), len(parts) - 1)
        pieces.append(Piece(own, ids, part, stays=end == len(text) or (not own.strip() and start >= blank[part])))
    return pieces


def join(segments: Segments, pieces: Iterable[Piece]) -> Segments:
    """A prompt of these of its pieces. A part of which only white space is left goes, but for the end of the prompt.

    White space in front of a part is made part of what comes before it, as `Segments` has it.
    """
    parts = [""] * len(list_parts(segments))
    end: Piece | None = None
    for piece in pieces:
        parts[piece.part] += piece.text
        end = piece
    last: int | None = None  # part before that is not empty
    for i, text in enumerate(parts):
        if not text.strip() and (end is None or i != end.part):
            parts[i] = ""
        elif last is not None and text.strip():
            parts[last], parts[i] = parts[last] + text[: len(text) - len(text.lstrip())], text.lstrip()
        last = i if parts[i] else last
    contexts = tuple(text for text in parts[2:-1] if text)
    return dataclasses.replace(segments, system=parts[0], instruction=parts[1], contexts=contexts, question=parts[-1])


def count_tokens(pieces: Iterable[Piece]) -> int:
    """Tokens of pieces."""
    return sum(len(piece.ids) for piece in pieces)


def find_budget(keep: float, tokens: int) -> int:
    """Whole tokens in a share of them, whatever binary fractions make of it."""
    return int(keep * tokens + 1e-9)
