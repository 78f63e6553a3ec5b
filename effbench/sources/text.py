"""Documents from files: folders of text, lines of JSON, and the addresses that ship with effbench.

What a document says does not depend on how its file was stored: encodings, line endings and composed characters are
brought to one form before anything is counted, compared or hashed.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from effbench.core.errors import Usage
from effbench.core.usage import list_some

SPEECHES = Path(__file__).parent / "speeches" / "addresses.jsonl.gz"
FIELDS = ("prompt", "completion", "text")  # of a line of JSON; its part may stand beside them, what else describes it
SUFFIXES = ("", ".md", ".rst", ".tex", ".text", ".txt")  # of the files of a folder that are read
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
READ = ("train", "calibration", "heldout")  # parts that documents are told into
PARTS = ("train", "validation", "target", "calibration", "heldout")  # two are carved from the first if nobody has told
WORDS, PASSAGES = 80, 40  # of a passage, and of an address at most
PRESIDENTS = {"Bush": "George H. W. Bush", "GWBush": "George W. Bush"}  # others are called by one name
NAMED = re.compile(r"truman|eisenhower|kennedy|johnson|nixon|\bford\b|carter|reagan|bush|clinton", re.IGNORECASE)
PIECES = 10  # of a text that is too short to be divided by documents


class Document(NamedTuple):
    """A text, and how much of it is a prompt, which is read but not learned."""

    text: str
    name: str = ""  # where it comes from
    prompt: int | None = None  # characters of the prompt; None for plain text
    meta: Mapping[str, Any] | None = None  # what else its source says of it
    part: str | None = None  # that its source puts it in

    @property
    def digest(self) -> str:
        """SHA-256 of what it says, whatever its name."""
        cut = self.prompt or 0
        parts = (self.text,) if self.prompt is None else (self.text[:cut], self.text[cut:])
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in parts that share none: three of them, and those that documents are told into."""

    parts: dict[str, list[Document]]
    notes: str = ""  # how they were read
    digest: str = ""  # of what they say


def read_folder(folder: Path) -> Corpus:
    """The text files of a folder and of those below it.

    Files of other kinds and hidden ones are skipped, and the notes name them. Raises `Usage` for a file that calls
    itself text and is none, and for a folder without text.
    """
    documents: list[Document] = []
    skipped: dict[str, None] = {}
    latin = empty = 0
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = [number for number, part in enumerate(inside.parts, 1) if part.startswith(".")]
        if hidden:
            skipped["/".join(inside.parts[: hidden[0]])] = None
        elif path.is_file() and path.suffix.lower() not in SUFFIXES:
            skipped[inside.as_posix()] = None
        elif path.is_file():
            text, is_latin = _decode(path)
            latin += is_latin
            empty += not text.strip()
            documents += [Document(text, inside.as_posix())] if text.strip() else []
    if not documents:
        raise Usage(
            f"{folder}: holds no text{_list(skipped, '; skipped')}; text files end in {', '.join(SUFFIXES[1:])}"
        )
    counts = {"as Latin-1": latin, "empty": empty}
    return _corpus(folder, documents, "files", counts, _list(skipped, ", skipped"))


def read_lines(path: Path) -> Corpus:
    """The documents of a file with one JSON object a line: {"prompt": ..., "completion": ...} or {"text": ...}, and
    perhaps the "part" that it belongs to.

    Raises `Usage` that names the lines that are neither.
    """
    documents: list[Document] = []
    wrong: dict[str, str] = {}  # number of a line: what is wrong with it
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                documents.append(_parse(line, f"{path.name}:{number}"))
            except ValueError as error:
                wrong[str(number)] = str(error)
    if wrong:
        first, reason = next(iter(wrong.items()))
        raise Usage(f"{path}: line {first}: {reason}{_list(list(wrong)[1:], '; also wrong: line')}")
    filled = [document for document in documents if document.text.strip()]
    if not filled:
        raise Usage(f"{path}: holds no text")
    return _corpus(path, filled, "lines", {"empty": len(documents) - len(filled)}, "")


@functools.cache
def read_speeches() -> Corpus:
    """The State of the Union addresses that ship, in parts that are fixed."""
    parts: dict[str, list[Document]] = {part: [] for part in READ}
    for line in gzip.decompress(SPEECHES.read_bytes()).decode().splitlines():
        row = json.loads(line)
        parts[row["part"]].append(Document(row["text"], row["name"]))
    return Corpus(parts, "", _digest(document for part in READ for document in parts[part]))


@functools.cache
def read_presidents() -> Corpus:
    """Passages of those addresses as prompts, and which president gave them as what is to be learned.

    No passage names one of the presidents. No address has passages in two parts, validation and target included, and
    in every part passages of all its addresses take turns.
    """
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    for part, addresses in read_speeches().parts.items():
        found: list[list[Document]] = [[] for _ in addresses]
        told: list[str] = []
        for place, address in enumerate(addresses):
            aside = {3: "validation", 7: "target"}.get(place % 8, part) if part == "train" else part
            told.append(aside)
            who = address.name.split("-")[1]
            for number, passage in enumerate(_cut_passages(address.text)):
                prompt = f"{passage}\n\nThis was said to the Congress by President"
                text = f"{prompt} {PRESIDENTS.get(who, who)}"
                found[place].append(Document(text, f"{address.name}/{number}", len(prompt), {"president": who}))
        for turn in itertools.zip_longest(*found):
            for aside, document in zip(told, turn, strict=True):
                if document is not None:
                    parts[aside].append(document)
    return Corpus(parts, "", _digest(document for part in PARTS for document in parts[part]))


def _cut_passages(text: str) -> list[str]:
    """Passages of so many words, at even distances, that name no president."""
    words = text.split()
    cut = [" ".join(words[start : start + WORDS]) for start in range(0, len(words) - WORDS + 1, WORDS)]
    silent = [passage for passage in cut if not NAMED.search(passage)]
    step = max(1.0, len(silent) / PASSAGES)
    return [silent[int(number * step)] for number in range(min(PASSAGES, len(silent)))]


READERS = {"text": read_folder, "jsonl": read_lines}  # by kind of data, each for a path


def normalise(text: str) -> str:
    """`text` with plain line ends and composed characters (NFC)."""
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))


def split_text(document: Document, pieces: int) -> list[Document]:
    """A text in at most so many pieces of about one length, cut behind line ends or else behind spaces."""
    text, starts = document.text, [0]
    for piece in range(1, pieces):
        place = max(starts[-1], piece * len(text) // pieces)
        end = next((found for mark in ("\n", " ") if (found := text.find(mark, place) + 1) > 0), 0)
        if starts[-1] < end < len(text):
            starts.append(end)
    ends = [*starts[1:], len(text)]
    return [Document(text[a:b], f"{document.name}/{i}") for i, (a, b) in enumerate(zip(starts, ends, strict=True))]


def _corpus(path: Path, documents: Sequence[Document], what: str, counts: dict[str, int], skipped: str) -> Corpus:
    """The documents in parts: each once, in the part that it names. Those that name none are divided among the parts to
    train on, to calibrate on and to measure on that no document names.

    Of fewer than three documents the text is cut. Raises `Usage` where a part to train or to measure on stays empty.
    """
    by_digest = {document.digest: document for document in reversed(documents)}  # the first of equal ones
    chosen = dict(sorted(by_digest.items()))
    told: dict[str, list[Document]] = {}
    for document in chosen.values():
        if document.part is not None:
            told.setdefault(document.part, []).append(document)
    free = {digest: document for digest, document in chosen.items() if document.part is None}
    divided = _divide(free, [part for part in READ if part not in told])
    parts = {part: divided.get(part, []) for part in READ} | told
    counts = counts | {"repeated": len(documents) - len(chosen)}
    counts |= {f"told into {part}": len(found) for part, found in told.items()}
    read = ", ".join(f"{number} {how}" for how, number in counts.items() if number)
    notes = f", {len(documents)} {what}{f' ({read})' if read else ''}{skipped}"
    if told:
        if free and {*READ} <= {*told}:
            raise Usage(f"{path}: {len(free)} examples name no part, and others name all that these could fall in")
        if lacking := [part for part in ("train", "heldout") if not parts[part]]:
            raise Usage(f"{path}: no example is of the part {' or '.join(lacking)}, and too few name no part")
    elif not all(parts[part] for part in READ):
        if any(document.prompt is not None for document in free.values()):
            raise Usage(f"{path}: {len(free)} different examples do not fall in three parts: give at least 3")
        parts = _cut(list(free.values()))
        notes += ", cut in three for want of documents"
    return Corpus(parts, notes, _digest(chosen.values()))


def _divide(documents: Mapping[str, Document], parts: Sequence[str]) -> dict[str, list[Document]]:
    """Documents by digest, told into some of `READ` by it, so that adding documents moves no other.

    Where that leaves one empty, one document goes into each part but the first, and the others into that.
    """
    divided: dict[str, list[Document]] = {part: [] for part in parts}
    for digest, document in documents.items() if parts else ():
        wanted = {0: "heldout", 1: "calibration"}.get(int(digest[:8], 16) % 10, "train")
        divided[wanted if wanted in divided else parts[0]].append(document)
    left = list(documents.values())
    if not all(divided.values()) and len(left) >= len(parts):
        ends = [0, *range(1, len(parts)), len(left)]
        turns = zip(reversed(parts), itertools.pairwise(ends), strict=True)
        divided = {part: left[start:end] for part, (start, end) in turns}
    return divided


def _cut(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """Three parts of what few documents say."""
    whole = "\n\n".join(document.text for document in documents)
    ends = (0, len(whole) // 5, 2 * len(whole) // 5, len(whole))
    pieces = zip(reversed(READ), itertools.pairwise(ends), strict=True)
    parts = {part: [Document(whole[start:end], part)] for part, (start, end) in pieces}
    return parts | {"train": split_text(parts["train"][0], PIECES)}


def _digest(documents: Iterable[Document]) -> str:
    said = (f"{document.digest} {document.part or ''}".rstrip() for document in documents)
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _parse(line: str, name: str) -> Document:
    """The document of one line. Raises `ValueError` that says what is wrong with it."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError('no object: write {"prompt": ..., "completion": ...} or {"text": ...}')
    keys = [key for key in FIELDS if key in row]
    if keys not in (["prompt", "completion"], ["text"]):
        raise ValueError(f"has {', '.join(keys or row) or 'no keys'}: it takes prompt and completion, or text alone")
    for key in keys:
        if not isinstance(row[key], str):
            raise ValueError(f"{key} is no text")
    values = [normalise(row[key]) for key in keys]
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a character (a lone surrogate)") from None
    if (part := row.get("part")) not in (None, *PARTS):
        raise ValueError(f"part is {part!r}: it must be one of {', '.join(PARTS)}, or be left out")
    meta = {key: value for key, value in row.items() if key not in (*FIELDS, "part")}
    if keys == ["text"]:
        return Document(values[0], name, None, meta, part)
    if not values[1].strip():
        raise ValueError("completion is empty: there is nothing to learn")
    return Document("".join(values), name, len(values[0]), meta, part)


def _decode(path: Path) -> tuple[str, bool]:
    """The text of a file, and whether it had to be read as Latin-1. Raises `Usage` for a binary file."""
    raw = _bytes(path)
    if raw.startswith(UTF16):
        return normalise(raw.decode("utf-16", errors="replace")), False
    if b"\0" in raw:
        raise Usage(f"{path}: is binary, not text: take it out, or give it another suffix")
    try:
        return normalise(raw.decode("utf-8-sig")), False
    except UnicodeDecodeError:
        return normalise(raw.decode("latin-1")), True


def _read(path: Path) -> str:
    """The text of a file that must be UTF-8. Raises `Usage`."""
    try:
        return normalise(_bytes(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise Usage(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Usage(f"{path}: cannot be read ({error.strerror})") from None


def _list(names: Iterable[str], before: str) -> str:
    """`before` and the names, of many the first few; empty without names."""
    names = list(names)
    return f"{before} {list_some(names)}" if names else ""
