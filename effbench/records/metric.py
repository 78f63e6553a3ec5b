"""One measured number. Probes import this and nothing else of the record."""

from __future__ import annotations

import msgspec

Finding = bool | int | float | str


class Metric(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One measured number; its unit is the end of its name. `low` and `high` bound a 95 % interval.

    `n` is the number of items, windows or rounds behind it. `findings` are what the measurement itself turned out to
    be: how many calls it took to warm up, whether it was stopped by its cap. What was chosen before is the protocol.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    findings: dict[str, Finding] = {}
