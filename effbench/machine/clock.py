"""The clock of everything that is timed: the device's own, and the wall's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Span(NamedTuple):
    """Seconds of one piece of work; on a processor both are the same."""

    device: float  # between two events on the device's stream
    wall: float  # from an idle device to an idle device, launching included

    def per(self, steps: int) -> Span:
        """Seconds of each of `steps` alike."""
        return Span(self.device / steps, self.wall / steps)


def timed(work: Callable[[], object], device: torch.device) -> Span:
    """How long `work` took."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        took = time.perf_counter() - begin
        return Span(took, took)
    with torch.cuda.device(device):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        begun.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        return Span(begun.elapsed_time(ended) / 1000, time.perf_counter() - begin)
