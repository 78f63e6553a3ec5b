"""The most memory held while something ran, above what was held when it began."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from effbench.machine import nvml

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


SAMPLED = 0.015  # seconds
SCOPES = {  # what a peak counts, by the word for it in the metric's name
    "allocated": "what torch's allocator handed out",
    "reserved": "what torch's allocator took from the device",
    "process": f"what the process holds of the device by NVML, looked at every {1000 * SAMPLED:g} ms",
    "rss": "the process's resident set",
}


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` leaves high-water marks minus the start in `peak.bytes`.

    Keys are words of `SCOPES`; what cannot be read is absent. The marks belong to the process, so one such block must
    not stand inside another.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: dict[str, int] = {}
        self._start: dict[str, int] = {}
        self._process = _Samples(functools.partial(nvml.process_bytes, device))

    def __enter__(self) -> Self:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._process.start()
        elif not _reset_high_water():
            return self
        self._start = self._read()
        return self

    def __exit__(
        self, raised: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self._process.stop()
        if self._start:
            peak = self._read()
            self.bytes = {name: max(0, peak[name] - start) for name, start in self._start.items()}

    def _read(self) -> dict[str, int]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            process = self._process.highest
            return {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            } | ({} if process is None else {"process": process})
        return {"rss": _high_water()}


class _Samples(threading.Thread):
    """The highest of what `read` gives from `start` to `stop`; None as long as it gives nothing."""

    def __init__(self, read: Callable[[], int | None]) -> None:
        super().__init__(daemon=True)
        self.highest: int | None = None
        self._read = read
        self._over = threading.Event()

    def start(self) -> None:
        self._look()
        super().start()

    def run(self) -> None:
        while not self._over.wait(SAMPLED):
            self._look()

    def stop(self) -> None:
        """End the thread after a last look."""
        self._over.set()
        self.join()
        self._look()

    def _look(self) -> None:
        size = self._read()
        if size is not None:
            self.highest = size if self.highest is None else max(self.highest, size)


def _reset_high_water() -> bool:
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # pages the allocator keeps would be used again and not be seen
        libc.malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _high_water() -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
