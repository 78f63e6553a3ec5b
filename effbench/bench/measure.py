"""Kernels beside each other at the sizes of real models: correct first, then timed.

Every backend and peer of an op, and its yardstick, is compared with the float64 reference; what fails prints no speed.
The yardstick of a linear op is torch's dense linear with the decoded matrix, that of another op its reference. All are
timed in turns: every round times each once, in alternating order, and a speed-up is the median of the per-round ratios.
On a GPU a graph replays calls over so many copies of the arguments that none is in the cache; on a processor the
clock times them. The yardstick takes part twice: the ratio of the two is the control, which says how far the others can
be believed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch

from effbench import __version__
from effbench.core.errors import first_line
from effbench.machine.capture import CAPTURES
from effbench.machine.ceilings import Ceilings, ceilings
from effbench.machine.clock import timed
from effbench.ops import Case, Declined, LinearOp, Op, convert_tensors, flatten, load
from effbench.records.timings import Quartiles, Row, Timings, finite
from effbench.report.kernels import CONTROL, DENSE, label

ROUNDS = 30
COLD = 2**28  # bytes of arguments that the calls on a GPU rotate over, at least
CACHES = 4  # of the device's cache: the same in multiples of it
PASS = 1e-3  # seconds of calls in a graph, at least, beside which launching it is nothing
SMALL = 2**20  # numbers up to which a case suits a processor; a GPU takes the others

Call = Callable[[], object]


class Contender(NamedTuple):
    """What takes its turn: calls over copies of the arguments, and their graph where there are graphs."""

    row: Row
    calls: list[Call]
    replay: Call | None


def measure(
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    environment: dict[str, Any],
    seconds: float | None = None,
    watch: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> Timings:
    """Rows of every case of these ops that suits the device; after `seconds` no case is begun any more."""
    begin = time.monotonic()
    ceiling = ceilings(device)
    rows: list[Row] = []
    left: list[str] = []
    for op, case in plan_cases(names, device):
        if seconds is not None and time.monotonic() - begin > seconds:
            left.append(f"{op.name} {label(case)}")
            continue
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            fresh = measure_case(op, case, device, dtype, ceiling)
        rows += fresh
        watch(fresh)
    return Timings(
        environment=environment,
        dtype=str(dtype).removeprefix("torch."),
        rounds=ROUNDS,
        ceilings=ceiling,
        rows=rows,
        left_out=left,
    )


def plan_cases(names: Sequence[str], device: torch.device) -> list[tuple[Op, Case]]:
    """The cases that suit the device: the first of every op, then the second of every op, and so on."""
    small = device.type != "cuda"
    suitable = [[(op, case) for case in op.timed if (op.numbers(case) <= SMALL) == small] for op in map(load, names)]
    return [pair for rank in itertools.zip_longest(*suitable) for pair in rank if pair is not None]


def measure_case(op: Op, case: Case, device: torch.device, dtype: torch.dtype, ceiling: Ceilings) -> list[Row]:
    """Rows for the yardstick, every backend (on a processor: the reference) and peer, and the control."""
    inputs = op.arguments(case, device, dtype)
    exact = op.compute_exact(inputs)
    yardstick = DENSE if isinstance(op, LinearOp) else "reference"
    backends = op.backends if device.type == "cuda" else ["reference"]
    names = list(dict.fromkeys((yardstick, *backends, *op.peers)))
    rows, contenders = [], []
    for name in names:
        row = Row(op=op.name, case=dict(case), name=name, version=_find_version(op, name))
        if name in op.peers:
            row.peer, row.note = True, op.peers[name].note
        rows.append(row)
        try:
            if name == DENSE and isinstance(op, LinearOp):
                weight = op.decode(inputs).to(inputs["x"]).contiguous()
                arguments, prepare = {"x": inputs["x"], "weight": weight}, _prepare_dense
                # Its weights are rounded as well as its output.
                tolerance = {kind: 2 * largest for kind, largest in op.tolerance.items()}
                error, row.ok = op.verify_call(prepare(arguments), inputs, exact, tolerance)
                row.bytes = sum(tensor.nbytes for tensor in flatten([*arguments.values()])) + exact[0].to(dtype).nbytes
            else:
                arguments, prepare = inputs, functools.partial(op.prepare, name)
                error, row.ok = op.verify(name, inputs, exact)
                row.bytes = op.bytes(case, dtype)
            row.error = finite(error)
            if row.ok:
                count = count_copies(op, arguments, device, 2 + len(names))
                calls = [prepare(each) for each in copy_arguments(op, arguments, count)]
                contenders.append(_make_ready(row, calls, device))
                row.rotated_bytes = count * _count_cold_bytes(op, arguments)
        except torch.OutOfMemoryError:
            row.absent = "no room on the device"
        except Exception as error:  # whatever somebody's kernel raises, the others go on
            for field, text in describe_failure(error).items():
                setattr(row, field, text)
    if contenders and contenders[0].row.name == yardstick:
        first = rows[0]
        rows.append(
            Row(
                op=first.op,
                case=first.case,
                name=CONTROL[yardstick],
                version=first.version,
                error=first.error,
                ok=first.ok,
                bytes=first.bytes,
            )
        )
        contenders.append(contenders[0]._replace(row=rows[-1]))
    _time(contenders, yardstick, device)
    for contender in contenders:
        _rate(op, contender.row, device, ceiling)
    return rows


def describe_failure(error: Exception) -> dict[str, str]:
    """The field of a row that says why it has no numbers: `absent` for what declined, else `failed`."""
    if isinstance(error, Declined):
        return {"absent": str(error) or "does not take this case"}
    return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def count_copies(op: Op, arguments: Mapping[str, Any], device: torch.device, sharers: int) -> int:
    """How many copies of the arguments the calls rotate over; `sharers` share half of the free memory."""
    size = _count_cold_bytes(op, arguments)
    if device.type != "cuda" or not size:
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    enough = -(-max(COLD, CACHES * cache) // size)
    return max(1, min(enough, torch.cuda.mem_get_info(device)[0] // (2 * sharers) // size))


def copy_arguments(op: Op, arguments: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """The arguments, and copies of those that are not warm where the op is used."""
    cold = _choose_cold(op, arguments)
    return [
        arguments,
        *({**arguments, **convert_tensors(cold, lambda tensor: tensor.clone())} for _ in range(count - 1)),
    ]


# ---- timing ----


def _prepare_dense(arguments: Mapping[str, Any]) -> Call:
    return functools.partial(torch.nn.functional.linear, arguments["x"], arguments["weight"])


def _make_ready(row: Row, calls: list[Call], device: torch.device) -> Contender:
    """Warm, and captured where the device has graphs."""
    _run_all(calls)
    seconds = timed(functools.partial(_run_all, calls), device).wall
    capture = CAPTURES.get(device.type)
    if capture is None:
        return Contender(row, calls, None)
    calls = calls * math.ceil(PASS / seconds)
    return Contender(row, calls, capture(functools.partial(_run_all, calls), device))


def _time(contenders: Sequence[Contender], yardstick: str, device: torch.device) -> None:
    """Set in every row quartiles of its times, in microseconds a call, and of its speed over that of the yardstick."""
    graph: list[list[float]] = []  # seconds a call, round by round, in the order of the contenders
    call: list[list[float]] = []
    graphs = all(contender.replay for contender in contenders)
    for number in range(ROUNDS if contenders else 0):
        step = 1 if number % 2 == 0 else -1
        order = contenders[::step]
        if graphs:
            seconds = _time_in_turns([each.replay for each in order if each.replay], device)
            graph.append([t / len(each.calls) for t, each in zip(seconds, order, strict=True)][::step])
        seconds = [timed(functools.partial(_run_all, each.calls), device).wall for each in order]
        call.append([t / len(each.calls) for t, each in zip(seconds, order, strict=True)][::step])
    for at, (row, *_) in enumerate(contenders):
        if graphs:
            row.graph_us = _quartiles([1e6 * seconds[at] for seconds in graph])
        row.call_us = _quartiles([1e6 * seconds[at] for seconds in call])
        if contenders[0].row.name == yardstick and at > 0:
            row.speedup = _quartiles([seconds[0] / seconds[at] for seconds in (graph if graphs else call)])


def _time_in_turns(replays: Sequence[Call], device: torch.device) -> list[float]:
    """Seconds of each of these, one after the other without a pause."""
    if device.type != "cuda":
        return [timed(replay, device).device for replay in replays]
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(replays) + 1)]
        replays[0]()  # keeps the device busy while the others are launched
        marks[0].record()
        for replay, mark in zip(replays, marks[1:], strict=True):
            replay()
            mark.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(marks)]


def _rate(op: Op, row: Row, device: torch.device, ceiling: Ceilings) -> None:
    """Set what the row attains of the device's ceilings, and whether it reaches the goals for this device."""
    times = row.graph_us or row.call_us
    assert times is not None and row.bytes is not None  # of a contender
    seconds = times.median / 1e6
    row.copy_percent = 100 * row.bytes / seconds / ceiling.copy_bytes_per_s
    row.read_percent = 100 * row.bytes / seconds / ceiling.read_bytes_per_s
    row.matmul_percent = 100 * op.flops(row.case) / seconds / ceiling.matmul_flop_per_s
    if row.name not in op.backends or row.speedup is None:
        return
    reached = {"speedup": row.speedup.median, "copy_percent": row.copy_percent}
    for goal in op.goals:
        here = device.type == "cuda" and goal.device in torch.cuda.get_device_name(device)
        if here and row.case["batch"] == goal.batch and row.bytes >= goal.least_bytes:
            row.goals = {
                level: all(reached[figure] >= least for figure, least in goal._asdict()[level].items())
                for level in ("must", "target")
            }


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _quartiles(values: Sequence[float]) -> Quartiles:
    return Quartiles(*statistics.quantiles(values, n=4))


def _choose_cold(op: Op, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are read from memory where the op is used."""
    return {name: value for name, value in arguments.items() if name not in op.warm}


def _count_cold_bytes(op: Op, arguments: Mapping[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in flatten([*_choose_cold(op, arguments).values()]))


def _find_version(op: Op, name: str) -> str | None:
    if name == DENSE:
        return str(torch.__version__)
    if name not in op.peers:
        return __version__
    try:
        return metadata.version(op.peers[name].package)
    except metadata.PackageNotFoundError:
        return None
