"""Texts that models write behind the prompts of training examples, to be learned in the place of their answers.

A text depends on the model, the prompt, the seed of the run, and what names the example in a step: not on the batch
that it is made in, on padding, on how a step is cut, or on the rank. It is written without gradient, every module in
its mode for evaluation, and drawn from the whole softmax of the logits over a temperature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from effbench.core.views import Example
from effbench.nn.infer.engine import Engine
from effbench.nn.infer.sampling import Sampling
from effbench.nn.train.batches import IGNORED, Batch
from effbench.nn.train.teacher import BOUND, keep_tensors, name_teacher, recall, shrink
from effbench.nn.train.windows import evaluating

if TYPE_CHECKING:
    from effbench.core.run import Run

ROWS = 32  # prompts at a time

Text = tuple[int, ...]


class Asked(NamedTuple):
    """A prompt that a text is written behind, and by which number below 2^32 it is drawn."""

    prompt: list[int]
    name: int


def list_examples(batch: Batch) -> list[Example]:
    """The examples of a batch, padded or packed, by their places in it."""
    examples = []
    for place in range(int(batch["example"].max()) + 1):
        here = batch["example"] == place
        first = int((batch["labels"][here] != IGNORED).int().argmax())
        weight = float(batch["weight"][here][0]) if "weight" in batch else 1.0
        prompt = first if first > 1 else 0  # nothing predicts the first token of a plain text either
        examples.append(Example(str(place), tuple(batch["input_ids"][here].tolist()), prompt, weight=weight))
    return examples


def ask(example: Example, prompt_tokens: int, *where: object) -> Asked:
    """The prompt of an example, of one without its first tokens but for the last, at most `prompt_tokens`; its name
    where it is asked for: the same tokens have the same one there."""
    prompt = list(example.ids[: example.prompt or min(prompt_tokens, len(example.ids) - 1)])
    return Asked(prompt, int.from_bytes(hashlib.sha256(f"{where} {example.ids}".encode()).digest()[:4]))


def answer(example: Example, asked: Asked, text: Text) -> Example:
    """The example with a text behind its prompt, which is all that is learned of it."""
    ids = (*asked.prompt, *text)
    return Example(example.id, ids, len(asked.prompt), meta=example.meta, weight=example.weight)


def sample(run: Run, engine: Engine, asked: Sequence[Asked], new_tokens: int, temperature: float) -> list[Text]:
    """Texts of at most `new_tokens` tokens drawn behind prompts, with the token that ends them where they have ended.

    Raises `Unsupported` where a prompt leaves no position.
    """
    sampling = Sampling(temperature, seed=run.seed)

    def make(part: Sequence[Asked], most: int, stops: set[int]) -> list[list[int]]:
        prompts, names = zip(*part, strict=True)
        return engine.generate(prompts, most, stops, sampling=sampling, numbers=names)

    return _write(run, engine, asked, new_tokens, make)


def search(run: Run, engine: Engine, asked: Sequence[Asked], new_tokens: int, beams: int) -> list[Text]:
    """As `sample`, the likeliest texts that a beam search finds."""

    def make(part: Sequence[Asked], most: int, stops: set[int]) -> list[list[int]]:
        return engine.search([prompt for prompt, _ in part], beams, most, stops)

    return _write(run, engine, asked, new_tokens, make)


def keep_texts(
    run: Run, role: str, how: str, asked: Sequence[Asked], write: Callable[[list[Asked]], list[Text]]
) -> list[Text]:
    """What a role writes, from disk where it is there; `write` makes the rest, and `how` says what else it goes by."""
    if run.cache is None:
        return write(list(asked))
    folder, given = run.cache, f"{name_teacher(run, role)} text {how} {_find_end(run)}"
    keys = [hashlib.sha256(f"{given} {prompt} {name}".encode()).hexdigest() for prompt, name in asked]
    found = [recall(folder, key) for key in keys]
    missing = [place for place, kept in enumerate(found) if kept is None]
    for place, text in zip(missing, write([asked[place] for place in missing]) if missing else (), strict=True):
        found[place] = {"text": torch.tensor(text)}
        keep_tensors(folder, keys[place], {"text": torch.tensor(text)})
    if missing:
        shrink(folder, BOUND)
    return [tuple(kept["text"].tolist()) for kept in found if kept is not None]


def _find_end(run: Run) -> int | None:
    """The token that ends texts, and examples of the data; None where there is none."""
    end = getattr(run.tokenizer, "eos_token_id", None)
    return None if end is None else int(end)


def _write(
    run: Run,
    engine: Engine,
    asked: Sequence[Asked],
    new_tokens: int,
    make: Callable[[Sequence[Asked], int, set[int]], list[list[int]]],
) -> list[Text]:
    """Texts in the order asked for; prompts that leave fewer positions than `new_tokens` are read among their like."""
    by_most: dict[int, list[int]] = {}
    for place in sorted(range(len(asked)), key=lambda place: len(asked[place].prompt)):
        most = max(1, min(new_tokens, engine.max_length - len(asked[place].prompt)))
        by_most.setdefault(most, []).append(place)
    end = _find_end(run)
    texts: dict[int, Text] = {}
    with evaluating(engine.model):
        for most, places in by_most.items():
            for start in range(0, len(places), ROWS):
                part = places[start : start + ROWS]
                made = make([asked[place] for place in part], most, set() if end is None else {end})
                for place, text in zip(part, made, strict=True):
                    texts[place] = (*text, end) if end is not None and len(text) < most else tuple(text)
    return [texts[place] for place in range(len(asked))]
