"""How well the model completes prompts of the task that it was trained on: loss, and answers that are all right.

Beside that stands what can be had without reading the prompt. A model that is no better has learned what answers look
like, and nothing of the task.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from effbench.core.views import Example
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.infer.memory import Tokens, find_lead, remember
from effbench.probes import Reading
from effbench.probes.inputs import require_effect, require_quality
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

ITEMS = 100  # where the settings do not say
ROWS = 32  # prompts at a time

QUALITY = True
TASK = True
SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`completion_nll`, `completion_exact`, `completion_gain_nats` and `completion_constant_exact` over held-out
    examples with prompts; nothing where the data have none.

    Raises `Refused` for a step that changed nothing of them.
    """
    require_quality(run)
    reading = Reading()
    examples = [example for example in run.data.unseen if example.prompt][: settings.get("limit") or ITEMS]
    if not examples:
        return reading
    engine = open_engine(run)
    pairs = [(_shorten(run, example), list(example.ids[example.prompt :])) for example in examples]
    how = f"{len(examples)} held-out examples of {run.data.name}, prompts and answers tokenised apart"
    losses = [scored.nll for scored in engine.score(pairs)]
    nll = intervals.mean(losses)
    reading.add("completion_nll", nll, f"{how}; mean over examples of nats a token of the answer, its end included")
    right = find_exact(engine, pairs)
    require_effect(run, run.infer.touches)
    exact = intervals.fraction(right)
    reading.add("completion_exact", exact, f"{how}; greedy answers that are the same token for token, up to the end")
    reading.samples |= {"completion_nll": losses, "completion_exact": right}
    _add_constant(reading, run, [answer for _, answer in pairs], losses, how)
    return reading


def _add_constant(
    reading: Reading, run: ModelRun, answers: Sequence[list[int]], losses: Sequence[float], how: str
) -> None:
    """Add what the losses gain over answers that do not look at the prompt, which the training examples have taught."""
    learned = [example.ids[example.prompt :] for example in run.data.pool if example.prompt]
    if not learned:
        return
    known = f"{how}; against what {len(learned)} training examples say without a look at the prompt"
    gains = [constant - loss for constant, loss in zip(score_constant(learned, answers), losses, strict=True)]
    gain = f"{known}: how often a token stood at that place of an answer, one added to all counts"
    reading.add("completion_gain_nats", intervals.mean(gains), gain)
    reading.samples["completion_gain_nats"] = gains
    likeliest = list(Counter(learned).most_common(1)[0][0])
    exact = intervals.fraction([float(answer == likeliest) for answer in answers])
    reading.add("completion_constant_exact", exact, f"{known}: the answer that is most frequent")


def score_constant(learned: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
    """Mean loss of each answer, in nats a token, where every place has the frequencies of what stood there."""
    places = [Counter(token for token in column if token is not None) for column in zip_longest(*learned)]
    words = len({token for answer in (*learned, *answers) for token in answer})
    found = []
    for answer in answers:
        counts = [places[place] if place < len(places) else Counter[int]() for place in range(len(answer))]
        odds = [(seen[token] + 1) / (seen.total() + words) for token, seen in zip(answer, counts, strict=True)]
        found.append(-sum(map(math.log, odds)) / len(odds))
    return found


def _shorten(run: ModelRun, example: Example) -> Tokens:
    """Its prompt as the recipe has it read."""
    if example.segments is None or "prompt" not in run.infer.touches:
        return list(example.ids[: example.prompt])
    short = run.rewrite(example.segments)
    ids = run.data.encode_prompt(short.text())
    return remember(run, ids, find_lead(run.data.encode_prompt, short, ids))


def find_exact(engine: Engine, pairs: Sequence[tuple[Tokens, list[int]]]) -> list[float]:
    """1 for each prompt whose greedy continuation is its answer to the last token, which is where it has to stop."""
    right: list[float] = []
    for start in range(0, len(pairs), ROWS):
        part = pairs[start : start + ROWS]
        longest = max(len(answer) for _, answer in part)
        answers = engine.generate([prompt for prompt, _ in part], longest, set())
        right += [float(made[: len(wanted)] == wanted) for made, (_, wanted) in zip(answers, part, strict=True)]
    return right
