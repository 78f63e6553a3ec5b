"""What a run trains on, calibrates on and is measured on. The three never share a document."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench import tiny
from effbench.core.errors import Refused, Unsupported
from effbench.core.views import Example

if TYPE_CHECKING:
    from effbench.sources import DataSource

SEQUENCES = 128  # calibration sequences, as in GPTQ, Wanda and AWQ
LONGEST = 2048  # tokens in each, at most
TINY: dict[tiny.Split, int] = {"train": 2000, "calibration": 1000, "heldout": 400}  # documents of each part

Documents = list[str] | Callable[[], list[str]]


class Data:
    """Documents of three disjoint parts, tokenised on demand.

    `pool` is everything that may be trained on, `train` what the next `fit` sees; selections narrow `train`.
    """

    tasks: tuple[str, ...] = ()  # lm-eval tasks that belong to the data
    task_paths: tuple[Path, ...] = ()

    def __init__(self, name: str, parts: Mapping[str, Documents], tokenizer: Any, notes: str = "") -> None:
        self.name = name
        self._parts = dict(parts)
        self._tokenizer = tokenizer
        self._pool: list[Example] | None = None
        self._train: list[Example] | None = None
        self.protocol = f"{name}, documents joined by a blank line, tokenised once, no token added{notes}"

    def documents(self, part: str) -> list[str]:
        """The texts of `train`, `calibration` or `heldout`, made when first asked for."""
        texts = self._parts[part]
        if callable(texts):
            texts = self._parts[part] = texts()
        return texts

    def ids(self, part: str) -> Tensor:
        """[N] all tokens of a part, documents joined."""
        if self._tokenizer is None:
            raise Unsupported("the model's folder has no tokenizer: name one with tokenizer=")
        text = "\n\n".join(self.documents(part))
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise Unsupported(f"{self.name}: the {part} part has no text")
        return torch.tensor(ids)

    def heldout_ids(self, limit: int | None = None) -> Tensor:
        """[N] tokens of the held-out part, at most `limit`."""
        return self.ids("heldout")[:limit]

    def calibration(self, sequences: int, length: int, seed: int) -> Tensor:
        """[sequences, length]: windows of the calibration part, drawn by `seed`."""
        ids = self.ids("calibration")
        if len(ids) < length:
            raise Unsupported(f"{self.name}: the calibration part has {len(ids)} tokens, a window needs {length}")
        rng = random.Random(f"{seed}/calibration")
        starts = [rng.randrange(len(ids) - length + 1) for _ in range(sequences)]
        return torch.stack([ids[start : start + length] for start in starts])

    @property
    def pool(self) -> list[Example]:
        """All training examples."""
        if self._pool is None:
            if self._tokenizer is None:
                raise Unsupported("the model's folder has no tokenizer: name one with tokenizer=")
            encoded = self._tokenizer(self.documents("train"), add_special_tokens=False, verbose=False)["input_ids"]
            self._pool = [Example(str(i), tuple(ids)) for i, ids in enumerate(encoded) if len(ids) > 1]
        return self._pool

    @pool.setter
    def pool(self, examples: list[Example]) -> None:
        self._pool = examples

    @property
    def train(self) -> list[Example]:
        """The examples that the next `fit` sees."""
        return self.pool if self._train is None else self._train

    @train.setter
    def train(self, examples: list[Example]) -> None:
        self._train = examples


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


def open_data(source: DataSource, tokenizer: Any) -> Data:
    """The data of a run. Raises `Unsupported` for text that cannot be used."""
    if source.kind == "tiny":
        data = Data("tiny", {part: partial(tiny.documents, part, n) for part, n in TINY.items()}, tokenizer)
        data.tasks, data.task_paths = ("tiny",), source.task_folders
        return data
    if source.kind == "text":
        assert source.path is not None
        parts, notes = read_folder(source.path)
        return Data(f"text:{source.path.name}", parts, tokenizer, notes)
    return open_hub(source.name, tokenizer)


def open_hub(name: str, tokenizer: Any) -> Data:
    """A hub data set with a text column, by its own splits where it has them."""
    import datasets

    path, _, configuration = name.partition(":")[2].partition("/@")
    splits_by_name = datasets.load_dataset(path, configuration or None)
    column = "text"

    def texts(*splits: str) -> list[str]:
        split = next((s for s in splits if s in splits_by_name), None)
        return [text for text in splits_by_name[split][column] if text.strip()] if split else []

    train = texts("train")
    parts = {"train": train[1::2] or train, "calibration": train[::2], "heldout": texts("test", "validation")}
    if not parts["heldout"]:
        raise Unsupported(f"{name}: no test or validation split")
    return Data(name, parts, tokenizer)


def read_folder(folder: Path) -> tuple[dict[str, list[str]], str]:
    """The text files of a folder in three parts, and notes on how they were read.

    A file's part follows from a hash of its content, so adding files moves no other. Where that leaves a part
    empty, the three files lowest in hash order are spread over the parts; fewer than three files are cut.
    """
    documents: list[tuple[str, str]] = []
    latin = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        raw = path.read_bytes()
        if b"\0" in raw:
            raise Unsupported(f"{path.name} is binary, not text: take it out of {folder.name}")
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
            latin += 1
        if text.strip():
            documents.append((hashlib.sha256(raw).hexdigest(), text))
    if not documents:
        raise Unsupported(f"{folder.name} holds no text")
    documents.sort()
    parts: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    for digest, text in documents:
        place = int(digest[:8], 16) % 10
        parts["heldout" if place == 0 else "calibration" if place == 1 else "train"].append(text)
    notes = f", {latin} files read as Latin-1" if latin else ""
    if not all(parts.values()):
        texts = [text for _, text in documents]
        if len(texts) >= 3:
            parts = {"heldout": texts[:1], "calibration": texts[1:2], "train": texts[2:]}
        else:
            whole = "\n\n".join(texts)
            cuts = len(whole) // 5, 2 * len(whole) // 5
            parts = {
                "heldout": [whole[: cuts[0]]],
                "calibration": [whole[cuts[0] : cuts[1]]],
                "train": [whole[cuts[1] :]],
            }
            notes += ", cut in three for want of files"
    return parts, notes
