"""Depends on a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from effbench.core.kinds import Weights
from effbench.nn.calibration import Layer


@dataclass(frozen=True)
class ReadsFile(Weights):
    """For tests of identities."""

    path: str = ""

    def files(self) -> tuple[Path, ...]:
        return (Path(self.path),)

    def compress(self, layer: Layer) -> nn.Module:
        return layer.module
