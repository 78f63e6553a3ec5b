"""Results of PEFT's method comparison: one JSON file for each experiment.

Source: method_comparison/MetaMathQA/utils.py (`log_results`) of huggingface/peft; names of memory and device changed in
2025 from `cuda_` and `gpu` to `accelerator_` and `accelerator`, and both are read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effbench.imports.found import Found
from effbench.records.metric import Metric
from effbench.records.record import OutcomeName
from effbench.stats import intervals

SOURCE = "peft-method-comparison"
PARTS = {"run_info", "train_info", "meta_info"}
READ = {  # of `train_info`
    *("status", "metrics", "train_time", "file_size", "num_trainable_params", "num_total_params"),
    *("cuda_memory_max", "accelerator_memory_max"),
}
KEPT = {"step", "train time", "train samples", "test accuracy", "train total tokens"}  # of each entry of `metrics`


def recognises(body: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a file of results of this tool."""
    return body.keys() >= PARTS


def is_said_elsewhere(path: Path) -> bool:
    """Whether a file beside it says the same and more."""
    return False


def read(path: Path, body: Mapping[str, Any]) -> Found:
    """The content of a file. Raises what comes of a file of another layout."""
    run, train, meta = (body[part] for part in ("run_info", "train_info", "meta_info"))
    config, model, data = run["train_config"], meta.get("model_info") or {}, meta.get("dataset_info") or {}
    system = meta.get("system_info") or {}
    outcome, reason = _read_outcome(train["status"], run.get("error_msg") or "")
    packages = {name: value for name, value in (meta.get("package_info") or {}).items() if value}
    found = Found(
        recipe=run["experiment_name"],
        model=config["model_id"],
        data=", ".join(name for name, info in data.items() if isinstance(info, dict)) or "one data set",
        version=str(packages.get("peft-commit-hash") or packages.get("peft-version") or ""),
        seed=int(config["seed"]),
        outcome=outcome,
        reason=reason,
        method={"peft_config": run.get("peft_config"), "train_config": config},
        settings={name: config.get(name) for name in ("dtype", "batch_size", "max_steps", "max_seq_length")},
        digests={
            "model": str(model.get("sha")),
            "data": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(),
        },
        environment={
            "machine": system.get("accelerator") or system.get("gpu") or system.get("processor") or "",
            "platform": " ".join(str(system[name]) for name in ("system", "release", "machine") if system.get(name)),
            "packages": {name.removesuffix("-version"): v for name, v in packages.items() if name.endswith("-version")},
        },
        started=run["created_at"],
        seconds=float(run["total_time"]),
    )
    how = f"PEFT's method comparison, {config['model_id']} in {config.get('dtype')}, {config.get('max_steps')} steps"
    _add_training(found, train, how)
    _add_quality(found, train["metrics"], data, how)
    found.left_out += sorted({*train} - READ)
    found.left_out += sorted({key for entry in train["metrics"] for key in entry} - KEPT)
    return found


def _read_outcome(status: str, message: str) -> tuple[OutcomeName, str]:
    """`success`, `failed` or `canceled` as an outcome with its reason."""
    if status == "success":
        return "ok", ""
    if status == "canceled":
        return "unavailable", f"canceled: {message}"
    return ("oom" if "out of memory" in message.lower() or "OutOfMemory" in message else "crashed"), message


def _add_training(found: Found, train: Mapping[str, Any], how: str) -> None:
    """Trained numbers, memory, and time step by step."""
    trained, total = train["num_trainable_params"], train["num_total_params"]
    found.add("fit_trained_parameters", trained, how)
    # the total has an adapter's numbers in it, the original model has not
    found.add("fit_trained_share", trained / (total - trained) if total > trained else 1.0, how)
    if train.get("file_size"):
        found.add("checkpoint_bytes", train["file_size"], f"{how}; file of what was trained")
    peak = train.get("accelerator_memory_max", train.get("cuda_memory_max"))
    if peak is not None:
        found.add("run_peak_reserved_bytes", peak, f"{how}; over training and evaluation")
    steps = _list_steps(train["metrics"])
    if not steps:
        return
    each = [1000 * seconds / count for count, seconds in steps]
    found.samples["fit_step_ms"] = each
    found.add("fit_step_ms", intervals.median(each), f"{how}; a mean over each {steps[0][0]} steps, median of these")
    seconds = sum(seconds for _, seconds in steps)
    found.add("fit_seconds", seconds, f"{how}; steps of training without evaluation")
    tokens = next((entry["train total tokens"] for entry in train["metrics"] if "train total tokens" in entry), None)
    if tokens is not None:
        found.add("fit_tokens", tokens, f"{how}; tokens of prompts and answers")
        found.add("fit_tok_per_s", tokens / seconds, f"{how}; tokens of prompts and answers")


def _list_steps(entries: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(steps, seconds) between two evaluations."""
    timed = [entry for entry in entries if "train time" in entry]
    before = [0, *(entry["step"] for entry in timed)]
    counts = [after - first for first, after in itertools.pairwise(before)]
    return [(count, float(entry["train time"])) for count, entry in zip(counts, timed, strict=True) if count > 0]


def _add_quality(found: Found, entries: Sequence[Mapping[str, Any]], data: Mapping[str, Any], how: str) -> None:
    """The share of right answers to the test questions; how many there were, the file does not say."""
    accuracy = next((entry["test accuracy"] for entry in entries if "test accuracy" in entry), None)
    if accuracy is not None:
        task = "gsm8k" if "gsm8k" in data else "test"
        found.add(f"{task}_exact_match", Metric(float(accuracy)), f"{how}; generated answers to the test split")
