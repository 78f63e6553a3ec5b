"""MQA: one head of keys and values for all heads of queries (Shazeer, 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run
from effbench.methods.attention._pool import Pool, pool_heads


@dataclass(frozen=True)
class MQA(Method):
    """What `gqa(kv_heads=1)` is: a trained model is converted as Ainslie et al. (2023) do it."""

    paper = "arXiv:1911.02150"
    caveats = ("the paper trains models that have one head from the start, and converts none",)
    type = "attention"
    weight_update = "pooling"
    settles = True
    trials = ({}, {"pool": "first"})

    pool: Pool = "mean"  # what the head is: the mean of all heads, the first of them, or one drawn at random

    def apply(self, run: Run) -> None:
        pool_heads(run, self, 1, self.pool)
