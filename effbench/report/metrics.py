"""What the names of metrics say: their kind, their order, their title in a table, the range of their values."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable

PPL = re.compile(r"(^|_)ppl$")
ACCURACY = re.compile(r"_(acc|exact_match)$")
SPEED = re.compile(r"(prefill|decode)_speedup_b(\d+)_c(\d+)")
COMPUTE = re.compile(r"_flops_per_token_|^flops_2d$|_energy_j_per_token_")
DISTANCES = ("kl_nats_per_token", "top1_agreement")
TASKS = "tasks_acc"  # the mean over all tasks


@functools.lru_cache(maxsize=65536)
def natural_key(text: str) -> tuple[tuple[float, str], ...]:
    """Sort key in which 2 comes before 16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return tuple((float(part), "") if i % 2 else (math.inf, part) for i, part in enumerate(parts))


def select_perplexities(names: Iterable[str]) -> list[str]:
    """Those that are perplexities, that of the held-out tokens first."""
    return sorted(filter(PPL.search, names), key=lambda name: (name != "token_ppl", natural_key(name)))


def select_tasks(names: Iterable[str]) -> list[str]:
    """The accuracy of every task: `acc`, or `exact_match` where the task has no `acc`."""
    accuracies: dict[str, str] = {}
    for name in sorted(names):
        if name != TASKS and (match := ACCURACY.search(name)):
            accuracies.setdefault(name[: match.start()], name)
    return [accuracies[task] for task in sorted(accuracies, key=natural_key)]


def select_quality(names: Iterable[str]) -> list[str]:
    """Those that say how good a model is: perplexities, distances from the unchanged model, tasks and their mean."""
    names = set(names)
    distances = [name for name in DISTANCES if name in names]
    return [*select_perplexities(names), *distances, *([TASKS] if TASKS in names else []), *select_tasks(names)]


def get_limits(metric: str) -> tuple[float, float]:
    """Smallest and largest value that the metric can have."""
    if PPL.search(metric):
        return 1.0, math.inf
    return 0.0, 1.0 if ACCURACY.search(metric) or metric == "top1_agreement" else math.inf


def get_scale(metric: str) -> float:
    """What a value is multiplied by to be shown: shares are shown in percent."""
    return 100.0 if ACCURACY.search(metric) or metric == "top1_agreement" else 1.0


def get_title(metric: str) -> str:
    """Column title of a metric."""
    if match := SPEED.fullmatch(metric):
        return f"{match[1]} b{match[2]} c{match[3]}"
    if match := re.fullmatch("(.*)_peak_(.*)_bytes", metric):
        return f"{match[1]} peak ({match[2]})"
    if match := ACCURACY.search(metric):
        return f"{metric[: match.start()]}, %".replace("_", " ")
    return TITLES.get(metric) or metric.replace("_", " ")


TITLES = {"token_ppl": "perplexity", "kl_nats_per_token": "KL, nats", "top1_agreement": "top-1, %"}
