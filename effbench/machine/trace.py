"""What a call spends its time on: a short trace by torch's profiler, by kinds of kernels and by our own ops."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType

NAMESPACE = "effbench::"
KINDS = {  # by the first that is found in the name of an op or of a kernel
    "attention": r"attention|flash|fmha|sdpa",
    "matmul": r"gemm|gemv|matmul|\bmm\b|\bbmm\b|addmm|baddbmm|linear|cutlass|wgmma|xmma|nvjet|splitK",
    "copy": r"copy|memcpy|\bto\b|\bcat\b|clone|contiguous",
}
OTHER = "other"


@dataclasses.dataclass
class OpTrace:
    """One of our ops in a trace."""

    seconds: float = 0.0  # with all that it called
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)  # device kernels that it launched


@dataclasses.dataclass
class Trace:
    """One call. Seconds are of the device where it is an accelerator, else of the processor."""

    ops: dict[str, OpTrace] = dataclasses.field(default_factory=dict)  # by name, without the namespace
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)  # seconds of all that stands in no op of ours

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(op.seconds for op in self.ops.values()) + sum(self.kinds.values())


def trace(call: Callable[[], Any], device: torch.device) -> Trace:
    """Run a call under the profiler."""
    from torch.profiler import ProfilerActivity, profile

    accelerated = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accelerated else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        if accelerated:
            torch.cuda.synchronize(device)
    return sort_events(profiler.events(), accelerated)


def sort_events(events: Iterable[Any], accelerated: bool) -> Trace:
    """A trace from the profiler's events, each with its own time once.

    Kernels belong to the op of the processor that launched them, which may stand within one of ours.
    """
    found = Trace()
    for event in events:
        if accelerated and event.device_type == DeviceType.CUDA:
            continue  # counted with the op that launched it
        seconds = 1e-6 * (event.self_device_time_total if accelerated else event.self_cpu_time_total)
        ours = _find_op(event)
        if ours:
            op = found.ops.setdefault(ours, OpTrace())
            op.seconds += seconds
            op.kernels.update(kernel.name for kernel in event.kernels)
        elif seconds:
            found.kinds[find_kind([kernel.name for kernel in event.kernels] or [event.name])] += seconds
    return found


def find_kind(names: Iterable[str]) -> str:
    """The kind of the first name that has one."""
    for name in names:
        for kind, pattern in KINDS.items():
            if re.search(pattern, name, re.IGNORECASE):
                return kind
    return OTHER


def _find_op(event: Any) -> str:
    """The outermost op of ours that an event stands in, without the namespace; empty where it stands in none."""
    found = ""
    while event is not None:
        if event.name.startswith(NAMESPACE):
            found = event.name.removeprefix(NAMESPACE)
        event = event.cpu_parent
    return found
