"""Prefix tuning: trainable keys and values in front of every layer's attention (Li & Liang, 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.methods.peft._prefix import Prefixes


@dataclass(frozen=True)
class PrefixTuning(Prefixes):
    """The prefix is made by an MLP while it is trained (equation 5), which is dropped after; what was made stays."""

    paper = "arXiv:2101.00190"
    published = "prefix_tuning(length=10, hidden=512), fit(lr=5e-05, schedule='linear')"
    caveats = ("length 10 is the paper's for table-to-text, where it is tuned per task",)
    reparametrized = True
