"""Kernels beside each other at the sizes of real models: correct first, then timed.

Every backend and peer of an op, and torch's dense linear with the decoded matrix, is compared with the float64
reference; what fails prints no speed. The others are timed in turns: every round times each once, in alternating
order, and a speed-up is the median of the per-round ratios. On a GPU a graph replays calls over so many copies of the
weights that none is found in the cache; on a processor the clock times them. The dense linear takes part twice: the
ratio of the two is the control, which says how far the others can be believed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effbench import __version__
from effbench.cells.options import DTYPES
from effbench.core.errors import Usage
from effbench.core.usage import one_of
from effbench.kernels._common.compiled import compiled
from effbench.kernels._common.launch import recording
from effbench.machine.capture import CAPTURES
from effbench.machine.ceilings import Ceilings, ceilings
from effbench.machine.clock import timed
from effbench.machine.environment import describe
from effbench.machine.placement import place
from effbench.ops import Case, Declined, Op, deviation, load, ops
from effbench.report.kernels import CONTROL, DENSE, SCHEMA, compiled_page, label, page, red

ROUNDS = 30
COLD = 2**28  # bytes of weights that the calls on a GPU rotate over, at least
CACHES = 4  # of the device's cache: the same in multiples of it
PASS = 1e-3  # seconds of calls in a graph, at least, beside which launching it is nothing
SMALL = 2**20  # weights up to which a case suits a processor; a GPU takes the others

Row = dict[str, Any]
Call = Callable[[], object]


class Contender(NamedTuple):
    """What takes its turn: calls over copies of the weights, and their graph where there are graphs."""

    row: Row
    calls: list[Callable[[], Tensor]]
    replay: Call | None


def main(options: Mapping[str, Any]) -> int:
    """`effbench bench [op=NAME] [device=] [dtype=] [seconds=] [out=FILE] [--compile] [--json]`.

    Prints a table and gives 1 when a backend failed or was not correct. Raises `Usage`.
    """
    names = [load(options["op"]).name] if options["op"] else ops()
    seconds = options["seconds"]
    if options["compile"]:
        for name in ("device", "dtype", "seconds"):
            if options[name] is not None:
                raise Usage(f"{name}={options[name]}: not with --compile, which compiles for sm_90 and runs nothing")
    elif seconds is not None and not seconds > 0:
        raise Usage(f"seconds={seconds}: must be above 0")
    one_of("dtype", options["dtype"], DTYPES)
    placed = "cpu" if options["compile"] else place(options["device"]).device
    device = torch.device(placed.split(",")[0])  # of several, the first
    facts = describe(str(device))
    path = _target(options["out"], str(facts["machine"]))
    if options["compile"]:
        document: dict[str, Any] = {"schema": SCHEMA, "environment": facts, "compiled": compile_cases(names)}
        text = compiled_page(document)
    else:
        dtype = getattr(torch, options["dtype"] or ("bfloat16" if device.type == "cuda" else "float32"))
        document = {"schema": SCHEMA, "environment": facts, **measure(names, device, dtype, seconds, _tell)}
        text = page(document)
    if path is not None:
        _write(path, document)
    print(json.dumps(document, indent=1) if options["json"] else text, end="\n" if options["json"] else "")
    return int(red(document))


def measure(
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float | None = None,
    watch: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> dict[str, Any]:
    """Rows of every case of these ops that suits the device; after `seconds` no case is begun any more."""
    begin = time.monotonic()
    found = ceilings(device)
    rows: list[Row] = []
    left: list[str] = []
    for op, case in planned(names, device):
        if seconds is not None and time.monotonic() - begin > seconds:
            left.append(f"{op.name} {label(case)}")
            continue
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            fresh = measured(op, case, device, dtype, found)
        rows += fresh
        watch(fresh)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": ROUNDS,
        "ceilings": dataclasses.asdict(found),
        "rows": rows,
        "left_out": left,
    }


def planned(names: Sequence[str], device: torch.device) -> list[tuple[Op, Case]]:
    """The cases that suit the device: the first of every op, then the second of every op, and so on."""
    small = device.type != "cuda"
    found = [[(op, case) for case in op.timed if (_weights(case) <= SMALL) == small] for op in map(load, names)]
    return [pair for rank in itertools.zip_longest(*found) for pair in rank if pair is not None]


def measured(op: Op, case: Case, device: torch.device, dtype: torch.dtype, ceiling: Ceilings) -> list[Row]:
    """Rows for the dense linear, every backend (on a processor: the reference) and peer, and the control."""
    inputs = op.arguments(case, device, dtype)
    exact = op.exact(inputs)
    identity = torch.eye(case["in_features"], device=device)
    weight = op.reference(**inputs | {"x": identity}).T.to(dtype).contiguous()  # [out, in]
    dense = {"x": inputs["x"], "weight": weight}
    backends = op.backends if device.type == "cuda" else ["reference"]
    rows, contenders = [], []
    for name in (DENSE, *backends, *op.peers):
        row: Row = {"op": op.name, "case": dict(case), "name": name, "version": _version(op, name)}
        rows.append(row)
        arguments = dense if name == DENSE else inputs
        prepare = functools.partial(_prepared, op, name)
        try:
            if name == DENSE:  # its weights are rounded as well as its output
                error = deviation(prepare(dense), exact, dtype)
                row["ok"] = error <= 2 * op.tolerance[str(dtype).removeprefix("torch.")]
                row["bytes"] = sum(tensor.nbytes for tensor in (*dense.values(), exact.to(dtype)))
            else:
                error, row["ok"] = op.verify(name, inputs, exact)
                row["bytes"] = op.bytes(case, dtype)
            row["error"] = error if math.isfinite(error) else str(error)
            if row["ok"]:
                count = copies(arguments, device, 2 + len(backends) + len(op.peers))
                contenders.append(_ready(row, [prepare(each) for each in _copied(arguments, count)], device))
                row["rotated_bytes"] = count * _stored(arguments)
        except Declined as reason:
            row["absent"] = str(reason) or "does not take this case"
        except torch.OutOfMemoryError:
            row["absent"] = "no room on the device"
        except Exception as error:  # whatever somebody's kernel raises, the others go on
            row["failed"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if name in op.peers:
            row |= {"peer": True, "note": op.peers[name].note}
    if contenders and contenders[0].row["name"] == DENSE:
        control = {key: rows[0][key] for key in ("op", "case", "version", "error", "ok", "bytes")} | {"name": CONTROL}
        rows.append(control)
        contenders.append(contenders[0]._replace(row=control))
    _time(contenders, device)
    for row in (contender.row for contender in contenders):
        _rate(op, row, device, ceiling)
    return rows


def copies(arguments: Mapping[str, Any], device: torch.device, sharers: int) -> int:
    """How many copies of the weights the calls rotate over; `sharers` share half of the free memory."""
    size = _stored(arguments)
    if device.type != "cuda" or not size:
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = -(-max(COLD, CACHES * cache) // size)
    return max(1, min(wanted, torch.cuda.mem_get_info(device)[0] // (2 * sharers) // size))


def compile_cases(names: Sequence[str]) -> list[Row]:
    """What every backend would launch for its timed cases on a GPU, compiled for sm_90 without one."""
    rows: list[Row] = []
    for op, case in planned(names, torch.device("cuda")):
        for backend in op.backends:
            row: Row = {"op": op.name, "case": dict(case), "name": backend}
            try:
                with recording() as launches:
                    op.run(backend, **op.described(case, torch.bfloat16))
                for launch in launches:
                    found = compiled(launch)
                    rows.append(found._asdict() | row | {"kernel": found.name})
                if not launches:
                    rows.append(row | {"absent": "launches no kernel of ours"})
            except Declined as reason:
                rows.append(row | {"absent": str(reason) or "does not take this case"})
            except Exception as error:  # the compiler's, too
                rows.append(row | {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"})
    return rows


# ---- timing ----


def _prepared(op: Op, name: str, arguments: Mapping[str, Any]) -> Callable[[], Tensor]:
    if name == DENSE:
        return functools.partial(torch.nn.functional.linear, arguments["x"], arguments["weight"])
    return op.prepared(name, arguments)


def _copied(arguments: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """The arguments, and copies of all but x: activations are warm where they are used."""
    more = [
        {
            name: value.clone() if name != "x" and isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        for _ in range(count - 1)
    ]
    return [arguments, *more]


def _ready(row: Row, calls: list[Callable[[], Tensor]], device: torch.device) -> Contender:
    """Warm, and captured where the device has graphs."""
    _all(calls)
    took = timed(functools.partial(_all, calls), device).wall
    capture = CAPTURES.get(device.type)
    if capture is None:
        return Contender(row, calls, None)
    calls = calls * math.ceil(PASS / took)
    return Contender(row, calls, capture(functools.partial(_all, calls), device))


def _time(contenders: Sequence[Contender], device: torch.device) -> None:
    """Add to every row quartiles of its times, in microseconds a call, and of its speed over that of dense."""
    seconds: dict[str, list[list[float]]] = {"graph": [], "call": []}  # round by round, in the order of the contenders
    graphs = all(contender.replay for contender in contenders)
    for number in range(ROUNDS if contenders else 0):
        step = 1 if number % 2 == 0 else -1
        order = contenders[::step]
        if graphs:
            took = _in_turns([each.replay for each in order if each.replay], device)
            seconds["graph"].append([t / len(each.calls) for t, each in zip(took, order, strict=True)][::step])
        took = [timed(functools.partial(_all, each.calls), device).wall for each in order]
        seconds["call"].append([t / len(each.calls) for t, each in zip(took, order, strict=True)][::step])
    main = seconds["graph" if graphs else "call"]
    for at, (row, *_) in enumerate(contenders):
        for name, rounds in seconds.items():
            if rounds:
                row[f"{name}_us"] = _quartiles([1e6 * times[at] for times in rounds])
        if contenders[0].row["name"] == DENSE and at > 0:
            row["dense_speedup"] = _quartiles([times[0] / times[at] for times in main])


def _in_turns(replays: Sequence[Call], device: torch.device) -> list[float]:
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
    """Add what the row attains of the device's ceilings, and whether it reaches the goals for this device."""
    took = (row.get("graph_us") or row["call_us"])["median"] / 1e6
    row["copy_percent"] = 100 * row["bytes"] / took / ceiling.copy_bytes_per_s
    row["read_percent"] = 100 * row["bytes"] / took / ceiling.read_bytes_per_s
    row["matmul_percent"] = 100 * op.flops(row["case"]) / took / ceiling.matmul_flop_per_s
    if row["name"] not in op.backends or "dense_speedup" not in row:
        return
    reached = {"dense_speedup": row["dense_speedup"]["median"], "copy_percent": row["copy_percent"]}
    for goal in op.goals:
        here = device.type == "cuda" and goal.device in torch.cuda.get_device_name(device)
        if here and row["case"]["batch"] == goal.batch and row["bytes"] >= goal.least_bytes:
            row["goals"] = {
                level: all(reached[figure] >= least for figure, least in goal._asdict()[level].items())
                for level in ("must", "target")
            }


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("p25", "median", "p75"), statistics.quantiles(values, n=4), strict=True))


def _stored(arguments: Mapping[str, Any]) -> int:
    """Bytes of all tensors but x."""
    return sum(value.nbytes for name, value in arguments.items() if name != "x" and isinstance(value, Tensor))


def _weights(case: Case) -> int:
    return int(case["in_features"] * case.get("out_features", case["in_features"]))


def _version(op: Op, name: str) -> str | None:
    if name == DENSE:
        return torch.__version__
    if name not in op.peers:
        return __version__
    try:
        return metadata.version(op.peers[name].package)
    except metadata.PackageNotFoundError:
        return None


# ---- the document ----


def _tell(rows: Sequence[Row]) -> None:
    """A line of progress on stderr, for who waits."""
    speeds = [f"{row['name']} {row['dense_speedup']['median']:.2f}x" for row in rows if "dense_speedup" in row]
    print(f"{rows[0]['op']} {label(rows[0]['case'])}: {', '.join(speeds)}", file=sys.stderr, flush=True)


def _target(out: str | None, machine: str) -> Path | None:
    """The file to write, `out` or in that folder one named for the machine. Raises `Usage` where there is one."""
    if out is None:
        return None
    path = Path(out).expanduser()
    path = path if path.suffix == ".json" else path / f"{machine}.json"
    if path.exists():
        raise Usage(f"out={out}: {path} exists and is not overwritten; name another file")
    return path


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(path)
