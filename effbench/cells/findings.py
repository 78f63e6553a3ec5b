"""What a cell has measured so far: readings, failures, and the phase it is in."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from effbench.cells.failures import Failure, broken, diagnose
from effbench.machine.gate import Tell
from effbench.records.metric import Metric
from effbench.records.record import OutcomeName

if TYPE_CHECKING:
    from effbench.probes import Reading

# The outcome of a cell with several failures is the last of these.
SEVERITY: tuple[OutcomeName, ...] = ("refused", "unsupported", "diverged", "unavailable", "oom", "crashed")


QUIET = 1.0  # seconds between two reports of progress


class Findings:
    """What a cell has measured so far: readings, failures, and the phase it is in."""

    def __init__(self, tell: Tell, device: str) -> None:
        self.metrics: dict[str, Metric] = {}
        self.samples: dict[str, list[Any]] = {}
        self.protocols: dict[str, str] = {}
        self.seconds: dict[str, float] = {}  # by phase
        self.shortfall: dict[str, Any] = {}  # of the first lack of memory: its phase and the bytes
        self.over = False  # whether nothing more can be computed in this process
        self._tell = tell
        self._device = device
        self.phase = ""  # what goes on
        self._since = self._told = time.monotonic()
        self._reasons: dict[tuple[OutcomeName, str], list[str]] = {}  # (outcome, reason): phases
        self._tracebacks: list[str] = []

    def enter(self, phase: str) -> None:
        """Close the phase before and open another; an empty name opens none."""
        now = time.monotonic()
        if self.phase:
            self.seconds[self.phase] = round(self.seconds.get(self.phase, 0.0) + now - self._since, 3)
        self.phase, self._since = phase, now
        if phase:
            self._tell(phase=phase)

    def progress(self, unit: str, done: int, total: int) -> None:
        """Tell how far the current phase has come, not more than once in `QUIET` seconds."""
        now = time.monotonic()
        if now - self._told >= QUIET:
            self._told = now
            self._tell(progress=(unit, done, total))

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn an exception into a failure of the current phase."""
        try:
            yield
        except (Exception, SystemExit) as error:
            failure, why = diagnose(error), broken(self._device)
            if why:
                self.over = True
                causes = failure.reason if why in failure.reason else f"{failure.reason}; {why}"
                reason = f"{causes}: after this the process can compute nothing more on {self._device}"
                failure = dataclasses.replace(failure, outcome="crashed", reason=reason)
            self.fail(failure)

    def fail(self, failure: Failure) -> None:
        """Note a failure of the current phase."""
        self._reasons.setdefault((failure.outcome, failure.reason), []).append(self.phase)
        self._tracebacks += [failure.traceback] if failure.traceback else []
        if failure.outcome == "oom" and not self.shortfall:
            self.shortfall = {"phase": self.phase, **failure.shortfall}

    def add(self, reading: Reading) -> None:
        """Take in a reading and its failures; a number that is not finite is a failure instead."""
        for error in reading.failures:
            self.fail(diagnose(error))
        for name, metric in reading.metrics.items():
            if math.isfinite(metric.value):
                self.metrics[name] = metric
            else:
                self.fail(Failure("diverged", f"{name} is not finite"))
        self.samples |= reading.samples
        self.protocols |= reading.protocols

    @property
    def outcome(self) -> OutcomeName:
        """`ok`, or the worst failure."""
        return max((outcome for outcome, _ in self._reasons), key=SEVERITY.index, default="ok")

    @property
    def reason(self) -> str:
        """Every failure with the phases it happened in."""
        return "; ".join(f"{', '.join(phases)}: {reason}" for (_, reason), phases in self._reasons.items())

    @property
    def traceback(self) -> str:
        """Tracebacks of crashes."""
        return "\n".join(self._tracebacks)
