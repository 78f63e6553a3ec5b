"""How far answers are from the unchanged model's, where prompts are shortened or caches hold less."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from effbench.core.errors import Unsupported
from effbench.nn.files.checkpoint import stop_ids
from effbench.nn.infer.answers import ANSWER, answer_kl
from effbench.nn.infer.engine import open_engine
from effbench.probes import Reading
from effbench.probes.inputs import require_effect, require_quality
from effbench.probes.prompts import Ask, ask_tasks
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

ITEMS = 16  # of a task, at most
ROWS = 16  # prompts at a time

QUALITY = True
SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`answer_kl_nats_per_token` over prompts of the setting `tasks`; nothing for a recipe that changes neither prompts
    nor caches. Raises `Refused` where no prompt met what the recipe changes."""
    require_quality(run)
    reading = Reading()
    if not run.infer.touches & {"cache", "prompt"}:
        return reading
    plain, changed = open_engine(run, run.reference), open_engine(run)
    fewer = {**settings, "limit": min(settings.get("limit") or ITEMS, ITEMS)}
    asks = list(itertools.chain.from_iterable(ask_tasks(run, fewer, ITEMS)))
    every = len(asks)
    asks = [ask for ask in asks if len(ask.given) + ANSWER <= plain.max_length]  # the plain model has to answer, too
    end = run.tokenizer.eos_token_id
    stops = stop_ids(run.reference) | (set() if end is None else {int(end)})
    values: list[float] = []
    for part in _batches(asks):
        hold = [ask.hold for ask in part]
        values += answer_kl(plain, changed, [ask.given for ask in part], [ask.ids for ask in part], stops, hold)
    if not values:
        raise Unsupported("no prompt of the tasks leaves the unchanged model room for an answer")
    require_effect(run, frozenset({"cache", "attention", "prompt"}))
    reading.samples["answer_kl_nats_per_token"] = values
    what = (
        f"KL(reference || model) at up to {ANSWER} tokens of the reference's greedy answer to the unchanged prompt, "
        f"{len(values)} of {every} prompts, float32"
    )
    if settings.get("evict_at") == "context":
        what += ", caches settle before the question (evict_at=context)"
    reading.add("answer_kl_nats_per_token", intervals.mean(values), what)
    return reading


def _batches(asks: list[Ask]) -> Iterator[list[Ask]]:
    for start in range(0, len(asks), ROWS):
        yield asks[start : start + ROWS]
