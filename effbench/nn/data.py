"""What a run trains on, calibrates on and is measured on. The three never share a document."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from effbench import tiny
from effbench.core.errors import Refused, Unavailable, Unsupported, first_line
from effbench.core.views import Example
from effbench.sources.protocols import Rows
from effbench.sources.text import PARTS, READERS, Document, read_speeches

if TYPE_CHECKING:
    from effbench.sources import DataSource

SEQUENCES = 128  # calibration sequences, as in GPTQ, Wanda and AWQ
LONGEST = 2048  # tokens in each, at most
SPREAD = 16  # calibration windows are drawn from the first so many times as many tokens as they take
POOL = 2**23  # tokens that the pool holds, if there are so many; more where a fit takes more
CHARACTERS = 8  # that are tokenised for each token wanted, at first
MARGIN = 64  # tokens before a cut through a text that the cut may have changed
TINY: dict[tiny.Split, int] = {"train": 2000, "calibration": 1000, "heldout": 400}  # documents of each part


class Part(NamedTuple):
    """Documents, and how they become one stream of tokens."""

    documents: Sequence[Document]
    separator: str = "\n\n"
    special: bool = False  # whether the tokenizer adds its special tokens, to the whole
    apart: bool = False  # whether a calibration window lies in one document


class Data:
    """Documents of three disjoint parts, tokenised on demand and no further than is asked for.

    `pool` is everything that may be trained on, `train` what the next `fit` sees; selections narrow `train`. Plain text
    lies in the pool in windows of at most `width` tokens; an example with a prompt is one, whatever its length.
    """

    tasks: tuple[str, ...] = ()  # lm-eval tasks that belong to the data
    task_paths: tuple[Path, ...] = ()
    window: int | None = None  # tokens per window of perplexity that belong to the data, all of which is then measured
    most: int | None = None  # tokens that are measured

    def __init__(
        self, name: str, parts: dict[str, Part], tokenizer: Any, notes: str = "", width: int = LONGEST
    ) -> None:
        self.name = name
        self.width = width
        self._learned = name  # whose text it calibrates and trains on
        self._parts = {part: Part(()) for part in PARTS} | parts
        self._tokenizer = tokenizer
        self._pool: list[Example] = []
        self._pooled = self._tokens = 0  # documents and tokens in the pool
        self._train: list[Example] | None = None
        heldout = self._parts["heldout"]
        joint = "a blank line" if heldout.separator == "\n\n" else repr(heldout.separator)
        added = "special tokens added as the tokenizer does" if heldout.special else "no token added"
        self.protocol = f"{name}, documents joined by {joint}, tokenised once, {added}{notes}"

    def documents(self, part: str) -> list[str]:
        """The texts of `train`, `calibration` or `heldout`, made when first asked for."""
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
        self.extend(POOL)
        return self._pool

    @pool.setter
    def pool(self, examples: list[Example]) -> None:
        self._pool = examples
        self._parts["train"] = Part(())

    def extend(self, tokens: int) -> int:
        """Have the pool hold so many tokens, if there is so much text, and say how many documents are left over."""
        documents = self._parts["train"].documents
        while self._tokens < tokens and self._pooled < len(documents):
            example = self._example(documents[self._pooled])
            examples = [example] if example.prompt else cut(example, self.width)
            self._pool += examples
            self._pooled += 1
            self._tokens += sum(len(example.ids) for example in examples)
        return len(documents) - self._pooled

    @property
    def train(self) -> list[Example]:
        """The examples that the next `fit` sees."""
        return self.pool if self._train is None else self._train

    @train.setter
    def train(self, examples: list[Example] | None) -> None:
        self._train = examples

    def learn_from(self, other: Data) -> None:
        """Calibrate and train on another's text; what is measured stays."""
        self._parts |= {part: other._parts[part] for part in ("train", "calibration")}
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

    def _example(self, document: Document) -> Example:
        """A document as one example.

        A completion ends with the tokenizer's end of text, which is learned too, and so is a token that lies across the
        end of the prompt.
        """
        name, ids = document.name or str(self._pooled), self._encode(document.text)
        if document.prompt is None:
            return Example(name, tuple(ids))
        alone = self._encode(document.text[: document.prompt])
        shared = next(
            (i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids))
        )
        end = self._tokenizer.eos_token_id
        return Example(name, (*ids, *([] if end is None else [end])), shared)

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
        super().__init__("random tokens", {}, None)
        self._vocabulary = vocabulary
        rows = self.calibration(2, 128, 0).tolist()
        self.pool = [Example(str(i), tuple(row)) for i, row in enumerate(rows)]

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
    starts = range(0, len(ids) - 1, width - 1)
    return [Example(f"{example.id}/{number}", ids[i : i + width]) for number, i in enumerate(starts)]


def count_learned(example: Example) -> int:
    """Tokens of an example that are predicted and learned: neither the first one nor the prompt."""
    return len(example.ids) - max(1, example.prompt)


class Lazy(Sequence[Document]):
    """Documents that are made when one is first asked for."""

    def __init__(self, make: Callable[[], Iterable[str]]) -> None:
        self._make = make

    @functools.cached_property
    def _made(self) -> list[Document]:
        return [Document(text) for text in self._make()]

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]


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
        made: dict[str, Part] = {
            part: Part(Lazy(functools.partial(tiny.documents, part, n))) for part, n in TINY.items()
        }
        data = Data("tiny", made, tokenizer, width=width)
        data.tasks, data.task_paths = ("tiny",), source.task_folders
        return data
    if source.kind == "hub":
        return _open_hub(source, option, tokenizer, width)
    if source.kind == "speeches":
        corpus = read_speeches()
    else:
        assert source.path is not None
        corpus = READERS[source.kind](source.path)
    parts = {name: Part(documents) for name, documents in corpus.parts.items()}
    return Data(source.name, parts, tokenizer, corpus.notes, width)


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
    path, _, configuration = name.removeprefix("hub:").partition("/@")
    splits = ask(path, configuration or None)

    def read(*names: str) -> list[Document]:
        found = next((name for name in names if name in splits), None)
        return [Document(text) for text in splits[found]["text"] if text.strip()] if found else []

    rows = read("train")
    few = -(-len(rows) // 10)  # rows may be pieces of documents, so those of a part lie side by side
    documents = {"calibration": rows[:few], "train": rows[few:], "heldout": read("test", "validation")}
    if not documents["heldout"]:
        raise Unsupported(f"{name}: no test or validation split")
    return Data(name, {part: Part(texts) for part, texts in documents.items()}, tokenizer, width=width)


def _load(rows: Rows, ask: Callable[..., Any]) -> Part:
    """The rows of a protocol, empty ones included."""
    data = ask(rows.path, rows.configuration, split=rows.split, data_files=rows.file and {rows.split: rows.file})
    column = Column(data if rows.first is None else data.select(range(min(rows.first, len(data)))))
    return Part(column, rows.separator, special=True, apart=rows.apart)


def _join(part: Part) -> Part:
    """The part as one document, of which its rows are pieces."""
    return part._replace(documents=Lazy(lambda: [part.separator.join(row.text for row in part.documents)]))


def _ask_hub(asked: str, path: str, configuration: str | None, **options: Any) -> Any:
    """What the Hub has. Raises `Unavailable`, which says what was `asked` for."""
    import datasets

    try:
        return datasets.load_dataset(path, configuration, **options)
    except (OSError, ValueError) as error:  # no network, no such data set, no such configuration
        raise Unavailable(f"{asked} cannot be had: {first_line(error)}") from error
