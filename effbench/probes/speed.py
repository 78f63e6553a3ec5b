"""Speed: prefill and decode apart, per batch and context, in turns with the unchanged model.

Both models live in one process and are timed in the order model, reference, reference, model, so that
what drifts (clocks, heat, neighbours) meets both alike; a speed-up is the median ratio of neighbouring calls.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.probes import Reading, intervals
from effbench.probes.inputs import random_ids, slow
from effbench.probes.memory import tensors

if TYPE_CHECKING:
    from effbench.nn.engine import Engine
    from effbench.nn.model_run import ModelRun

VERSION = 1
EXCLUSIVE = True

NEW_TOKENS, NEW_TOKENS_SLOW = 32, 2
SECONDS = {"cpu": 2.0, "cuda": 10.0}  # per point, shared by its two phases
NARROW = 0.02  # width of the ratio's interval at which timing stops
LEAST = 10  # rounds before a narrow interval is believed
PATIENCE = 3  # times the cap, to reach the rounds that an interval needs
STEADY = 0.95  # warm is a call that takes at least this much of the best before it
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes of the buffer that bandwidth is measured with


class Point(NamedTuple):
    """One shape of work; `str` of it ends the metric names."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"b{self.batch}_c{self.context}"


class Paired(NamedTuple):
    """Seconds of the calls, round by round, and why there are no more of them."""

    model: list[float]
    reference: list[float]
    note: str

    def ratios(self) -> list[float]:
        """How many times faster the model was, one per round."""
        return [theirs / ours for ours, theirs in zip(self.model, self.reference, strict=True)]


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """Tokens/s, milliseconds per token and speed-ups for every point.

    Settings: `speed_points` (pairs of batch and context), `speed_new_tokens`, `speed_seconds` (per point).
    """
    engines = run.engine(), run.engine(run.reference)
    new = new_tokens(run, settings)
    seconds = settings.get("speed_seconds") or SECONDS.get(run.device.type, SECONDS["cpu"])
    rate, weights = bandwidth(run.device), decode_weight_bytes(run.model)
    reading = Reading()
    measured = f"largest of copying and summing {COPIED[_kind(run.device)] >> 20} MiB, best of five"
    reading.add("memory_bandwidth_bytes_per_s", rate, measured)
    reading.add(
        "decode_weight_bytes",
        weights,
        "resident, read by one decoding step: all but tables that only the input uses",
    )
    for point in points(run, settings):
        ids = prompts(run, point, new, engines[0].max_length)
        ours, theirs = (functools.partial(prefill_seconds, each, ids, run.device) for each in engines)
        prefill = paired(ours, theirs, seconds / 2)
        ours, theirs = (functools.partial(decode_seconds, each, ids, new, run.device) for each in engines)
        decode = paired(ours, theirs, seconds / 2)
        _report(reading, run, point, new, prefill, decode)
        step = intervals.median(decode.model).value
        floor = weights / rate
        what = "decode_weight_bytes over memory_bandwidth_bytes_per_s, keys and values not counted"
        reading.add(f"decode_floor_ms_per_token_{point}", 1000 * floor, what)
        reading.add(f"decode_percent_of_bandwidth_{point}", 100 * floor / step, f"{what}, over the step")
    return reading


def points(run: ModelRun, settings: Mapping[str, Any]) -> list[Point]:
    """What to time: pairs (batch, context) of the setting `speed_points`."""
    given = settings.get("speed_points")
    if given:
        return [Point(int(batch), int(context)) for batch, context in given]
    context = min(128, run.engine().max_length - new_tokens(run, settings))
    return [Point(1, context)] if slow(run) else [Point(1, context), Point(8, context)]


def new_tokens(run: ModelRun, settings: Mapping[str, Any]) -> int:
    """Decoding steps of one call: the setting `speed_new_tokens`, or what suits the model."""
    return int(settings.get("speed_new_tokens") or (NEW_TOKENS_SLOW if slow(run) else NEW_TOKENS))


def prompts(run: ModelRun, point: Point, new: int, positions: int) -> Tensor:
    """Random prompts [batch, context]. Raises `Unsupported` where the model is too short for them."""
    if point.context < 1 or point.context + new > positions:
        raise Unsupported(f"context {point.context} and {new} new tokens in {positions} positions")
    return random_ids(run, point.batch, point.context)


def prefill_seconds(engine: Engine, ids: Tensor, device: torch.device) -> float:
    """Seconds of one prefill."""
    with torch.inference_mode():
        return timed(lambda: engine.prefill(ids), device)


def decode_seconds(engine: Engine, ids: Tensor, new: int, device: torch.device) -> float:
    """Seconds per decoding step, over `new` steps after an untimed prefill."""
    with torch.inference_mode():
        state = engine.prefill(ids)

        def decode() -> None:
            nonlocal state
            for _ in range(new):
                state = engine.decode(state)

        return timed(decode, device) / new


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` took: by events on CUDA, by the clock elsewhere."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    with torch.cuda.device(device):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begun.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        return float(begun.elapsed_time(ended)) / 1000


def paired(
    model: Callable[[], float],
    reference: Callable[[], float],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Call both in turns until the interval of the ratio is narrow or `seconds` are over.

    The cap gives way, up to `PATIENCE` times, to the rounds that an interval needs; calls too slow even for
    that leave a median without one.
    """
    warm = [_warm_up(call, seconds / 4, clock) for call in (model, reference)]
    kept = Paired([], [], "")
    begin = clock()
    while True:
        for _ in range(2):
            first = len(kept.model) % 2 == 0
            for ours in (first, not first):
                (kept.model if ours else kept.reference).append(model() if ours else reference())
        rounds, spent = len(kept.model), clock() - begin
        width = intervals.width(intervals.median(kept.ratios()))
        narrow = rounds >= LEAST and width <= NARROW
        if narrow or (spent >= seconds and (rounds >= intervals.MEDIAN_NEEDS or spent >= PATIENCE * seconds)):
            break
    why = f"interval within {NARROW:.0%}" if narrow else f"cap of {seconds:g} s"
    spread = f"ratio's interval {width:.1%} wide" if math.isfinite(width) else "too few for an interval"
    note = f"{'+'.join(map(str, warm))} warm-up calls, {rounds} rounds, {spread}, stopped by the {why}"
    return kept._replace(note=note)


def _warm_up(call: Callable[[], float], seconds: float, clock: Callable[[], float]) -> int:
    best, calls, begin = math.inf, 0, clock()
    while True:
        took = call()
        calls += 1
        steady = calls > 1 and took >= STEADY * best
        best = min(best, took)
        if steady or clock() - begin > seconds:
            return calls


def _report(reading: Reading, run: ModelRun, point: Point, new: int, prefill: Paired, decode: Paired) -> None:
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    where = f"{device}, {torch.get_num_threads()} threads, random tokens, model and reference in turns (ABBA)"
    tokens = point.batch * point.context
    how = f"batch {point.batch}, context {point.context}, one forward, {where}; {prefill.note}; median"
    rate = intervals.median(prefill.model, lambda s: tokens / s)
    reading.add(f"prefill_tok_per_s_{point}", rate, how)
    reading.add(f"prefill_speedup_{point}", intervals.median(prefill.ratios()), f"{how} of per-round ratios")
    how = f"batch {point.batch}, {new} tokens after context {point.context}, {where}; {decode.note}; median"
    rate = intervals.median(decode.model, lambda s: point.batch / s)
    reading.add(f"decode_tok_per_s_{point}", rate, how)
    step = intervals.median(decode.model, lambda s: 1000 * s)
    reading.add(f"decode_ms_per_token_{point}", step, f"{how} step")
    reading.add(f"decode_speedup_{point}", intervals.median(decode.ratios()), f"{how} of per-round ratios")
    for phase, timings in (("prefill", prefill), ("decode", decode)):
        reading.samples[f"{phase}_seconds_{point}"] = list(timings.model)
        reading.samples[f"{phase}_reference_seconds_{point}"] = list(timings.reference)


def decode_weight_bytes(model: nn.Module) -> int:
    """Bytes of weights, as resident, that one decoding step reads.

    Of a table (tokens, positions) only the rows looked up are read, unless the head shares it and reads all.
    """
    sizes = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors(model)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    return sum(sizes.values()) - sum(sizes[table] for table in tables - {id(tensor) for tensor in tensors(head)})


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Attainable bytes/s of this device's memory: the ceiling of a step that reads every weight once."""
    source = torch.ones(COPIED[_kind(device)] // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * 4
    best = 0.0
    for moved, work in ((2 * size, lambda: target.copy_(source)), (size, lambda: source.sum())):
        best = max([best, *(moved / timed(work, device) for _ in range(5))])
    return best


def _kind(device: torch.device) -> str:
    return device.type if device.type in COPIED else "cpu"
