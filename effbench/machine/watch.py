"""What a device was doing around timed work, and who else was on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from effbench.machine import nvml
from effbench.records.metric import Finding

EVERY = 0.5  # seconds between looks: one takes about a millisecond of the host
USUAL = ("gpu_idle", "applications_clocks_setting")  # clocks held back by nothing that matters


class Watch:
    """Looks at the device before, between and after timed calls, never within one.

    `rows` are what NVML said, each with its second `t` since the start; none where it says nothing.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.rows: list[dict[str, Any]] = []
        self._device = device
        self._clock = clock
        self._begin = self._last = clock()
        self.look()

    def look(self) -> None:
        """Note the state of the device."""
        self._last = self._clock()
        state = nvml.state(self._device)
        if state:
            self.rows.append({"t": round(self._last - self._begin, 2)} | state)

    def glance(self) -> None:
        """Look, if the last look is long ago."""
        if self._clock() - self._last >= EVERY:
            self.look()

    def findings(self) -> dict[str, Finding]:
        """What a reader of the numbers has to know of the device, as `device_state`; empty when nothing was seen."""
        reasons = dict.fromkeys(name for row in self.rows for name in row.get("clocks_held_by", ()))
        held = [name for name in reasons if name not in USUAL]
        others = max((row.get("other_processes", 0) for row in self.rows), default=0)
        said = [f"clocks held back by {', '.join(held)}"] if held else []
        if any(row.get("mig_instance") for row in self.rows):
            said.append("on one MIG instance, whose clocks and power NVML does not tell")
        if others:
            held_mib = max(row.get("other_processes_mib", 0) for row in self.rows)
            holding = f", holding {held_mib} MiB" if held_mib else ""
            said.append(f"beside {others} other process{'es' * (others > 1)} on the device{holding}")
        return {"device_state": ", ".join(said)} if said else {}
