"""What a model makes of training examples, for methods that choose among them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench.core.views import Example
from effbench.nn.model.feed import feed
from effbench.nn.train.batches import Batch, collate
from effbench.nn.train.loss import sum_by_example
from effbench.nn.train.windows import evaluating
from effbench.sources import words

if TYPE_CHECKING:
    from effbench.core.run import Run

TOKENS = 4096  # in one forward pass, padding included


def batches(run: Run, examples: Sequence[Example]) -> Iterator[tuple[list[int], Batch]]:
    """Examples of similar length together, with their places."""
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].ids))
    while order:
        size = max(1, TOKENS // len(examples[order[0]].ids))
        places, order = order[:size], order[size:]
        yield places, collate([examples[place] for place in places], run.pad, run.device)


@contextlib.contextmanager
def looking(model: Any) -> Iterator[None]:
    """No gradients, and every module in its mode for evaluation."""
    with torch.no_grad(), evaluating(model):
        yield


def measure_losses(run: Run, model: Any, examples: Sequence[Example]) -> Tensor:
    """[N] mean cross-entropy of the learned tokens of each example under a model, in nats; 0 where there are none."""
    losses = torch.zeros(len(examples))
    with looking(model):
        for places, batch in batches(run, examples):
            losses[places] = find_losses(model, batch, len(places))
    return losses


def find_losses(model: Any, batch: Batch, rows: int) -> Tensor:
    """[rows] the same of the examples of one batch."""
    sums, numbers = sum_by_example(feed(model, batch).logits, batch, rows)
    return (sums / numbers.clamp(min=1)).float().cpu()


def spell(run: Run, example: Example) -> str:
    """The text of an example, as its tokens spell it; their numbers where there is no tokenizer."""
    if run.tokenizer is None:
        return " ".join(map(str, example.ids))
    text: str = run.tokenizer.decode(list(example.ids), skip_special_tokens=True)
    return text


def list_words(run: Run, example: Example) -> list[str]:
    """The words of an example, as `effbench.sources.words` has them."""
    return words.list_words(spell(run, example))
