"""Embeddings of training examples, for methods that choose different ones; kept on disk by what is embedded.

`by` is what embeds, as `effbench.nn.embedders` has it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from effbench.core.errors import Unsupported
from effbench.core.files import file_digest
from effbench.core.views import Example
from effbench.nn.embedders import MODEL, TEXTS, encode, list_files, mean_states, open_encoder
from effbench.nn.train.examples import batches, looking, spell
from effbench.nn.train.teacher import BOUND, digest_model, keep_tensors, recall, shrink

if TYPE_CHECKING:
    from effbench.core.run import Run

Batches = Iterator[tuple[list[int], Tensor]]  # places, and their vectors [B, d]


def embed(run: Run, examples: Sequence[Example], by: str) -> Tensor:
    """[N, d] float32 on the processor, rows of length 1; a row without any direction stays zero.

    Each batch is kept on disk before the next is made, and what is kept is not made again. Raises `Unavailable` for a
    model of sentence-transformers that is not there, `Unsupported` for examples without text, which it reads.
    """
    folder, rows, keys = run.cache, {}, {}
    if folder is not None:
        keys = _name(run, examples, by)
        kept = {place: recall(folder, key) for place, key in keys.items()}
        rows = {place: tensors["embedding"] for place, tensors in kept.items() if tensors is not None}
    missing = [place for place in range(len(examples)) if place not in rows]
    embedder = _embed_states if by == MODEL else _embed_texts
    for places, vectors in embedder(run, [examples[place] for place in missing], by) if missing else ():
        for place, vector in zip(places, normalize(vectors.float(), dim=1).cpu(), strict=True):
            rows[missing[place]] = vector
            if folder is not None:
                keep_tensors(folder, keys[missing[place]], {"embedding": vector})
        run.progress("examples embedded", len(rows), len(examples))
    if missing and folder is not None:
        shrink(folder, BOUND)
    return torch.stack([rows[place] for place in range(len(examples))])


def cluster(embeddings: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cluster [N] of each row, and the centres [clusters, d] float64, of scikit-learn's k-means (k-means++, Lloyd).

    Raises `Unsupported` where there are fewer rows than clusters, or fewer different ones, which leaves clusters empty.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(embeddings) < clusters:
        raise Unsupported(f"{len(embeddings)} examples for {clusters} clusters: give fewer clusters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said below
        found = KMeans(clusters, n_init=1, random_state=seed).fit(embeddings.double().numpy())
    labels = torch.from_numpy(found.labels_).long()
    filled = len(labels.unique())
    if filled < clusters:
        raise Unsupported(
            f"{clusters - filled} of {clusters} clusters are empty, as there are only {filled} different examples: "
            "give fewer clusters"
        )
    return labels, torch.from_numpy(found.cluster_centers_)


def _name(run: Run, examples: Sequence[Example], by: str) -> dict[int, str]:
    """What the embedding of each example is kept under: what embeds, and what it reads."""
    if by == MODEL:
        embedder = run.share(("embedder", by), lambda: f"states {digest_model(run.reference)}")
        read: list[Any] = [list(example.ids) for example in examples]
    else:
        files = [(str(path.relative_to(by)), file_digest(path)) for path in list_files(by)]
        embedder, read = f"texts {files or by}", _read_texts(run, examples, by)
    return {place: hashlib.sha256(f"{embedder} {one}".encode()).hexdigest() for place, one in enumerate(read)}


def _read_texts(run: Run, examples: Sequence[Example], by: str) -> list[str]:
    """The texts of examples, with one space for each white space. Raises `Unsupported`."""
    if run.tokenizer is None:
        raise Unsupported(f"by={by!r} reads text, and the model comes without a tokenizer: give by='model'")
    return [" ".join(spell(run, example).split()) for example in examples]


def _embed_states(run: Run, examples: Sequence[Example], by: str) -> Batches:
    """Means of the last states over real tokens."""
    with looking(run.reference):
        for places, batch in batches(run, examples):
            yield places, mean_states(run.reference, batch)


def _embed_texts(run: Run, examples: Sequence[Example], by: str) -> Batches:
    """What a model of sentence-transformers makes of the texts of examples."""
    texts, encoder = _read_texts(run, examples, by), open_encoder(by, run.device)
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))  # of similar length together
    for start in range(0, len(order), TEXTS):
        places = order[start : start + TEXTS]
        yield places, encode(encoder, [texts[place] for place in places])
