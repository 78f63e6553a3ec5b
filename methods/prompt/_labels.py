"""Words with labels that say whether they stay, and a classifier of tokens that learns them (Pan et al., 2024)."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from effbench.core.errors import Unsupported
from effbench.core.method import Method
from effbench.core.run import FitReport, InferPlan, Run
from effbench.core.views import Example, Segments
from effbench.methods.prompt._common import Judge, Piece, chunk, count_tokens, cut
from effbench.nn.model import attention
from effbench.nn.model.feed import feed
from effbench.nn.train.batches import IGNORED
from effbench.nn.train.fit import fit
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.windows import training_on

Words = list[list[Piece]]
WRITTEN = 0.5  # share of the tokens of a text that its compression has
SEARCHED = 150  # words that an alignment looks through for the next one
WORST = 0.1  # share of the texts that are left out, of those whose alignment leaves most open
ANSWER = 4  # tokens of an output that removing a word may change
LEAST = 8  # words of a text that is learned


def cut_words(pieces: Sequence[Piece]) -> Words:
    """Pieces in words: one begins with white space, and with a mark of punctuation."""
    words: Words = []
    for piece in pieces:
        if not words or piece.text[:1].isspace() or not any(map(str.isalnum, piece.text)):
            words.append([])
        words[-1].append(piece)
    return words


def list_texts(run: Run, judge: Judge, number: int, length: int) -> Iterator[Words]:
    """Words of texts of the pool, drawn by the seed of the run and cut to `length` tokens of the judge at sentences."""
    pool = [*run.data.pool]
    random.Random(f"{run.seed}:texts").shuffle(pool)
    for example in pool:
        text = example.text or str(run.tokenizer.decode(example.ids, skip_special_tokens=True))
        pieces = cut(Segments(contexts=(text,), whole=True), judge.tokenizer)
        for part in chunk(pieces, length):
            words = cut_words(part)
            if len(words) >= LEAST and count_tokens(part) <= length:
                yield words
                number -= 1
            if not number:
                return


def align_compressions(judge: Judge, texts: Sequence[Words]) -> list[list[bool]]:
    """Labels of words by the paper's annotation: whether a word is found again in a compression of its text.

    That is made of the text's own words: those that the model expects least. Of texts with the widest gap between
    words that occur in the compression and words that were found again, none has labels.
    """
    labels, gaps = [], []
    for words in texts:
        compression = write_compression(judge, words)
        written = {word.strip().lower() for word in compression}
        names = ["".join(piece.text for piece in word) for word in words]
        labels.append(align(names, compression))
        hit = sum(name.strip().lower() in written for name in names)
        gaps.append((hit - sum(labels[-1])) / len(names))
    worst = sorted(range(len(gaps)), key=lambda i: -gaps[i])[: int(WORST * len(gaps))]
    return [[] if i in worst else row for i, row in enumerate(labels)]


def write_compression(judge: Judge, words: Words) -> list[str]:
    """An extractive compression: the words with the largest mean loss, in their order."""
    (losses,) = judge.losses([([judge.first], [], [token for word in words for piece in word for token in piece.ids])])
    left = iter(losses)
    sizes = [count_tokens(word) for word in words]
    means = [sum(next(left) for _ in range(size)) / size for size in sizes]
    room, kept = WRITTEN * sum(sizes), set()
    for i in sorted(range(len(words)), key=lambda i: -means[i]):
        room -= sizes[i]
        if room < 0:
            break
        kept.add(i)
    return ["".join(piece.text for piece in word) for i, word in enumerate(words) if i in kept]


def align(original: Sequence[str], compressed: Sequence[str], searched: int = SEARCHED) -> list[bool]:
    """Algorithm 1: each word of the compression is looked for around the place of the one before, ahead and behind."""
    names = [word.strip().lower() for word in original]
    labels = [False] * len(names)
    place = 0
    for word in compressed:
        wanted = word.strip().lower()
        around = (side for i in range(searched) for side in (place + i, place - i))
        found = next((i for i in around if 0 <= i < len(names) and names[i] == wanted and not labels[i]), None)
        if found is not None:
            labels[found] = True
            place = min(found, place + searched // 2)
    return labels


def try_removals(judge: Judge, texts: Sequence[Words]) -> list[list[bool]]:
    """The other labels: whether the most likely continuation of a text is another one without the word."""
    labels = []
    for words in texts:
        ids = [[token for piece in word for token in piece.ids] for word in words]
        whole = [judge.first, *(token for word in ids for token in word)]
        (said,) = judge.engine.generate([whole], ANSWER, set())
        without = [[judge.first, *(t for j, word in enumerate(ids) if j != i for t in word)] for i in range(len(ids))]
        labels.append([not entry.greedy for entry in judge.engine.score([(rest, said) for rest in without])])
    return labels


@dataclasses.dataclass(frozen=True)
class TokenLabels(Method):
    """Has a fit learn two classes of tokens that see the whole row, in the place of the next token."""

    claims = ("train.loss",)

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        table: dict[tuple[int, ...], list[int]] = run.state(self)["labels"]
        real = batch["attention_mask"].bool()
        kept = torch.full_like(batch["input_ids"], IGNORED)
        for row, ids, there in zip(kept, batch["input_ids"], real, strict=True):
            row[there] = torch.tensor(table[tuple(ids[there].tolist())], device=row.device)
        return batch | see_all(real) | {"kept": kept}

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        return {
            "classes": cross_entropy(out.logits.float().flatten(0, 1), batch["kept"].flatten(), ignore_index=IGNORED)
        }


def see_all(real: Tensor) -> dict[str, Tensor]:
    """Mask and positions of rows in which all tokens see all that are real [B, T]."""
    alone = torch.eye(real.shape[1], dtype=torch.bool, device=real.device)  # padding looks at itself
    both = real[:, None, :] & real[:, :, None]
    places = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    return {"attention_mask": (both | alone)[:, None], "position_ids": places}


def train_classifier(
    run: Run, judge: Judge, labelled: Sequence[tuple[Words, list[bool]]], settings: FitSettings
) -> tuple[nn.Module, FitReport]:
    """A copy of the judge's model with two logits a token, and what happened in its fit."""
    table: dict[tuple[int, ...], list[int]] = {}
    for words, row in labelled:
        pairs = [(token, int(label)) for word, label in zip(words, row, strict=True) for p in word for token in p.ids]
        table[tuple(token for token, _ in pairs)] = [label for _, label in pairs]
    examples = [Example(f"labels-{i}", ids) for i, ids in enumerate(table)]
    if not examples:
        raise Unsupported(f"a classifier of tokens learns from texts of at least {LEAST} words, and there is none")
    method = TokenLabels()
    with run.aside("classifier"), training_on(run, examples):
        run.model = make_classifier(judge.engine.model, run.seed)
        run.attach(method)
        run.state(method)["labels"] = table
        report = fit(run, settings)
        model: nn.Module = run.model
    return model.eval().requires_grad_(False), report


def make_classifier(model: Any, seed: int) -> Any:
    """A copy of a model whose head has two rows, all of which is trainable."""
    own = copy.deepcopy(model).requires_grad_(True)
    head = own.get_output_embeddings()
    width = own.get_input_embeddings().weight.shape[1] if not hasattr(head, "in_features") else head.in_features
    new = nn.Linear(width, 2)
    chance = torch.Generator().manual_seed(seed)
    nn.init.zeros_(new.bias)
    nn.init.normal_(new.weight, std=0.02, generator=chance)
    own.set_output_embeddings(new.to(head.weight.device))
    return own


def classify(model: Any, ids: Sequence[int]) -> list[float]:
    """The probability that each token stays."""
    row = torch.tensor([[*ids]], device=next(model.parameters()).device)
    batch = {"input_ids": row} | see_all(torch.ones_like(row, dtype=torch.bool))
    with torch.no_grad():
        logits = feed(model, batch, plan=attention.adopt(InferPlan(), model)).logits
    found: list[float] = logits[0].double().softmax(-1)[:, 1].tolist()
    return found
