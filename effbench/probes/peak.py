"""The most memory held while something ran, above what was held when it began."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """`with PeakMemory(device) as peak: ...` leaves high-water marks minus the start in `peak.bytes`.

    Keys are what was watched: `allocated` and `reserved` (torch's allocator on CUDA, not what other libraries
    take) or `rss` (resident set of this process on Linux). Nothing where neither can be read. The marks
    belong to the process, so one such block must not stand inside another.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: dict[str, int] = {}
        self._start: dict[str, int] = {}

    @property
    def value(self) -> int | None:
        """The figure for tables: allocated bytes on CUDA, resident bytes on CPU."""
        return self.bytes.get(kind(self.device))

    def __enter__(self) -> Self:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif not _reset_high_water():
            return self
        self._start = self._read()
        return self

    def __exit__(
        self, raised: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._start:
            peak = self._read()
            self.bytes = {name: max(0, peak[name] - start) for name, start in self._start.items()}

    def _read(self) -> dict[str, int]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        return {"rss": _high_water()}


def kind(device: torch.device) -> str:
    """What the main figure on this device counts, as metric names spell it."""
    return "allocated" if device.type == "cuda" else "rss"


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
