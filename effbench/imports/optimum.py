"""Results of optimum-benchmark: `benchmark.json`, or `benchmark_report.json` with `benchmark_config.json` beside it.

Source: optimum_benchmark/benchmark/, trackers/ and scenarios/inference/ of huggingface/optimum-benchmark 0.5 and 0.6.
Of its targets `prefill` and `decode` are read: what a prompt of `sequence_length` tokens takes, and those after the
first token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effbench.core.errors import Usage
from effbench.imports.found import Found
from effbench.records.metric import Metric
from effbench.stats import intervals

SOURCE = "optimum-benchmark"
CONFIG = "benchmark_config.json"
WHOLE = "benchmark.json"
MEASURED = {"memory", "latency", "throughput", "energy", "efficiency"}  # of one target
PHASES = ("prefill", "decode")
PEAKS = {  # of its memory: the way to count it here
    "max_ram": "rss",
    "max_allocated": "allocated",
    "max_reserved": "reserved",
    "max_process_vram": "process",
}
MEGABYTE = 1e6
KILOWATT_HOUR = 3.6e6  # joules


def recognises(body: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a file of results of this tool."""
    return _is_report(body.get("report")) if body.keys() >= {"config", "report"} else _is_report(body)


def is_said_elsewhere(path: Path) -> bool:
    """Whether a file beside it says the same and more."""
    return path.name != WHOLE and path.with_name(WHOLE).is_file()


def _is_report(body: Any) -> bool:
    """Whether it holds targets with their measurements."""
    targets = list(body.values()) if isinstance(body, dict) else []
    return bool(targets) and all(isinstance(one, dict) and one.keys() and one.keys() <= MEASURED for one in targets)


def read(path: Path, body: Mapping[str, Any]) -> Found:
    """The content of a file. Raises `Usage`, and what comes of a file of another layout."""
    config, report = (body["config"], body["report"]) if "report" in body else (_read_config(path), body)
    backend, scenario, place = config["backend"], config.get("scenario") or {}, config.get("environment") or {}
    shapes = scenario.get("input_shapes") or {}
    device = place.get("gpu") if backend.get("device") == "cuda" else place.get("cpu")
    quantization = backend.get("quantization_scheme") or backend.get("quantize")
    dtype = backend.get("torch_dtype") or backend.get("dtype")
    found = Found(
        recipe=str(config.get("name") or quantization or backend["name"]),
        model=str(backend["model"]),
        data=f"random inputs of {scenario.get('name') or 'a scenario'}",
        version=str(place.get("optimum_benchmark_version") or ""),
        seed=int(backend.get("seed") or 0),
        method={"quantization": quantization, "quantization_config": backend.get("quantization_config")},
        settings={"backend": backend["name"], "device": backend.get("device"), "dtype": dtype, "input_shapes": shapes},
        environment={
            "machine": ", ".join(device) if isinstance(device, list) else str(device or "").strip(),
            "platform": str(place.get("platform") or ""),
            "packages": {
                name.removesuffix("_version"): str(value)
                for name, value in place.items()
                if name.endswith("_version") and value
            },
        },
    )
    how = f"optimum-benchmark, backend {backend['name']} {backend.get('version') or ''}".rstrip()
    _add_memory(found, report, how)
    batch, context = shapes.get("batch_size"), shapes.get("sequence_length")
    for target, measured in report.items():
        rest = [name for name, value in measured.items() if value is not None and name != "memory"]
        if target in PHASES and batch and context and measured.get("latency"):
            rest = _add_phase(found, target, measured, int(batch), int(context), how)
        found.left_out += [f"{target} {name}" for name in rest]
    if not found.metrics:
        raise Usage(f"{path}: no measurement that has a metric here: {', '.join(found.left_out) or 'it is empty'}")
    return found


def _read_config(path: Path) -> dict[str, Any]:
    """What was measured, which a report alone does not say. Raises `Usage`."""
    file = path.with_name(CONFIG)
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
        return config
    except (OSError, ValueError):
        raise Usage(f"{path}: says not what was measured, and no {CONFIG} lies beside it; name the folder's") from None


def _add_memory(found: Found, report: Mapping[str, Any], how: str) -> None:
    """The most memory over all targets. The peak of the whole device has others' memory in it and is left out."""
    memories = [measured["memory"] for measured in report.values() if measured.get("memory")]
    for name, peak in PEAKS.items():
        values = [memory[name] for memory in memories if memory.get(name) is not None]
        if values:
            found.add(f"run_peak_{peak}_bytes", MEGABYTE * max(values), f"{how}; the highest of all targets")
    if any(memory.get("max_global_vram") is not None for memory in memories):
        found.left_out.append("max_global_vram")


def _add_phase(found: Found, phase: str, measured: Mapping[str, Any], batch: int, context: int, how: str) -> list[str]:
    """Speed and energy of prefill or decode; returns the measurements that have no metric here."""
    latency, point = measured["latency"], f"b{batch}_c{context}"
    tokens = batch * context if phase == "prefill" else _count_tokens(measured)
    used = {"latency", "throughput", "efficiency", "memory"}
    if tokens is None:
        return [name for name in measured if measured[name] is not None and name != "memory"]
    what = f"{how}, batch {batch}, context {context}, {latency.get('count')} calls, median"
    steps = 1 if phase == "prefill" else tokens / batch
    seconds = [float(value) for value in latency.get("values") or []]
    if seconds:
        found.samples[f"{phase}_seconds_{point}"] = [value / steps for value in seconds]
        rate = intervals.median(seconds, lambda value: tokens / value)
        step = intervals.median(seconds, lambda value: 1000 * value / steps)
    else:
        rate, step = Metric(tokens / latency["p50"]), Metric(1000 * latency["p50"] / steps)
    found.add(f"{phase}_tok_per_s_{point}", rate, what)
    if phase == "decode":
        found.add(f"decode_ms_per_token_{point}", step, f"{what} step")
    energy = measured.get("energy")
    if energy and energy.get("gpu"):
        each = KILOWATT_HOUR * energy["gpu"] / tokens
        found.add(f"{phase}_energy_j_per_token_{point}", each, f"{how}; of the GPU, by codecarbon")
        used.add("energy")
    return [name for name in measured if measured[name] is not None and name not in used]


def _count_tokens(measured: Mapping[str, Any]) -> float | None:
    """Tokens that one call decodes: what its rate, which is that of the mean latency, says."""
    throughput = measured.get("throughput")
    if not throughput or throughput.get("unit") != "tokens/s" or not throughput.get("value"):
        return None
    return float(round(throughput["value"] * measured["latency"]["mean"]))
