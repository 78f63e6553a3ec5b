"""How far the tasks go beyond random tokens: each prompt loses as many tokens of its contexts as the recipe takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from effbench.core.views import Segments
from effbench.nn.infer.engine import open_engine
from effbench.probes import Reading
from effbench.probes.inputs import require_effect, require_quality
from effbench.probes.prompts import Asker
from effbench.probes.quality import HEADLINE, EngineLM, Scored, score_by, score_tasks
from effbench.records.metric import Metric
from effbench.stats.paired import Estimate, mean_interval

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

DROP = "effbench.methods.prompt.random_tokens:drop"

QUALITY = True
SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`<task>_over_random` for every task of the setting `tasks` (default: the data's own) that has an accuracy and in
    which prompts were shortened, and `tasks_over_random`; nothing for a recipe without prompt methods.

    Both sides score the same items with the model of the recipe and its caches. A recipe that makes memory of prompts
    trains its model to read that: random tokens are read by the unchanged one. Raises `Refused` where no prompt was
    shortened.
    """
    require_quality(run)
    reading = Reading()
    wanted = list(settings.get("tasks") or run.data.tasks)
    if "prompt" not in run.infer.touches or not wanted:
        return reading
    scored = score_tasks(run, settings, wanted)
    own, reading.failures = scored.lm, [*scored.failures]
    found = _list_accuracies(scored)
    require_effect(run, frozenset({"prompt"}))
    lost = {tuple(ask.given): len(ask.given) - ask.kept for met in own.met.values() for ask in met.asks.values()}
    module, _, name = DROP.partition(":")
    drop: Callable[[Segments, int, ModelRun], Segments] = getattr(importlib.import_module(module), name)
    floor = EngineLM(run, settings)
    floor.asker = Asker(
        floor.tok_encode,
        lambda segments: drop(segments, lost[tuple(floor.tok_encode(segments.text()))], run),
        floor.evict_at,
    )
    reader = "the recipe's model"
    if run.infer.slot("memory") is not None:
        floor.engine, reader = open_engine(run, run.reference), "the unchanged model"
    shortened = {name for name, met in own.met.items() if any(ask.shortened for ask in met.asks.values())}
    under = _list_accuracies(score_by(floor, run, settings, [name for name in wanted if name in shortened] or wanted))
    how = f"with as many tokens of each prompt, drawn by the seed and read by {reader}"
    differences: dict[str, list[float]] = {}
    for name in sorted(shortened & found.keys()):
        differences[name] = [after - before for before, after in zip(under[name], found[name], strict=True)]
        key = f"{name}_over_random{own.suffix}"
        reading.samples[key] = differences[name]
        items = f"{own.protocol(own.tasks[name])}, {len(found[name])} items"
        reading.add(key, _as_metric(mean_interval(differences[name])), f"paired, less that {how}; {items}")
    if differences and not reading.failures:
        tasks = ", ".join(differences)
        total = _as_metric(mean_interval(*differences.values()))
        reading.add(f"tasks_over_random{own.suffix}", total, f"paired, each task alike, of {tasks}, less that {how}")
    return reading


def _list_accuracies(scored: Scored) -> dict[str, list[float]]:
    """The accuracy of each item of the tasks that have one, in the order of the items."""
    scores: dict[str, list[float]] = {}
    for name in scored.lm.tasks:
        items = scored.evaluated["samples"][name]
        metric = next((one for one in HEADLINE if one in items[0]["metrics"]), None)
        if metric is not None:
            chosen = [item for item in items if item["filter"] == items[0]["filter"]]
            scores[name] = [float(item[metric]) for item in sorted(chosen, key=lambda item: int(item["doc_id"]))]
    return scores


def _as_metric(found: Estimate) -> Metric:
    return Metric(found.value, found.low, found.high, found.n)
