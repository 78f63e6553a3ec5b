"""What a fit reads of the train set: windows of at most so many tokens, and those that a choice is made by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from effbench.core.errors import Diverged, Unsupported
from effbench.core.usage import list_some
from effbench.core.views import Example
from effbench.nn.data import count_learned, cut
from effbench.nn.model.blocks import count_positions
from effbench.nn.model.feed import count_front, feed
from effbench.nn.train.batches import collate
from effbench.nn.train.loss import cross_entropy
from effbench.nn.train.unlabelled import require_told

if TYPE_CHECKING:
    from effbench.core.run import Run
    from effbench.nn.train.settings import FitSettings

VALIDATION = 2**14  # tokens by which something is chosen, at most
LEAST = 2**7  # and at least
WIDTH = 512  # of their windows, where no fit says


def find_width(run: Run, settings: FitSettings) -> int:
    """Tokens in a window of this fit, at most: soft prompts take positions, too. Raises `Unsupported` where these leave
    room for less than a prediction."""
    positions, front = count_positions(run.model), count_front(run.model)
    if positions - front < 2:
        raise Unsupported(f"{front} of the model's {positions} positions are taken by a soft prompt: make it shorter")
    return min(settings.max_length, positions - front)


def cut_all(examples: Sequence[Example], width: int, unread: int) -> tuple[list[Example], str]:
    """The windows of all examples, and what could not be learned of them or lies in `unread` documents.

    Raises `Unsupported` where nothing is left.
    """
    windows: list[Example] = []
    lost: list[str] = []
    shortened = 0
    for example in examples:
        parts = cut(example, width)
        windows += parts
        lost += [] if parts else [example.id]
        shortened += bool(parts and example.prompt and len(example.ids) > width)
    shown = list_some(lost)
    if not windows:
        hint = f": {shown} leave nothing to learn in {width} tokens, give a larger max_length" if lost else " is empty"
        raise Unsupported(f"fit has nothing to train on: the train set{hint}")
    notes = {
        f"nothing to learn in {width} tokens of {shown}": lost,
        f"{shortened} answers cut at {width} tokens": shortened,
        f"{unread} documents more than needed": unread,
    }
    return windows, "; ".join(note for note, holds in notes.items() if holds)


@contextlib.contextmanager
def training_on(run: Run, examples: list[Example]) -> Iterator[None]:
    """Have `run.data.train` hold these examples inside. Raises `Refused` for unlabelled ones."""
    require_told(examples)
    with run.data.teaching(examples):
        yield


def validation_windows(run: Run, width: int) -> list[Example]:
    """Windows of the validation part, of `VALIDATION` learned tokens at most but never none that there is."""
    windows: list[Example] = []
    tokens = 0
    for example in run.data.validation:
        parts = cut(example, width)
        learned = sum(map(count_learned, parts))
        if windows and tokens + learned > VALIDATION:
            break
        windows += parts
        tokens += learned
    return windows


def windows_to_choose_by(run: Run, width: int, what: str, mend: str) -> tuple[list[Example], int]:
    """Windows of the validation part, and their learned tokens. Raises `Unsupported` where these are too few to choose
    `what`, with the mend."""
    windows = validation_windows(run, width)
    number = sum(map(count_learned, windows))
    if number < LEAST:
        raise Unsupported(
            f"the validation part is too small to choose {what} by: it has {number} tokens to predict, {LEAST} are "
            f"needed; {mend}"
        )
    return windows, number


@torch.no_grad()
def measure_loss(run: Run, windows: Sequence[Example], batch_size: int) -> float:
    """Mean cross-entropy of the learned tokens, in nats, with every module in its mode for evaluation.

    Raises `Diverged` where it is not finite.
    """
    total = torch.zeros((), dtype=torch.float64)
    with evaluating(run.model):
        for start in range(0, len(windows), batch_size):
            batch = collate(windows[start : start + batch_size], run.pad, run.device)
            total += cross_entropy(feed(run.model, batch).logits, batch["labels"], "sum").double().cpu()
    loss = float(total) / sum(map(count_learned, windows))
    if not loss < float("inf"):
        raise Diverged("the validation loss is not finite")
    return loss


def find_loss(run: Run) -> float:
    """The loss of the validation part under the model as it is. Raises `Unsupported` where that part is too small."""
    width = min(WIDTH, count_positions(run.model) - count_front(run.model))
    return measure_loss(run, windows_to_choose_by(run, width, "a setting", "give more text")[0], 8)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in its mode for evaluation inside, and in its own again after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
