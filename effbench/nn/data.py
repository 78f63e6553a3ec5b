"""What a run trains on, chooses by, calibrates on and is measured on. No two parts share a document."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from effbench import tiny
from effbench.core.errors import Refused, Unavailable, Unsupported, first_line
from effbench.core.views import Example, Segments
from effbench.sources.duplicates import count_shared
from effbench.sources.protocols import Rows
from effbench.sources.text import (
    PARTS,
    PIECES,
    READERS,
    Corpus,
    Document,
    normalise,
    read_presidents,
    read_speeches,
    split_text,
)
from effbench.tiny import planted

if TYPE_CHECKING:
    from effbench.sources import DataSource

SEQUENCES = 128  # calibration sequences, as in GPTQ, Wanda and AWQ
LONGEST = 2048  # tokens in each, at most
SPREAD = 16  # calibration windows are drawn from the first so many times as many tokens as they take
COMPARED = 20_000  # documents of a part that are looked through for near-duplicates, at most
ASIDE = 2**16  # tokens that are read of the other parts, at most
POOL = 2**23  # tokens that the pool holds, if there are so many; more where a fit takes more
CHARACTERS = 8  # that are tokenised for each token wanted, at first
MARGIN = 64  # tokens before a cut through a text that the cut may have changed
WITHHELD = "an acquisition sees prompts whose answers nobody has told yet"
# Documents of each part of the generated world and of the new task in it.
TINY = {"train": 2000, "validation": 200, "target": 200, "calibration": 1000, "heldout": 400}
TASK = {"train": 2000, "validation": 200, "target": 200, "calibration": 400, "heldout": 400}


class Part(NamedTuple):
    """Documents, and how they become one stream of tokens."""

    documents: Sequence[Document]
    separator: str = "\n\n"
    special: bool = False  # whether the tokenizer adds its special tokens, to the whole
    apart: bool = False  # whether a calibration window lies in one document


class Stream:
    """Examples of documents, tokenised as far as they are asked for."""

    def __init__(self, documents: Sequence[Document], examples: list[Example]) -> None:
        self.documents = documents
        self.examples = examples
        self._read = self._tokens = 0  # documents that are among the examples, and tokens

    def extend(self, tokens: int, cut: Callable[[Document, int], list[Example]]) -> int:
        """Have so many tokens, if there is so much text, and say how many documents are left over."""
        while self._tokens < tokens and self._read < len(self.documents):
            examples = cut(self.documents[self._read], self._read)
            self.examples += examples
            self._read += 1
            self._tokens += sum(len(example.ids) for example in examples)
        return len(self.documents) - self._read


class Data:
    """Documents of disjoint parts, tokenised on demand and no further than is asked for.

    `pool` is everything that may be trained on, `train` what the next `fit` sees and `reserve` what was ranked behind
    it; selections narrow `train`. Plain text lies in the pool in windows of at most `width` tokens; an example with a
    prompt is one, whatever its length.
    """

    tasks: tuple[str, ...] = ()  # lm-eval tasks that belong to the data
    task_paths: tuple[Path, ...] = ()
    window: int | None = None  # tokens per window of perplexity that belong to the data, all of which is then measured
    most: int | None = None  # tokens that are measured

    def __init__(
        self,
        name: str,
        parts: dict[str, Part],
        tokenizer: Any,
        notes: str = "",
        width: int = LONGEST,
        made: bool = False,
    ) -> None:
        self.name = name
        self.width = width
        self._learned = name  # whose text it calibrates and trains on
        self._parts = {part: Part(()) for part in PARTS} | parts
        self._parts |= carve(self._parts["train"], [part for part in ("target", "validation") if part not in parts])
        self._tokenizer = tokenizer
        self._examined = self
        self._closed: frozenset[str] = frozenset()
        self._made = made
        self._streams: dict[str, Stream] = {}
        self._train: list[Example] | None = None
        self.reserve: list[Example] = []
        self.asked: int | None = None
        heldout = self._parts["heldout"]
        joint = "a blank line" if heldout.separator == "\n\n" else repr(heldout.separator)
        added = "special tokens added as the tokenizer does" if heldout.special else "no token added"
        self.protocol = f"{name}, documents joined by {joint}, tokenised once, {added}{notes}"

    def documents(self, part: str) -> list[str]:
        """The texts of a part, made when first asked for."""
        self._look_at(part)
        return [document.text for document in self._parts[part].documents]

    def ids(self, part: str, limit: int | None = None) -> Tensor:
        """[N] tokens of a part, documents joined, at most `limit`; no more text than that takes is tokenised.

        Raises `Unsupported` where there is none.
        """
        _, separator, special, _ = self._parts[part]
        ids = self._encode(separator.join(self.documents(part)), limit, special)
        if not ids:
            name = self.name if part == "heldout" else self._learned
            raise Unsupported(f"{name}: the {part} part has no text")
        return torch.tensor(ids)

    def heldout_ids(self, limit: int | None = None) -> Tensor:
        """[N] tokens of the held-out part, at most `limit`."""
        return self.ids("heldout", min((n for n in (limit, self.most) if n is not None), default=None))

    def calibration(self, sequences: int, length: int, seed: int) -> Tensor:
        """[sequences, length]: windows of the calibration part, drawn by `seed`. Raises `Unsupported`."""
        rng = random.Random(f"{seed}/calibration")
        if self._parts["calibration"].apart:
            return self._draw_apart(sequences, length, rng)
        ids = self.ids("calibration", SPREAD * sequences * length)
        if len(ids) < length:
            raise Unsupported(
                f"{self._learned}: calibration and training text have {len(ids)} tokens, a window needs {length}: give "
                "more text, or a smaller --set calibration_length= (calibration_sequences= is their number)"
            )
        starts = [rng.randrange(len(ids) - length + 1) for _ in range(sequences)]
        return torch.stack([ids[start : start + length] for start in starts])

    def borrow(self, length: int) -> None:
        """Calibrate on the training part too where the calibration part is shorter than one window, and say so."""
        part = self._parts["calibration"]
        if not part.apart and len(self.ids("calibration", length)) < length:
            together = [*part.documents, *self._parts["train"].documents]
            self._parts["calibration"] = part._replace(documents=together)
            self.protocol += f", calibration part shorter than {length} tokens and filled up with the training part"

    @property
    def pool(self) -> list[Example]:
        """Training examples: all of them, or those of the first documents where there are more than a fit takes."""
        return self._read("train", POOL)

    @pool.setter
    def pool(self, examples: list[Example]) -> None:
        self._streams["train"] = Stream((), examples)

    @property
    def validation(self) -> list[Example]:
        """Examples by which rates and settings are chosen."""
        return self._read("validation", ASIDE)

    @validation.setter
    def validation(self, examples: list[Example]) -> None:
        self._streams["validation"] = Stream((), examples)

    @property
    def target(self) -> list[Example]:
        """Examples of what the model is to become good at; selectors may look at them."""
        return self._read("target", ASIDE)

    @target.setter
    def target(self, examples: list[Example]) -> None:
        self._streams["target"] = Stream((), examples)

    @property
    def unseen(self) -> list[Example]:
        """Held-out examples of what is trained on, for probes alone."""
        return self._examined._read("heldout", ASIDE)

    @contextlib.contextmanager
    def closed(self, *parts: str) -> Iterator[None]:
        """Have whoever looks at held-out text inside be refused, or at what else is named of `PARTS`."""
        before = self._closed
        self._closed = self._examined._closed = before | {"heldout", *parts}
        try:
            yield
        finally:
            self._closed = self._examined._closed = before

    @contextlib.contextmanager
    def teaching(self, examples: list[Example]) -> Iterator[None]:
        """Have `train` hold these examples inside."""
        before = self._train
        self._train = examples
        try:
            yield
        finally:
            self._train = before

    @contextlib.contextmanager
    def asking(self, number: int, labelled: list[Example] | None = None) -> Iterator[None]:
        """Have whoever looks at answers of the pool inside be refused; `train` holds those that are known, if any.

        `number` are to be bought, which is what is `asked` then. Calibration text is closed, too, as it may have been
        filled up with that of the pool.
        """
        before = self._train, self.reserve, self.asked
        self._train, self.reserve, self.asked = labelled or None, [], number
        try:
            with self.closed("train", "calibration"):
                yield
        finally:
            self._train, self.reserve, self.asked = before

    def _look_at(self, part: str) -> None:
        if part not in self._closed:
            return
        if part == "heldout":
            raise Refused("held-out text is what the model is measured on: a selection must not look at it")
        raise Refused(f"{WITHHELD}, and must not look at the {part} part")

    def has(self, part: str) -> bool:
        """Whether there is something of a part."""
        stream = self._stream(part)
        return bool(stream.examples or len(stream.documents))

    def count_near_duplicates(self) -> int | None:
        """How many held-out documents share most of their words with one that is learned or chosen by.

        None where that is no question: in text that was generated, or that ships in parts that are known.
        """
        if self._examined._made:
            return None
        parts = {name: part.documents[:COMPARED] for name, part in self._examined._parts.items()}
        others = itertools.chain.from_iterable(parts[name] for name in PARTS if name != "heldout")
        return count_shared((d.text for d in parts["heldout"]), (d.text for d in others))

    def extend(self, tokens: int) -> int:
        """Have the pool hold so many tokens, if there is so much text, and say how many documents are left over."""
        return self._stream("train").extend(tokens, self._cut)

    def _read(self, part: str, tokens: int) -> list[Example]:
        self._look_at(part)
        stream = self._stream(part)
        stream.extend(tokens, self._cut)
        return stream.examples

    def _stream(self, part: str) -> Stream:
        if part not in self._streams:
            self._streams[part] = Stream(self._parts[part].documents, [])
        return self._streams[part]

    def _cut(self, document: Document, number: int) -> list[Example]:
        """The examples of one document."""
        example = self._example(document, number)
        return [example] if document.prompt is not None else cut(example, self.width)

    @property
    def train(self) -> list[Example]:
        """The examples that the next `fit` sees."""
        return self.pool if self._train is None else self._train

    @train.setter
    def train(self, examples: list[Example] | None) -> None:
        self._train = examples

    def learn_from(self, other: Data) -> None:
        """Calibrate, train and be examined on another's text; the text that is measured stays."""
        self._examined = other
        self._parts |= {part: other._parts[part] for part in PARTS if part != "heldout"}
        self._streams.clear()
        self._learned = f"calibration_data {other.name}"
        self.protocol += f", calibration and training on {other.protocol}"

    def _encode(self, text: str, limit: int | None = None, special: bool = False) -> list[int]:
        """The first `limit` tokens of a text, or all. Of a long text only a beginning is tokenised."""
        if self._tokenizer is None:
            raise Unsupported("the model's folder has no tokenizer: name one with tokenizer=")
        size = len(text) if limit is None else CHARACTERS * (limit + MARGIN)
        while True:
            ids: list[int] = self._tokenizer(text[:size], add_special_tokens=special, verbose=False)["input_ids"]
            if size >= len(text):
                return ids[:limit]
            if limit is not None and len(ids) >= limit + MARGIN:
                return ids[:limit]
            size *= 2

    def _example(self, document: Document, number: int) -> Example:
        """A document as one example: what the tokenizer puts in front, the text, and the stop token, which is learned.

        A prompt and its completion are tokenised apart, as they are when a model is asked to complete it.
        """
        cut_at = document.prompt or 0
        prompt = self.encode_prompt(document.text[:cut_at])
        end = self._tokenizer.eos_token_id
        ids = (*prompt, *self._encode(document.text[cut_at:]), *([] if end is None else [end]))
        name, learned_from = document.name or str(number), 0 if document.prompt is None else len(prompt)
        meta = document.meta or {}
        segments = None if document.prompt is None else Segments.divide(document.text[:cut_at], meta)
        return Example(name, ids, learned_from, document.text, meta, segments=segments)

    def encode_prompt(self, text: str) -> list[int]:
        """What the tokenizer puts in front, and the text."""
        return [*self._front, *(self._encode(text) if text else [])]

    @functools.cached_property
    def _front(self) -> list[int]:
        """Special tokens that the tokenizer puts in front of a text."""
        plain, whole = self._encode("a"), self._encode("a", special=True)
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])

    def _draw_apart(self, sequences: int, length: int, rng: random.Random) -> Tensor:
        """Calibration windows from one document each. Raises `Unsupported` where too few are long enough."""
        documents = self._parts["calibration"].documents
        windows: list[Tensor] = []
        for index in rng.sample(range(len(documents)), len(documents)):
            if len(windows) == sequences:
                break
            ids = self._encode(documents[index].text, special=self._parts["calibration"].special)
            if len(ids) > length:
                start = rng.randrange(len(ids) - length)
                windows.append(torch.tensor(ids[start : start + length]))
        if len(windows) < sequences:
            raise Unsupported(
                f"{self._learned}: {len(windows)} documents have more than {length} tokens, {sequences} are needed: "
                "--set calibration_length= or calibration_sequences= to less"
            )
        return torch.stack(windows)


class RandomTokens(Data):
    """For random weights: tokens to calibrate with, nothing to measure quality on."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__("random tokens", {}, None, made=True)
        self._vocabulary = vocabulary
        rows = self.calibration(2, 128, 0).tolist()
        self.pool = [Example(str(i), tuple(row)) for i, row in enumerate(rows)]
        self.validation = list(self.pool)

    def heldout_ids(self, limit: int | None = None) -> Tensor:
        raise Refused("the weights are random: their quality means nothing")

    def calibration(self, sequences: int, length: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self._vocabulary, (min(sequences, 2), length), generator=generator)


def cut(example: Example, width: int) -> list[Example]:
    """The example in windows of at most `width` tokens.

    The last token of a window is the first of the next, so that every token but the first of a text is learned once. An
    example with a prompt stays one and loses its end; what leaves nothing to learn is left out.
    """
    ids = example.ids
    if example.prompt:
        return [dataclasses.replace(example, ids=ids[:width])] if min(len(ids), width) > example.prompt else []
    if len(ids) <= width:
        return [example] if len(ids) > 1 else []
    starts = enumerate(range(0, len(ids) - 1, width - 1))
    return [dataclasses.replace(example, id=f"{example.id}/{n}", ids=ids[i : i + width]) for n, i in starts]


def count_learned(example: Example) -> int:
    """Tokens of an example that are predicted and learned: neither the first one nor the prompt."""
    return len(example.ids) - max(1, example.prompt)


class Lazy(Sequence[Document]):
    """Documents that are made when one is first asked for."""

    def __init__(self, make: Callable[[], Iterable[Document]]) -> None:
        self._make = make

    @functools.cached_property
    def _made(self) -> list[Document]:
        return list(self._make())

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]


class Share(Sequence[Document]):
    """What a part has of documents that are counted when they are first asked for: a tenth, or what some have left."""

    def __init__(self, documents: Sequence[Document], after: int, first: bool = False) -> None:
        self._documents = documents
        self._after = after  # tenths behind it
        self._first = first

    @functools.cached_property
    def _range(self) -> range:
        """Places of the documents."""
        number = len(self._documents)
        few = max(1, number // 10) if number > 2 else 0
        end = number - self._after * few
        return range(0 if self._first else end - few, end)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._documents[place] for place in self._range[index]]
        return self._documents[self._range[index]]


def carve(part: Part, names: Sequence[str]) -> dict[str, Part]:
    """A part for training, and others of these names that take a tenth of it each, from its end."""
    shares = {"train": Share(part.documents, len(names), first=True)}
    shares |= {name: Share(part.documents, after) for after, name in enumerate(reversed(names))}
    return {name: part._replace(documents=share) for name, share in shares.items()}


class Column(Sequence[Document]):
    """The rows of a data set as documents, each read when it is asked for."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return Document(self._rows[index]["text"])


def open_data(source: DataSource, tokenizer: Any, width: int = LONGEST, length: int = 1) -> Data:
    """The data of a run. Raises `Unsupported` for text that cannot be used, `Unavailable` for what is out of reach.

    width   tokens in a window of the pool, at most
    length  tokens in a calibration sequence: what a calibration part has to offer
    """
    data = _open(source, "data", tokenizer, width)
    if source.learned is not None:
        data.learn_from(_open(source.learned, "calibration_data", tokenizer, width))
    if tokenizer is not None and (source.learned or source).kind != "tiny":  # which is long, and costs time to make
        data.borrow(length)
    return data


def _open(source: DataSource, option: str, tokenizer: Any, width: int) -> Data:
    if source.kind == "tiny":
        data = Data("tiny", _make(_write, TINY), tokenizer, width=width, made=True)
        data.tasks, data.task_paths = ("tiny",), source.task_folders
        if source.name != "tiny":
            learned = _make(WRITERS[source.name], TASK)
            data.learn_from(Data(source.name, learned, tokenizer, width=width, made=True))
        return data
    if source.kind == "hub":
        return _open_hub(source, option, tokenizer, width)
    if source.kind == "speeches":
        data = Data("speeches", _tell_parts(read_speeches()), tokenizer, width=width, made=True)
        if source.task_folders:
            data.tasks, data.task_paths = ("speeches",), source.task_folders
        if source.name == "speeches:presidents":
            data.learn_from(Data(source.name, _tell_parts(read_presidents()), tokenizer, width=width, made=True))
        return data
    assert source.path is not None
    corpus = READERS[source.kind](source.path)
    return Data(source.name, _tell_parts(corpus), tokenizer, corpus.notes, width)


def _tell_parts(corpus: Corpus) -> dict[str, Part]:
    return {name: Part(documents) for name, documents in corpus.parts.items()}


def _make(write: Callable[[str, int], Iterable[Document]], sizes: Mapping[str, int]) -> dict[str, Part]:
    """Parts of so many generated documents each."""
    return {part: Part(Lazy(functools.partial(write, part, number))) for part, number in sizes.items()}


def _write(part: str, number: int) -> list[Document]:
    """Documents of the generated world."""
    written = enumerate(tiny.write(part, number))
    return [Document(text, f"{part}/{i}", None, {"skill": kind}) for i, (kind, text) in written]


def _ask(part: str, number: int) -> list[Document]:
    """Examples of the new task in it; what an answer begins with is its label."""
    asked = enumerate(tiny.ask(part, number))
    return [
        Document(prompt + answer, f"{part}/{i}", len(prompt), {"label": answer.split()[0]})
        for i, (prompt, answer) in asked
    ]


def _question(part: str, number: int) -> list[Document]:
    """Questions over several contexts, in the form of the tasks."""
    documents = []
    for i, asked in enumerate(tiny.ask_about(part, number)):
        prompt = " ".join([asked.instruction, *asked.contexts, asked.question])
        meta = {"instruction": asked.instruction, "contexts": asked.contexts, "question": asked.question}
        documents.append(Document(f"{prompt} {asked.answer}.", f"{part}/{i}", len(prompt), meta))
    return documents


def _plant(part: str, number: int) -> list[Document]:
    """The pool to select from, with the truth about it, and examples of its target."""
    found = planted.plant() if part == "train" else planted.extract(part, number)
    return [Document(item.text, f"{part}/{i}", item.prompt, item.meta) for i, item in enumerate(found)]


WRITERS = {"tiny:task": _ask, "tiny:questions": _question, "tiny:planted": _plant}  # what is learned, by its name


def _open_hub(source: DataSource, option: str, tokenizer: Any, width: int) -> Data:
    """A data set of the Hub: as a paper reads it, or by its own splits and its column `text`."""
    name, protocol = source.name, source.protocol
    ask = functools.partial(_ask_hub, f"{option}={name}")
    if protocol is not None:
        heldout, learned = _load(protocol.heldout, ask), _load(protocol.learned, ask)
        train = learned if learned.apart else _join(learned)
        data = Data(name, {"heldout": heldout, "calibration": learned, "train": train}, tokenizer, width=width)
        data.window, data.most = protocol.window, protocol.tokens
        return data
    path, _, configuration = name.removeprefix("hub:").partition("[")[0].partition("/@")
    columns = dict(source.columns) or {"text": "text"}
    splits = ask(path, configuration or None)

    def read(*names: str) -> list[Document]:
        found = next((name for name in names if name in splits), None)
        documents = (_read_row(row, columns, name) for row in splits[found]) if found else ()
        return [document for document in documents if document.text.strip()]

    rows = read("train")
    few = -(-len(rows) // 10)  # rows may be pieces of documents, so those of a part lie side by side
    documents = {"calibration": rows[:few], "train": rows[few:], "heldout": read("test", "validation")}
    if not documents["heldout"]:
        raise Unsupported(f"{name}: no test or validation split")
    return Data(name, {part: Part(texts) for part, texts in documents.items()}, tokenizer, width=width)


def _read_row(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> Document:
    """The document of one row; what its other columns hold describes it. Raises `Unsupported` for a missing column."""
    lacking = [column for column in columns.values() if not isinstance(row.get(column), str)]
    if lacking:
        raise Unsupported(
            f"{name}: has no column of text called {lacking[0]!r}, but {', '.join(row)}: name them, "
            "hub:NAME[prompt=COLUMN,completion=COLUMN]"
        )
    meta = {key: value for key, value in row.items() if key not in columns.values()}
    texts = {what: normalise(row[column]) for what, column in columns.items()}
    if "text" in texts:
        return Document(texts["text"], "", None, meta)
    return Document(texts["prompt"] + texts["completion"], "", len(texts["prompt"]), meta)


def _load(rows: Rows, ask: Callable[..., Any]) -> Part:
    """The rows of a protocol, empty ones included."""
    data = ask(rows.path, rows.configuration, split=rows.split, data_files=rows.file and {rows.split: rows.file})
    column = Column(data if rows.first is None else data.select(range(min(rows.first, len(data)))))
    return Part(column, rows.separator, special=True, apart=rows.apart)


def _join(part: Part) -> Part:
    """The part as one text, in a few pieces, whatever its rows were."""

    def make() -> Iterator[Document]:
        whole = Document(part.separator.join(row.text for row in part.documents))
        return iter(split_text(whole, PIECES))

    return part._replace(documents=Lazy(make))


def _ask_hub(asked: str, path: str, configuration: str | None, **options: Any) -> Any:
    """What the Hub has. Raises `Unavailable`, which says what was `asked` for."""
    import datasets

    try:
        return datasets.load_dataset(path, configuration, **options)
    except (OSError, ValueError) as error:  # no network, no such data set, no such configuration
        raise Unavailable(f"{asked} cannot be had: {first_line(error)}") from error
