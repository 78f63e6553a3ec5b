"""The gap to a teacher without generation: how likely it takes a token that the model drafts.

In speculative decoding a token x of the draft q is taken with probability min(1, p(x) / q(x)) by the verifier p, hence
any token with the sum over x of min(p(x), q(x)), which is 1 less their total variation. Both read the same text here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench.core.errors import Diverged
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.train.teacher import count_shared
from effbench.probes import Reading
from effbench.probes.inputs import predict, predictions, require_effect, require_quality, score_block, windows
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

DRAFTED = 4  # tokens of a block, where the recipe does not say
ITEMS = 100  # held-out answers, where the settings do not say
ROWS = 32  # of them at a time

QUALITY = True
WINDOWED = True
SEES = {"weights", "cache", "attention", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`acceptance`, by the model that taught last or checks the drafts, and what it makes of blocks of drafts; the same
    of answers to held-out prompts where the data have them.

    Raises `Unsupported` for a teacher of another vocabulary.
    """
    require_quality(run)
    decoder = run.infer.slot("decoder")
    role = run.teacher if decoder is None else decoder.role
    k = DRAFTED if decoder is None else decoder.k
    shared = count_shared(run, role)
    reading = Reading()
    text = windows(run, settings)
    block, spelled = score_block(run, settings)
    taken: list[list[float]] = [[] for _ in text.ids]
    with torch.inference_mode():
        theirs = predict(open_engine(run, run.role(role)), text, block)
        for mine, checked in zip(predictions(run, text, block), theirs, strict=True):
            taken[mine.window] += accept(checked.logits[:, :shared], mine.logits[:, :shared]).tolist()
    _add(reading, "", taken, k, text.protocol(f"sum-of-min(p_teacher,p_model).{shared}tokens", spelled))
    examples = [example for example in run.data.unseen if example.prompt][: settings.get("limit") or ITEMS]
    if examples:
        pairs = [(list(example.ids[: example.prompt]), list(example.ids[example.prompt :])) for example in examples]
        ours, teacher = Engine(run.model, run.infer, run.pad), open_engine(run, run.role(role))
        longest = max(len(prompt) + len(words) - 1 for prompt, words in pairs)
        ours.check_room(longest)
        teacher.check_room(longest)
        answers: list[list[float]] = []
        for start in range(0, len(pairs), ROWS):
            part = pairs[start : start + ROWS]
            both = zip(_predict(teacher, part, block), _predict(ours, part, block), strict=True)
            answers += [accept(p[:, :shared], q[:, :shared]).tolist() for p, q in both]
        require_effect(run, frozenset({"cache", "attention"}))
        how = f"{len(examples)} held-out answers of {run.data.name} behind their prompts, {spelled}"
        _add(reading, "answer_", answers, k, f"sum-of-min(p_teacher,p_model) over {shared} tokens, {how}")
    return reading


def accept(teacher: Tensor, model: Tensor) -> Tensor:
    """[N]: the sum over tokens of the smaller probability, of logits [N, V] of teacher and model, in float64."""
    return torch.minimum(teacher.double().softmax(-1), model.double().softmax(-1)).sum(-1).clamp(max=1)


def expect_tokens(k: int, acceptance: float) -> float:
    """Tokens of one pass over k drafted ones, of which each is taken with this chance: 1 + a + ... + a^k."""
    return sum(acceptance**place for place in range(k + 1))


def _predict(engine: Engine, pairs: Sequence[tuple[list[int], list[int]]], block: int | None) -> list[Tensor]:
    """Logits [n, V] at the tokens of answers, of the engine's own model whatever decodes its texts."""
    whole = max(len(words) for _, words in pairs)
    found = {i: torch.cat([*engine.slice_logits(states)]) for i, states in engine.stream(pairs, block or whole)}
    return [found[i] for i in range(len(pairs))]


def _add(reading: Reading, prefix: str, taken: Sequence[Sequence[float]], k: int, how: str) -> None:
    """Means over tokens, with intervals over the texts that they are of."""
    sums, sizes = [sum(values) for values in taken], [float(len(values)) for values in taken]
    lost = sum(not math.isfinite(value) for value in sums)
    if lost:
        raise Diverged(f"the probabilities are not finite in {lost} of {len(sums)} texts")
    reading.add(f"{prefix}acceptance", intervals.quotient(sums, sizes), f"{how}; mean over tokens")
    expected = intervals.quotient(sums, sizes, functools.partial(expect_tokens, k))
    reading.add(f"{prefix}block_tokens_k{k}", expected, f"{how}; 1 + a + ... + a^{k} of the mean")
    reading.samples[f"{prefix}acceptance"] = [total / size for total, size in zip(sums, sizes, strict=True)]
