"""Speed: prefill and decode apart, per batch and context, in turns with the unchanged model.

Both models live in one process and are timed in the order model, reference, reference, model, so that
what drifts (clocks, heat, neighbours) meets both alike; a speed-up is the median ratio of neighbouring calls.
On CUDA both decode by graphs, or neither does; what the device was doing is looked up between the calls.
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
from effbench.machine.ceilings import Ceilings, ceilings, described
from effbench.machine.clock import Span, timed
from effbench.machine.watch import Watch
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.graphs import Decoder, decoders
from effbench.nn.model.experts import count_idle_bytes, count_used
from effbench.nn.model.linear import top_linears
from effbench.probes import Reading
from effbench.probes.inputs import random_ids, slow
from effbench.probes.memory import elements, tensors
from effbench.records.metric import Finding
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

EXCLUSIVE = True
POINTED = True
SEES = {"weights", "cache", "attention"}

NEW_TOKENS, NEW_TOKENS_SLOW = 32, 2
SECONDS = {"cpu": 2.0, "cuda": 10.0}  # per point, shared by its two phases
NARROW = 0.02  # width of the ratio's interval at which timing stops
LEAST = 10  # rounds before a narrow interval is believed
PATIENCE = 3  # times the cap, to reach the rounds that an interval needs
STEADY = 0.95  # warm is a call that takes at least this much of the best before it


class Point(NamedTuple):
    """One shape of work; `str` of it ends the metric names."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"b{self.batch}_c{self.context}"


class Paired(NamedTuple):
    """Times of the calls, round by round, and how many it took to get there."""

    model: list[Span]
    reference: list[Span]
    findings: dict[str, Finding]

    def ratios(self) -> list[float]:
        """How many times faster the model was, one per round."""
        return [theirs.device / ours.device for ours, theirs in zip(self.model, self.reference, strict=True)]

    def seconds(self) -> list[float]:
        """The model's, by the device's clock."""
        return [span.device for span in self.model]


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """Tokens/s, milliseconds per token and speed-ups for every point, and the ceilings of the device.

    Settings: `speed_points` (pairs of batch and context), `speed_new_tokens`, `speed_seconds` (per point).
    """
    new = new_tokens(run, settings)
    seconds = settings.get("speed_seconds") or SECONDS.get(run.device.type, SECONDS["cpu"])
    limits, reading = ceilings(run.device), Reading()
    _report_ceilings(reading, limits, run.device)
    reading.add(
        "decode_weight_bytes",
        decode_weight_bytes(run.model),
        "resident, read by one decoding step: all but tables that only the input uses",
    )
    for point in points(run, settings):
        _take_point(reading, run, point, new, seconds, limits)
    return reading


def _take_point(reading: Reading, run: ModelRun, point: Point, new: int, seconds: float, limits: Ceilings) -> None:
    """Time one point; its caches and graphs are gone when it is done."""
    engines = open_engine(run), open_engine(run, run.reference)
    ids = prompts(run, point, new, engines[0].max_length)
    watch = Watch(run.device)
    ours, theirs = (functools.partial(prefill_seconds, each, ids, run.device) for each in engines)
    prefill = paired(ours, theirs, seconds / 2, between=watch.glance)
    kinds, how = decoders(engines, ids, new)
    ours, theirs = (functools.partial(decode_seconds, each, ids, new, run.device) for each in kinds)
    decode = paired(ours, theirs, seconds / 2, between=watch.glance)
    watch.look()
    if watch.rows:
        reading.samples[f"speed_state_{point}"] = [*watch.rows]
    _report(reading, run, point, new, (prefill, decode), seconds / 2, how, watch.findings())
    _report_percent(reading, run, point, prefill, decode, limits)


def points(run: ModelRun, settings: Mapping[str, Any]) -> list[Point]:
    """What to time: pairs (batch, context) of the setting `speed_points`."""
    given = settings.get("speed_points")
    if given:
        return [Point(int(batch), int(context)) for batch, context in given]
    context = min(128, open_engine(run).max_length - new_tokens(run, settings))
    return [Point(1, context)] if slow(run) else [Point(1, context), Point(8, context)]


def new_tokens(run: ModelRun, settings: Mapping[str, Any]) -> int:
    """Decoding steps of one call: the setting `speed_new_tokens`, or what suits the model."""
    return int(settings.get("speed_new_tokens") or (NEW_TOKENS_SLOW if slow(run) else NEW_TOKENS))


def prompts(run: ModelRun, point: Point, new: int, positions: int) -> Tensor:
    """Random prompts [batch, context]. Raises `Unsupported` where the model is too short for them."""
    if point.context < 1 or point.context + new > positions:
        raise Unsupported(f"context {point.context} and {new} new tokens in {positions} positions")
    return random_ids(run, point.batch, point.context)


def prefill_seconds(decoder: Decoder, ids: Tensor, device: torch.device) -> Span:
    """Time of one prefill."""
    with torch.inference_mode():
        return timed(lambda: decoder.prefill(ids), device)


def decode_seconds(decoder: Decoder, ids: Tensor, new: int, device: torch.device) -> Span:
    """Time per decoding step, over `new` steps after an untimed prefill."""
    with torch.inference_mode():
        state = decoder.prefill(ids)

        def decode() -> None:
            nonlocal state
            for _ in range(new):
                state = decoder.decode(state)

        return timed(decode, device).per(new)


def paired(
    model: Callable[[], Span],
    reference: Callable[[], Span],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    between: Callable[[], None] = lambda: None,
) -> Paired:
    """Call both in turns, and `between` the rounds, until the ratio's interval is narrow or `seconds` are over.

    The cap gives way, up to `PATIENCE` times, to the rounds that an interval needs; calls too slow even for
    that leave a median without one.
    """
    warm = [_warm_up(call, seconds / 4, clock) for call in (model, reference)]
    kept = Paired([], [], {})
    begin = clock()
    while True:
        for _ in range(2):
            first = len(kept.model) % 2 == 0
            for ours in (first, not first):
                (kept.model if ours else kept.reference).append(model() if ours else reference())
            between()
        rounds, spent = len(kept.model), clock() - begin
        width = intervals.width(intervals.median(kept.ratios()))
        narrow = rounds >= LEAST and width <= NARROW
        if narrow or (spent >= seconds and (rounds >= intervals.MEDIAN_NEEDS or spent >= PATIENCE * seconds)):
            break
    findings: dict[str, Finding] = {
        "warm_up_calls": warm[0],
        "reference_warm_up_calls": warm[1],
        "capped": not narrow,
    }
    if math.isfinite(width):
        findings["ratio_interval"] = round(width, 6)
    return kept._replace(findings=findings)


def _warm_up(call: Callable[[], Span], seconds: float, clock: Callable[[], float]) -> int:
    best, calls, begin = math.inf, 0, clock()
    while True:
        took = call().device
        calls += 1
        steady = calls > 1 and took >= STEADY * best
        best = min(best, took)
        if steady or clock() - begin > seconds:
            return calls


def _report(
    reading: Reading,
    run: ModelRun,
    point: Point,
    new: int,
    timings: tuple[Paired, Paired],
    seconds: float,
    kind: str,
    seen: dict[str, Finding],
) -> None:
    """Add what the timings of prefill and decode, `seconds` at most each, say of one point."""
    prefill, decode = timings
    cuda = run.device.type == "cuda"
    device = torch.cuda.get_device_name(run.device) if cuda else "CPU"
    turns = f"{device}, {torch.get_num_threads()} threads, random tokens, model and reference in turns (ABBA)"
    how = f"{turns}, until the ratio's interval is within {NARROW:.0%} or {seconds:g} s are over; median"
    tokens = point.batch * point.context
    protocol = f"batch {point.batch}, context {point.context}, one forward, {how}"
    findings = prefill.findings | seen
    rate = intervals.median(prefill.seconds(), lambda s: tokens / s)
    reading.add(f"prefill_tok_per_s_{point}", rate, protocol, findings)
    ratio = intervals.median(prefill.ratios())
    reading.add(f"prefill_speedup_{point}", ratio, f"{protocol} of per-round ratios", findings)
    protocol = f"batch {point.batch}, {new} tokens after context {point.context}, decode: {kind}, {how}"
    findings = decode.findings | seen
    rate = intervals.median(decode.seconds(), lambda s: point.batch / s)
    reading.add(f"decode_tok_per_s_{point}", rate, protocol, findings)
    step = intervals.median(decode.seconds(), lambda s: 1000 * s)
    reading.add(f"decode_ms_per_token_{point}", step, f"{protocol} step", findings)
    ratio = intervals.median(decode.ratios())
    reading.add(f"decode_speedup_{point}", ratio, f"{protocol} of per-round ratios", findings)
    for phase, paired_times, unit in (("prefill", prefill, "ms"), ("decode", decode, "ms_per_token")):
        for role, spans in (("", paired_times.model), ("reference_", paired_times.reference)):
            reading.samples[f"{phase}_{role}seconds_{point}"] = [span.device for span in spans]
            if cuda:
                reading.samples[f"{phase}_{role}wall_seconds_{point}"] = [span.wall for span in spans]
        if cuda:
            gap = intervals.median([1000 * (span.wall - span.device) for span in paired_times.model])
            what = "synchronised wall clock less the span between CUDA events, median"
            reading.add(f"{phase}_launch_overhead_{unit}_{point}", gap, what)


def _report_ceilings(reading: Reading, limits: Ceilings, device: torch.device) -> None:
    measured = described(device)
    reading.add("memory_bandwidth_bytes_per_s", limits.bandwidth, f"the larger of copying and reading, {measured}")
    reading.add("memory_copy_bytes_per_s", limits.copy_bytes_per_s, f"read and written, {measured}")
    reading.add("memory_read_bytes_per_s", limits.read_bytes_per_s, f"summed, {measured}")
    reading.add(
        "matmul_flop_per_s", limits.matmul_flop_per_s, f"square {limits.matmul_dtype} matrices of random numbers"
    )
    if limits.graph_node_s is not None:
        reading.add("graph_node_us", 1e6 * limits.graph_node_s, "one addition of one number within a CUDA graph")


def _report_percent(
    reading: Reading, run: ModelRun, point: Point, prefill: Paired, decode: Paired, limits: Ceilings
) -> None:
    """What was attained of what this device attains at most."""
    step = intervals.median(decode.seconds()).value
    floor = decode_weight_bytes(run.model) / limits.bandwidth
    what = "decode_weight_bytes over memory_bandwidth_bytes_per_s, keys and values not counted"
    reading.add(f"decode_floor_ms_per_token_{point}", 1000 * floor, what)
    reading.add(f"decode_percent_of_bandwidth_{point}", 100 * floor / step, f"{what}, over the step")
    rate = prefill_flops(run.model, point) / intervals.median(prefill.seconds()).value
    what = f"2 x entries of all linears as if dense, the head for last tokens alone, over {limits.matmul_dtype} matmul"
    reading.add(f"prefill_percent_of_matmul_{point}", 100 * rate / limits.matmul_flop_per_s, what)


def prefill_flops(model: nn.Module, point: Point) -> int:
    """Operations of the linears in one prefill, by the 2d rule; only last tokens pass through the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    body = sum(elements(module) for _, module in top_linears(model) if module is not head) + count_used(model)
    return 2 * point.batch * (body * point.context + elements(head))


def decode_weight_bytes(model: nn.Module) -> int:
    """Bytes of weights, as resident, that one decoding step reads.

    Of a table (tokens, positions) only the rows looked up are read, unless the head shares it and reads all; of experts
    at least those that one token is sent to.
    """
    sizes = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors(model)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    unread = sum(sizes[table] for table in tables - {id(tensor) for tensor in tensors(head)})
    return sum(sizes.values()) - unread - count_idle_bytes(model)
