"""Where the uncertainty of a mean comes from: the items, the seeds, or both together; and what more would buy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from effbench.stats.paired import Floats

DETECTED = 2.802  # standard errors that a test at 5 % sees in 80 of 100 repeats: the normal quantiles of .975 and .8


class Components(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Variances of one value, in squared units of the value: of items, of seeds, and of an item at a seed.

    With one seed that of seeds is not seen, and stands as 0.
    """

    items: float  # over tasks: a mean over `n` items of each task has this over n
    seeds: float
    both: float
    n: float  # items of a task, the harmonic mean over tasks
    runs: int  # seeds

    def foretell(self, items: float = 1.0, seeds: float = 1.0) -> float:
        """The variance of the mean with so many times the items and the seeds."""
        n, runs = self.n * items, self.runs * seeds
        return self.items / n + self.seeds / runs + self.both / (n * runs)

    @property
    def detectable(self) -> float:
        """The smallest mean that a test at 5 % would tell from zero in four of five repeats."""
        return DETECTED * math.sqrt(self.foretell())

    @property
    def from_seeds(self) -> float:
        """The share of the mean's variance that more seeds would take away, from 0 to 1."""
        whole = self.foretell()
        return (self.seeds + self.both / self.n) / self.runs / whole if whole > 0 else 0.0

    def narrow(self, items: float = 1.0, seeds: float = 1.0) -> float:
        """By what share the interval becomes shorter with so many times the items and the seeds."""
        whole = self.foretell()
        return 1 - math.sqrt(self.foretell(items, seeds) / whole) if whole > 0 else 0.0


def split_variance(strata: Sequence[Floats]) -> Components | None:
    """The components of values [seeds, items] of each task, which weigh alike; None where a task has a single item.

    Crossed random effects, one value in a cell: expected mean squares of a two-way layout without replication
    (Searle, Casella and McCulloch, Variance Components, 1992, ch. 4). A component that comes out negative is 0.
    Raises `ValueError` for no task or tasks of unlike seeds.
    """
    tables = [np.asarray(values, dtype=np.float64) for values in strata]
    if not tables or len({len(table) for table in tables}) > 1:
        raise ValueError("tasks of the same seeds are needed")
    runs, tasks = len(tables[0]), len(tables)
    if min(table.shape[1] for table in tables) < 2:
        return None
    n = tasks / sum(1 / table.shape[1] for table in tables)
    items = both = 0.0
    for table in tables:
        weight = n / table.shape[1] / tasks**2  # so that a mean over tasks of n items each has what these tasks have
        means, of_both = table.mean(axis=0), 0.0
        if runs > 1:
            inner = table - table.mean(axis=1, keepdims=True) - means + means.mean()
            of_both = float((inner**2).sum()) / (runs - 1) / (table.shape[1] - 1)
        both += weight * of_both
        items += weight * max(0.0, float(means.var(ddof=1)) - of_both / runs)
    seeds = 0.0
    if runs > 1:
        of_seeds = np.mean([table.mean(axis=1) for table in tables], axis=0)
        seeds = max(0.0, float(of_seeds.var(ddof=1)) - both / n)
    items, seeds, both, n = (float(f"{value:.4g}") for value in (items, seeds, both, n))
    return Components(items, seeds, both, n, runs)
