"""What the names of metrics say: their kind, their order, their title in a table, the range of their values.

Kinds and units come from `effbench.records.definitions`. A metric of a record that another version of effbench wrote
may have no definition; it is of no kind then.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable

from effbench.records.definitions import Definition, Family, Undefined, describe

# Distances from the unchanged model or from a teacher that have results per item; `flips` is the rest of the agreement.
DISTANCES = ("kl_nats_per_token", "answer_kl_nats_per_token", "top1_agreement", "acceptance", "answer_acceptance")
LEARNED = ("completion_nll", "completion_exact")  # on a task that was trained on; the gain on no prompt is nll's own
TASKS = "tasks_acc"  # the mean over all tasks
TITLES = {
    "token_ppl": "perplexity",
    "kl_nats_per_token": "KL, nats",
    "top1_agreement": "top-1, %",
    TASKS: "tasks, %",
    f"{TASKS}_evict_at_context": "tasks (evict at context), %",
    "answer_kl_nats_per_token": "answer KL, nats",
    "prompt_kept": "prompt kept, %",
    "prompt_asked": "prompt asked, %",
    "prompt_over_asked": "beyond what was asked, %",
    "compressor_ms_per_prompt": "compressor, ms",
    "prompt_saved_ms": "saved, ms",
    "tasks_over_random": "over random tokens, %",
    "cache_kept": "cache kept, %",
    "drafted_speedup": "drafted, ×",
    "accepted_per_pass": "accepted",
    "tokens_per_pass": "tokens a pass",
    "sampled_drafted_speedup": "sampled, ×",
    "sampled_accepted_per_pass": "accepted of sampled",
    "sampled_tokens_per_pass": "sampled tokens a pass",
    "completion_nll": "answers, nats",
    "completion_exact": "answers right, %",
    "completion_gain_nats": "gain on no prompt, nats",
    "completion_constant_exact": "likeliest answer right, %",
    "acceptance": "acceptance, %",
    "answer_acceptance": "acceptance of answers, %",
    "fit_step_ms": "step, ms",
    "fit_tok_per_s": "tokens per s",
    "fit_loss_first": "first loss, nats",
    "fit_loss_mean": "mean loss, nats",
    "fit_loss_last": "last loss, nats",
    "fit_loss_quarter_1": "quarter 1, nats",
    "fit_loss_quarter_2": "quarter 2, nats",
    "fit_loss_quarter_3": "quarter 3, nats",
    "fit_loss_quarter_4": "quarter 4, nats",
    "fit_skipped": "skipped",
    "fit_activation_bytes": "activations",
    "fit_step_peak_bytes": "peak of a step",
    "fit_parameter_bytes": "parameters",
    "fit_buffer_bytes": "buffers",
    "fit_gradient_bytes": "gradients",
    "fit_optimizer_bytes": "optimizer",
    "fit_gathered_bytes": "gathered",
    "fit_rule_bytes": "by the formula",
    "plan_weights_off": "weights foretold, off by %",
    "plan_gathered_off": "gathered foretold, off by %",
    "plan_gradients_off": "gradients foretold, off by %",
    "plan_optimizer_off": "optimizer foretold, off by %",
    "plan_activations_off": "activations foretold, off by %",
    "plan_training_off": "training foretold, off by %",
    "plan_resident_off": "model foretold, off by %",
    "plan_stored_off": "stored foretold, off by %",
    "select_kept": "kept",
    "select_in_kept": "in-domain kept, %",
    "select_off_kept": "off-domain kept, %",
    "select_noise_kept": "noise kept, %",
    "select_duplicate_kept": "duplicates kept, %",
    "select_noise_last": "noise ranked last, %",
    "select_rightly": "rightly turned away, %",
    "select_pairs_kept": "pairs kept, %",
    "select_turned_away": "turned away",
    "select_sources_covered": "sources, %",
    "select_skills_covered": "skills, %",
    "select_kept_length_q50": "median length",
    "select_pool_length_q50": "median length of the pool",
    "select_kept_topics_nats": "topics, nats",
    "select_pool_topics_nats": "topics of the pool, nats",
    "select_kept_label_balance": "label balance, %",
    "select_pool_label_balance": "label balance of the pool, %",
    "select_s_per_1000": "selection per 1000, s",
    "select_forward_s_per_1000": "forward pass per 1000, s",
    "select_seconds": "selection, s",
    "tuned_own_nll": "own setting, nats",
    "tuned_nll": "best, nats",
    "tuned_points": "settings",
    "tuned_seconds": "all settings, s",
    "tuned_tokens": "learned tokens of all",
}


@functools.cache
def find_definition(metric: str) -> Definition | None:
    """What a metric means; None where this version does not know it."""
    try:
        return describe(metric)
    except Undefined:
        return None


def get_family(metric: str) -> Family | None:
    """The kind of a metric."""
    definition = find_definition(metric)
    return None if definition is None else definition.family


@functools.lru_cache(maxsize=65536)
def natural_key(text: str) -> tuple[tuple[float, str], ...]:
    """Sort key in which 2 comes before 16."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return tuple((float(part), "") if i % 2 else (math.inf, part) for i, part in enumerate(parts))


def select(names: Iterable[str], family: Family, unit: str | None = None) -> list[str]:
    """Those of a kind, and of a unit, in natural order; of a task with several filters, those of the first."""
    of_family = (name for name in names if get_family(name) == family and unit in (None, get_unit(name)))
    return sorted((name for name in of_family if _read_fields(name) is not None), key=natural_key)


def select_perplexities(names: Iterable[str]) -> list[str]:
    """Those that are perplexities, that of the held-out tokens first."""
    return sorted(select(names, "perplexity"), key=lambda name: name != "token_ppl")


def select_tasks(names: Iterable[str]) -> list[str]:
    """The accuracy of every task: `acc`, or `exact_match` where the task has no `acc`."""
    return list(_select_tasks(tuple(names)))


@functools.lru_cache(maxsize=128)  # the rows of a table have the same metrics
def _select_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    accuracies: dict[str, str] = {}
    for name in sorted(select(names, "accuracy")):
        if fields := _read_fields(name):
            accuracies.setdefault(fields["task"], name)
    return tuple(accuracies[task] for task in sorted(accuracies, key=natural_key))


def select_quality(names: Iterable[str]) -> list[str]:
    """Those that say how good a model is: of a task that was learned, perplexities, distances, tasks and their mean."""
    names = set(names)
    learned = [name for name in LEARNED if name in names]
    distances = [name for name in DISTANCES if name in names]
    means = [name for name in (TASKS, f"{TASKS}_evict_at_context") if name in names]
    return [*learned, *select_perplexities(names), *distances, *means, *select_tasks(names)]


def select_headlines(names: Iterable[str]) -> list[str]:
    """The metric of each kind of quality that a table is about: of a task learned, of held-out text, of all tasks."""
    names = set(names)
    return [*(name for name in LEARNED[:1] if name in names), *select_perplexities(names)[:1], *({TASKS} & names)]


def get_limits(metric: str) -> tuple[float, float]:
    """Smallest and largest value that the metric can have."""
    if get_family(metric) == "perplexity":
        return 1.0, math.inf
    definition = find_definition(metric)
    least = -math.inf if definition is not None and definition.signed else 0.0
    return least, 1.0 if get_unit(metric) == "fraction" else math.inf


def get_scale(metric: str) -> float:
    """What a value is multiplied by to be shown: fractions are shown in percent."""
    return 100.0 if get_unit(metric) == "fraction" else 1.0


def get_title(metric: str) -> str:
    """Column title of a metric."""
    fields = _read_fields(metric) or {}
    if metric in TITLES:
        return TITLES[metric]
    if get_family(metric) == "speed" and get_unit(metric) == "ratio" and "phase" in fields:
        return f"{fields['phase']} b{fields['batch']} c{fields['context']}"
    if match := re.fullmatch(r"tuned_best_of_(\d+)_nll", metric):
        return f"expected best of {match[1]}, nats"
    if match := re.fullmatch("(.*)_peak_(.*)_bytes", metric):
        return f"{match[1]} peak ({match[2]})"
    if get_family(metric) == "accuracy" and fields:
        if metric.endswith("_evict_at_context"):
            return f"{metric.removesuffix('_evict_at_context')} (evict at context), %".replace("_", " ")
        return f"{fields['task']}, %".replace("_", " ")
    return metric.replace("_", " ")


def get_task(metric: str) -> str | None:
    """The task that a metric is of, if it is of one."""
    return (_read_fields(metric) or {}).get("task")


def get_unit(metric: str) -> str | None:
    """The unit of a metric as recorded; None where this version does not know it."""
    definition = find_definition(metric)
    return None if definition is None else definition.unit


@functools.cache
def _read_fields(metric: str) -> dict[str, str] | None:
    """What the name says of task, batch and so on; None for a task's further filters, which have no fields."""
    definition = find_definition(metric)
    match = None if definition is None else definition.regex.fullmatch(metric)
    return None if match is None else match.groupdict()
