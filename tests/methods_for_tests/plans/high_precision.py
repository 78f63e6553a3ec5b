"""Claims the precision of the next fit."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.kinds import Train


@dataclass(frozen=True)
class HighPrecision(Train):
    """For tests of conflicts."""

    claims = ("train.precision",)
