"""What probes feed to a model: windows of the held-out text or random tokens; what may be scored at all."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from effbench.core.errors import Refused, Unsupported
from effbench.nn.infer.engine import Engine, open_engine, score_targets
from effbench.sources.protocols import TEXT_TOKENS, WINDOW

if TYPE_CHECKING:
    from effbench.core.method import Part
    from effbench.nn.run import ModelRun

BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}  # in one forward pass


class Windows(NamedTuple):
    """Windows of one stream of tokens, none of which is scored twice; what stands before `first` is context only."""

    ids: Tensor  # [windows, width]
    first: int  # place in every window of the first token that is scored
    cut: str
    text: str  # how documents became one stream

    def protocol(self, metric: str, *more: str) -> str:
        """The full name of a number taken on these windows."""
        return f"{'.'.join((metric, self.cut, *more))} of {self.text}"


def require_quality(run: ModelRun) -> None:
    """Raise where a number about the model's predictions would mean nothing or cannot be had."""
    if run.source.kind == "shape":
        raise Refused("quality of random weights means nothing")
    if run.tokenizer is None:
        raise Unsupported("the model comes without a tokenizer: give tokenizer=")


def require_effect(run: ModelRun, parts: frozenset[Part]) -> None:
    """Raise `Refused` for a step of the recipe that has changed nothing, of those that change these parts of inference.

    The plan's notes are emptied before a probe begins.
    """
    idle = [method.label for method in run.infer.idle if method.touches & parts]
    if idle:
        raise Refused(
            f"{', '.join(idle)} changed nothing of what was measured: prompts are shorter than what it keeps, "
            "or nothing was generated"
        )


def slow(run: ModelRun) -> bool:
    """A real shape on a processor: billions of weights, seconds per call."""
    return run.source.kind == "shape" and run.device.type == "cpu"


def windows(run: ModelRun, settings: Mapping[str, Any]) -> Windows:
    """Cut the held-out text: settings `window`, `stride`, `text_tokens` and `limit` (windows).

    Windows that overlap score their last `stride` tokens each, so that every token has at least the rest of the window
    for context; disjoint ones score all but the first, or where scoring goes by blocks the second half, so that caches
    have settled when it is scored. Data that follow a paper bring their own window and
    are measured whole, where the settings do not say.
    """
    require_quality(run)
    engine = open_engine(run)
    width = settings.get("window") or min(run.data.window or WINDOW, engine.max_length)
    if width < 2 or (engine.room is not None and width > engine.room):
        raise Unsupported(f"the window is {width} tokens, the model takes 2 to {engine.room or 'any number'}")
    stride = settings.get("stride") or width
    if stride > width:
        raise Unsupported(
            f"the stride is {stride} tokens, the window {width}: tokens between windows would be left out"
        )
    most = settings.get("text_tokens") or (TEXT_TOKENS if run.data.window is None else None)
    if most is not None and most < width:
        raise Unsupported(f"text_tokens is {most}, the window {width} tokens: more text_tokens, or a smaller window")
    ids = run.data.heldout_ids(most)
    if len(ids) < width:
        raise Unsupported(
            f"the held-out text has {len(ids)} tokens, the window {width}: more text, or a smaller window"
        )
    cut = ids.unfold(0, width, stride)[: settings.get("limit")]
    first = 1 if stride == width else width - stride
    if stride == width and score_block(run, settings)[0] is not None:
        first = width // 2
    whole = stride == width and first == 1
    scored = "first-of-window-unscored" if whole else f"last{width - first}-of-window-scored"
    name = f"token.window{width}.stride{stride}.windows{len(cut)}.{scored}"
    return Windows(cut, first, name, run.data.protocol)


class Slice(NamedTuple):
    """What a model predicts for some tokens of one window."""

    window: int
    targets: Tensor  # [n] the tokens
    logits: Tensor  # float32 [n, V]

    def logprobs(self) -> list[float]:
        """Of the targets. Plain numbers: small tensors kept between large ones would keep the memory of these."""
        rows = torch.arange(len(self.targets), device=self.targets.device)
        return score_targets(self.logits, self.targets, rows)[0].tolist()


def predict(engine: Engine, text: Windows, block: int | None = None) -> Iterator[Slice]:
    """Predictions of all that is scored, window by window in one block each, a slice at a time.

    With a `block` of so many tokens, what stands before the first that is scored is a prompt, and the rest follows it.
    """
    if block is not None:
        pairs = [(ids[: text.first], ids[text.first :]) for ids in text.ids.tolist()]
        for window, states in engine.stream(pairs, block, BATCH_TOKENS[engine.device.type]):
            targets = torch.tensor(pairs[window][1], device=engine.device)
            for logits in engine.slice_logits(states):
                yield Slice(window, targets[: len(logits)], logits)
                targets = targets[len(logits) :]
        return
    size = max(1, BATCH_TOKENS[engine.device.type] // text.ids.shape[1])
    hidden = itertools.chain.from_iterable(map(engine.hidden, text.ids.split(size)))
    for window, (ids, states) in enumerate(zip(text.ids.to(engine.device), hidden, strict=True)):
        targets = ids[text.first :]
        for logits in engine.slice_logits(states[text.first - 1 : -1]):
            yield Slice(window, targets[: len(logits)], logits)
            targets = targets[len(logits) :]


def predictions(run: ModelRun, text: Windows, block: int | None) -> Iterator[Slice]:
    """What the model of the run predicts; when all was taken, its likelihoods are shared with `nll`."""
    scored: list[tuple[int, list[float]]] = []
    for part in predict(open_engine(run), text, block):
        scored.append((part.window, part.logprobs()))
        yield part
    require_effect(run, frozenset({"cache", "attention"}))
    run.share(("nll", text.cut, text.text, block), lambda: _average(scored))


def nll(run: ModelRun, text: Windows, block: int | None) -> list[float]:
    """Mean negative log-likelihood of every window, in nats per token."""

    def compute() -> list[float]:
        values = _average((part.window, part.logprobs()) for part in predict(open_engine(run), text, block))
        require_effect(run, frozenset({"cache", "attention"}))
        return values

    return run.share(("nll", text.cut, text.text, block), compute)


def _average(scored: Iterable[tuple[int, list[float]]]) -> list[float]:
    """Mean negative log-likelihood by window, from log-probabilities with their windows in order."""
    by_window = itertools.groupby(scored, itemgetter(0))
    return [-statistics.fmean(value for _, logprobs in part for value in logprobs) for _, part in by_window]


def score_block(run: ModelRun, settings: Mapping[str, Any]) -> tuple[int | None, str]:
    """Tokens per forward pass after the context, and how protocols spell it; None is all at once.

    In one block a cache that evicts or encodes is never read, so under such a plan the default is one token.
    """
    block: int | None = settings.get("score_block") or (1 if run.infer.streams else None)
    return block, "oneblock" if block is None else f"block{block}"


def random_ids(run: ModelRun, batch: int, length: int) -> Tensor:
    """[batch, length] tokens drawn by the run's seed: zeros would be faster than life."""
    generator = torch.Generator().manual_seed(run.seed)
    return torch.randint(vocabulary(run.model), (batch, length), generator=generator).to(run.device)


def vocabulary(model: Any) -> int:
    """Rows of the embedding table."""
    return int(model.config.vocab_size)
