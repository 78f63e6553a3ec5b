"""Prompts token by token, each with the characters it stands for and the part it belongs to, and who judges them."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from effbench import sources
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.kinds import Shorten
from effbench.core.method import Method, Output
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.nn.files.load import open_beside
from effbench.nn.infer.engine import Engine, open_engine

JOINTS = r"[.,:/'’&@-]"  # between letters or digits of one word
WORD = re.compile(rf"\w+(?:{JOINTS}\w+)*")
TAIL, HEAD = re.compile(rf"\w{JOINTS}?\Z"), re.compile(rf"{JOINTS}?\w")  # what another word would be joined to
COMMON = frozenset(  # words of a question that say nothing of what is asked, and no names where a sentence begins
    re.findall(
        r"\w+",
        "a an and any are as at be been but by can could did do does for from had has have he her him his how i if "
        "in into is it its may me my no not of on or our she should so some than that the their them then there these "
        "they this those to up us was we were what when where which who whom whose why will with would you your",
    )
)
ENDS = (".", "!", "?", "。", "！", "？", "\n")  # of sentences


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token of a prompt, or the tokens that make one character together; pieces joined are the prompt."""

    text: str  # an exact slice of the prompt, with the white space in front that the tokens bring
    ids: tuple[int, ...]
    part: int  # 0: system, 1: instruction, 2 and so on: contexts, last: question
    stays: bool  # white space that ends a part, or the last token of the prompt
    place: int  # in the prompt, in characters
    special: bool = False  # whether there is a special token in it


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
    special = set(getattr(tokenizer, "all_special_ids", ()))
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
        stays = end == len(text) or (not own.strip() and start >= blank[part])
        pieces.append(Piece(own, ids, part, stays, start, not special.isdisjoint(ids)))
    return pieces


def is_context(piece: Piece, segments: Segments) -> bool:
    """Whether it is of a context of this prompt."""
    return 2 <= piece.part < 2 + len(segments.contexts)


def join(segments: Segments, pieces: Iterable[Piece], apart: bool = False) -> Segments:
    """A prompt of these of its pieces. A part of which only white space is left goes, but for the end of the prompt.

    White space in front of a part is made part of what comes before it, as `Segments` has it. With `apart` a space
    goes between pieces of two words that would become one, as `2024` and `ing` of what was `2024 (printing`.
    """
    parts = [""] * len(list_parts(segments))
    text = segments.text() if apart else ""
    end: Piece | None = None
    for piece in pieces:
        lost = apart and end is not None and end.place + len(end.text) < piece.place
        glued = lost and TAIL.search("".join(parts)[-2:]) and HEAD.match(text, piece.place)
        parts[piece.part] += " " + piece.text if glued else piece.text
        end = piece
    last: int | None = None  # part before that is not empty
    gone = False  # whether white space behind it is
    for i, text in enumerate(parts):
        if not text.strip() and (end is None or i != end.part):
            gone, parts[i] = gone or bool(text), ""
        elif last is not None and text.strip():
            space = text[: len(text) - len(text.lstrip())]
            space = space or (" " if apart and gone and not parts[last][-1].isspace() else "")
            parts[last], parts[i] = parts[last] + space, text.lstrip()
        if parts[i]:
            last, gone = i, False
    contexts = tuple(text for text in parts[2:-1] if text)
    return dataclasses.replace(segments, system=parts[0], instruction=parts[1], contexts=contexts, question=parts[-1])


def count_tokens(pieces: Iterable[Piece]) -> int:
    """How many tokens pieces have."""
    return sum(len(piece.ids) for piece in pieces)


def list_ids(pieces: Iterable[Piece]) -> list[int]:
    """Tokens of pieces."""
    return [token for piece in pieces for token in piece.ids]


def find_room(method: Shorten, total: int, fixed: float) -> float:
    """Tokens that are left to the contexts of a prompt of which a share stays and `fixed` are of other parts.

    Raises `Refused` where those alone are more.
    """
    most = method.keep * total
    if most - fixed < -1e-9:  # what binary fractions make of 0
        raise Refused(
            f"{method}: of {total} tokens instruction and question alone need more than the {most:.0f} that may stay"
        )
    return max(0.0, most - fixed)


def measure_room(method: Shorten, segments: Segments, pieces: Sequence[Piece]) -> tuple[float, int]:
    """Tokens that are left to the contexts of a prompt where all else stays, and how many these have.

    Raises as `find_room`.
    """
    total, size = count_tokens(pieces), count_tokens(piece for piece in pieces if is_context(piece, segments))
    return find_room(method, total, total - size), size


def round_down(tokens: float) -> int:
    """Whole tokens, whatever binary fractions make of them."""
    return int(tokens + 1e-9)


def count_text(tokenizer: Any, text: str) -> int:
    """Tokens of a text, without special ones."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def is_named(word: str) -> bool:
    """Whether it has a digit or a capital letter."""
    return any(letter.isdigit() or letter.isupper() for letter in word)


def find_forced(segments: Segments, pieces: Sequence[Piece]) -> set[Piece]:
    """The pieces that stay whatever they are worth where `force` is set.

    Special tokens, and whole words with a digit or a capital letter, or that the question has, too. Common words do
    not count. Who uses it joins `apart`: then every word with a digit or a capital letter is one of the prompt.
    """
    asked = {word.lower() for word in WORD.findall(segments.question)} - COMMON
    starts = [piece.place for piece in pieces]
    forced = {piece for piece in pieces if piece.special}
    for match in WORD.finditer(segments.text()):
        word = match[0]
        if word.lower() in asked or is_named(word):
            first, last = (bisect.bisect_right(starts, place) - 1 for place in (match.start(), match.end() - 1))
            if first < last or word.lower() not in COMMON:  # a common word in two pieces must not be halved
                forced.update(pieces[first : last + 1])
    return forced


def chunk(pieces: Sequence[Piece], most: int) -> Iterator[list[Piece]]:
    """Runs of pieces of at most `most` tokens, or one of more; they end with a sentence or line where they can."""
    start = 0
    while start < len(pieces):
        size, stop = 0, start
        while stop < len(pieces) and (stop == start or size + len(pieces[stop].ids) <= most):
            size += len(pieces[stop].ids)
            stop += 1
        if stop < len(pieces):
            ended = (i + 1 for i in range(stop - 1, start - 1, -1) if pieces[i].text.rstrip(" ").endswith(ENDS))
            stop = next(ended, stop)
        yield list(pieces[start:stop])
        start = stop


@dataclasses.dataclass
class Judge:
    """A model that judges prompts."""

    tokenizer: Any
    engine: Engine
    chunks: int = 1  # that the longest text was judged in so far

    @property
    def window(self) -> int:
        """Tokens that it can read at once."""
        return self.engine.max_length

    @property
    def first(self) -> int:
        """The token that a text begins with. Raises `Unsupported` where there is none."""
        tokenizer = self.tokenizer
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise Unsupported("the tokenizer has neither a BOS nor an EOS token to begin a text with")
        return int(first)

    def losses(self, texts: Sequence[tuple[list[int], list[int], list[int]]]) -> list[list[float]]:
        """-ln p of each token of texts: what is read in front whatever happens, what stands between, what is judged.

        What is longer than the window is judged in chunks of half of it, each behind what is in front of all and as
        much of what is right before it as has room. Raises `Unsupported` where what is in front leaves no room.
        """
        pairs: list[tuple[list[int], list[int]]] = []
        counts = []
        for front, between, ids in texts:
            begin = len(pairs)
            pairs += self._cut(front, between, ids)
            counts.append(len(pairs) - begin)
        scored = iter(self.engine.score(pairs))
        return [[-logprob for _ in range(count) for logprob in next(scored).token_logprobs] for count in counts]

    def _cut(self, front: list[int], between: list[int], ids: list[int]) -> list[tuple[list[int], list[int]]]:
        room = self.window + 1 - len(front)  # the last token is judged and not read
        if not ids or len(between) + len(ids) <= room:
            return [(front + between, ids)] if ids else []
        if room < 2:
            raise Unsupported(f"{len(front)} tokens that all is judged behind leave no room in {self.window} positions")
        before, half = between + ids, room // 2
        self.chunks = max(self.chunks, -(-len(before) // half))
        pairs = []
        for start in range(0, len(ids), half):
            part, end = ids[start : start + half], len(between) + start
            pairs.append((front + before[max(0, end - room + len(part)) : end], part))
        return pairs


def is_role(compressor: str) -> bool:
    """Whether it is the role of a model; places have a character that no word has."""
    return compressor.isidentifier()


def open_judge(run: Run, compressor: str) -> Judge:
    """The model of a role, or another one by its place, with its own tokenizer. Raises as `Run.role`, `open_run`."""
    if is_role(compressor):
        return Judge(run.tokenizer_of(compressor), open_engine(run, run.role(compressor)))
    model, tokenizer = run.share(
        ("compressor", compressor),
        lambda: open_beside(sources.fixed_model(compressor), run.device, run.model.dtype),
    )
    return Judge(tokenizer, open_engine(run, model))


def note_chunks(run: Run, method: Method, chunks: int) -> None:
    """Write down in how many chunks the longest prompt was judged."""
    noted: dict[str, int] = run.log.notes.setdefault("chunks", {})
    noted[method.key] = max(chunks, noted.get(method.key, 1))


@dataclasses.dataclass(frozen=True)
class Judged(Shorten):
    """Reads prompts with a model to shorten them."""

    compressor: str = "reference"  # the model that judges: reference, model, the name of a snapshot, or another model's
    # place, such as ./folder, gguf:FILE or org/name@COMMIT
    force: bool = False  # whether digits, names, words of the question and special tokens stay, as whole words, also
    # where there is no room for them: of a prompt with many more than `keep` stays

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.compressor: set()} if is_role(self.compressor) else {}  # recipes ask whether there is such a model

    def files(self) -> tuple[Path, ...]:
        if is_role(self.compressor):
            return ()
        try:
            return sources.fixed_model(self.compressor).files
        except Usage as error:
            raise Usage(f"{self}: compressor: {error}") from None

    def read(self, segments: Segments, judge: Judge) -> tuple[list[Piece], set[Piece]]:
        """The pieces of a prompt for its judge, and those of them that stay whatever they are worth."""
        pieces = cut(segments, judge.tokenizer)
        return pieces, find_forced(segments, pieces) if self.force else set()
