"""What a device attains at most, measured where and when it is used: data sheets promise more."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from effbench.machine.capture import capture
from effbench.machine.clock import timed
from effbench.records.timings import Ceilings as Ceilings

BUFFER = {"cpu": 2**28, "cuda": 2**30}  # bytes copied and read
PATTERN = 2**18  # random numbers that fill a buffer by repetition
MATMUL = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}  # rows = columns, and what they hold
NODES = 512  # of the graph that does next to nothing
REPEATS = 5  # at least
SECONDS = {"cpu": 0.0, "cuda": 0.25}  # at least: clocks have to rise first


@functools.cache
def ceilings(device: torch.device) -> Ceilings:
    """Measure, once in a process. All data are random: a GPU multiplies zeros faster than anything it will be given."""
    generator = torch.Generator(device).manual_seed(0)  # the run's own numbers stay what they are
    pattern = torch.rand(PATTERN, device=device, generator=generator)
    copy, read = _memory(pattern)
    side, dtype = MATMUL[_kind(device)]
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = _best(lambda: left @ right, device)
    return Ceilings(
        copy_bytes_per_s=copy,
        read_bytes_per_s=read,
        matmul_flop_per_s=2 * side**3 / product,
        matmul_dtype=str(dtype).removeprefix("torch."),
        graph_node_s=_graph_node(pattern[:1]) if device.type == "cuda" else None,
    )


def described(device: torch.device) -> str:
    """How memory was measured, for protocols."""
    return f"{BUFFER[_kind(device)] >> 20} MiB of random numbers, best of {REPEATS} or more"


def _memory(pattern: Tensor) -> tuple[float, float]:
    """Bytes/s of copying and of reading; the buffers are gone afterwards."""
    device = pattern.device
    source = pattern.repeat(BUFFER[_kind(device)] // (PATTERN * pattern.element_size()))
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    return 2 * size / _best(lambda: target.copy_(source), device), size / _best(lambda: source.sum(), device)


def _graph_node(number: Tensor) -> float:
    """Seconds that a node takes which has almost nothing to do."""

    def nodes() -> None:
        for _ in range(NODES):
            number.add_(1)

    return _best(capture(nodes, number.device), number.device) / NODES


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, by the device's clock."""
    seconds: list[float] = []
    until = time.perf_counter() + SECONDS[_kind(device)]
    while len(seconds) < REPEATS or time.perf_counter() < until:
        seconds.append(timed(work, device).device)
    return min(seconds)


def _kind(device: torch.device) -> str:
    return device.type if device.type in BUFFER else "cpu"
