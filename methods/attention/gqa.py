"""GQA: heads of queries share keys and values, pooled from those that were trained (Ainslie et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.core.method import Method
from effbench.core.run import Run
from effbench.methods.attention._pool import Pool, pool_heads


@dataclass(frozen=True)
class GQA(Method):
    """Section 2.2: heads of queries are divided into groups, each of which shares one head of keys and of values. Its
    projections are the mean of those of the group's own heads (section 2.1). Queries and the output stay.

    A `fit` behind it is the paper's uptraining. A model that has grouped queries already has fewer of them afterwards.
    Caches shrink to `kv_heads` of the heads that were there.
    """

    paper = "arXiv:2305.13245"
    caveats = ("the paper converts T5, and trains it on for 5 % of the steps of its pre-training",)
    type = "attention"
    weight_update = "pooling"
    settles = True
    trials = ({}, {"kv_heads": 2, "pool": "first"}, {"pool": "random"})

    # Heads of keys and values that are left. None: a quarter of those that there are, or where that does not divide
    # them the next smaller number that does.
    kv_heads: int | None = None
    pool: Pool = "mean"  # what a group's head is: the mean of its heads, the first of them, or one drawn at random

    def check(self) -> None:
        self.require(self.kv_heads is None or self.kv_heads >= 1, "kv_heads must be at least 1")

    def apply(self, run: Run) -> None:
        pool_heads(run, self, self.kv_heads, self.pool)
