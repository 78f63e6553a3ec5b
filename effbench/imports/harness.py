"""Results of lm-eval: `results_<date>.json`, with `samples_<task>_<date>.jsonl` beside it where samples were logged.

Source: lm_eval/loggers/evaluation_tracker.py and lm_eval/result_schema.py of EleutherAI/lm-evaluation-harness 0.4.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effbench.core.errors import Usage, first_line
from effbench.imports.found import Found
from effbench.records.definitions import DEFINITIONS
from effbench.records.metric import Metric
from effbench.stats import intervals

SOURCE = "lm-eval"
NUMBER = re.compile(r"(?P<metric>.+),(?P<filter>[^,]+)")  # key of a value: acc,none
ERROR = "_stderr"
OWN = {one.pattern.removeprefix("{task}_") for one in DEFINITIONS if one.pattern.startswith("{task}_")}
SCALES = {  # what the mean log-likelihood of texts becomes
    "word_ppl": lambda mean: intervals.exp(-mean),
    "byte_ppl": lambda mean: intervals.exp(-mean),
    "ppl": lambda mean: intervals.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}
ALIKE = 1e-6  # relative: by how much a mean of samples may differ from the value of the file


def recognises(body: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a file of results of this tool."""
    return {"results", "configs"} <= body.keys() and isinstance(body["results"], dict)


def is_said_elsewhere(path: Path) -> bool:
    """Whether a file beside it says the same and more."""
    return False


def read(path: Path, body: Mapping[str, Any]) -> Found:
    """The content of a file. Raises `Usage`, and what comes of a file of another layout."""
    config = body.get("config", {})
    arguments = config.get("model_args") or ""
    told = ",".join(f"{key}={value}" for key, value in arguments.items()) if isinstance(arguments, dict) else arguments
    pretrained = re.search(r"pretrained=([^,]+)", told)
    model = body.get("model_name") or (pretrained[1] if pretrained else config.get("model")) or "unknown"
    date = body.get("date")
    found = Found(
        recipe=model,
        model=model,
        data="tasks of lm-eval",
        version=str(body.get("lm_eval_version") or ""),
        seed=int(config.get("random_seed") or 0),
        method={"model_args": str(told), "model_source": str(body.get("model_source") or config.get("model") or "")},
        settings={"limit": config.get("limit")},
        digests={"tasks": json.dumps(body.get("task_hashes") or {}, sort_keys=True)},
        environment={"packages": {"transformers": str(body.get("transformers_version") or "")}},
        started="" if date is None else datetime.datetime.fromtimestamp(date, datetime.UTC).isoformat(),
        seconds=float(body.get("total_evaluation_time_seconds") or 0.0),
    )
    for task, values in body["results"].items():
        if task in body["configs"]:
            _add_task(found, path, body, task, values)
        elif any(NUMBER.fullmatch(key) for key in values):
            found.left_out.append(f"{task} (a mean over tasks)")
    if not found.metrics:
        raise Usage(f"{path}: no metric of any task")
    return found


def _add_task(found: Found, path: Path, body: Mapping[str, Any], task: str, values: Mapping[str, Any]) -> None:
    """Every metric of a task, by its samples where they were logged."""
    samples = _read_samples(path, task)
    parts = {key: match for key in values if (match := NUMBER.fullmatch(key))}
    filters = list(dict.fromkeys(match["filter"] for match in parts.values()))
    counts = (body.get("n-samples") or {}).get(task) or {}
    for key, match in parts.items():
        metric, chosen, value = match["metric"], match["filter"], values[key]
        if metric.endswith(ERROR):
            continue
        name = metric.replace("perplexity", "ppl")
        name = name if name in OWN else f"lm_eval_{metric}"
        full = f"{task}_{name}" + ("" if chosen == filters[0] else f"_{chosen}")
        if not isinstance(value, (int, float)):
            found.left_out.append(f"{full} ({value})")
            continue
        protocol = ", ".join(_describe(body, task, metric, chosen, counts))
        error = values.get(f"{metric}{ERROR},{chosen}")
        items = [line[metric] for line in samples if line.get("filter", chosen) == chosen and metric in line]
        measured = _measure(path, full, name, float(value), items)
        if measured is None:
            measured = _bound(float(value), error, counts.get("effective"), name)
        else:
            found.samples[full] = items
        found.add(full, measured, protocol)


def _measure(path: Path, full: str, name: str, value: float, items: Sequence[Any]) -> Metric | None:
    """The metric of its samples; None where there is none, or the value is not the mean of them."""
    if not items:
        return None
    if name in SCALES:
        sums = [float(item[0]) if isinstance(item, list) else float(item) for item in items]
        sizes = [float(item[1]) if isinstance(item, list) else 1.0 for item in items]
        measured = intervals.quotient(sums, sizes, SCALES[name])
    elif all(isinstance(item, (int, float)) for item in items):
        binary = all(item in (0, 1) for item in items)
        measured = intervals.fraction(items) if binary else intervals.mean(items)
    else:
        return None
    if math.isclose(measured.value, value, rel_tol=ALIKE, abs_tol=ALIKE):
        return measured
    if name.startswith(("acc", "exact_match")):
        raise Usage(f"{path}: {full} is {value:g}, and {measured.value:g} by the samples beside it: of another run")
    return None  # an aggregate that is no mean, such as f1


def _bound(value: float, error: Any, n: Any, name: str) -> Metric:
    """A value with the interval of its standard error, within what a share can be."""
    count = int(n) if isinstance(n, (int, float)) else None
    if not isinstance(error, (int, float)) or not math.isfinite(error):
        return Metric(value, n=count)
    low, high = value - intervals.Z * error, value + intervals.Z * error
    share = name.startswith(("acc", "exact_match", "f1"))
    return Metric(value, max(0.0, low) if share else low, min(1.0, high) if share else high, count)


def _describe(body: Mapping[str, Any], task: str, metric: str, chosen: str, counts: Mapping[str, Any]) -> list[str]:
    """How a metric was measured, as far as the file says."""
    config = body.get("config") or {}
    template = body.get("chat_template_sha") or "no chat template"
    hashes = body.get("task_hashes") or {}
    return [
        f"lm-eval {body.get('lm_eval_version') or 'of unknown version'}",
        f"task {task} v{(body.get('versions') or {}).get(task)}",
        f"{(body.get('n-shot') or {}).get(task, 'unknown')}-shot",
        f"{metric}, filter {chosen}",
        f"{counts.get('effective', 'unknown')} of {counts.get('original', 'unknown')} items",
        f"chat template {template[:12]}" if body.get("chat_template_sha") else template,
        *([f"system instruction {body['system_instruction_sha'][:12]}"] if body.get("system_instruction_sha") else []),
        *([f"generation {config['gen_kwargs']}"] if config.get("gen_kwargs") else []),
        *([f"prompts {hashes[task][:12]}"] if task in hashes else []),
    ]


def _read_samples(path: Path, task: str) -> list[dict[str, Any]]:
    """The samples of a task in the order of its documents; none where they were not logged. Raises `Usage`."""
    date = path.stem.rpartition("_")[2]
    name = re.sub(r"\W", "_", task)
    file = path.with_name(f"samples_{name}_{date}.jsonl")
    if not file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return sorted(lines, key=lambda line: int(line["doc_id"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Usage(f"{file}: not a file of samples of lm-eval ({type(error).__name__}: {first_line(error)})") from None
