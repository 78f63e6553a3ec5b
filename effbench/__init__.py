"""effbench: what does an efficiency method for language models cost, and what does it buy?

>>> import effbench
>>> table = effbench.records(suite="quant", tier="quick")  # a pandas data frame, a row a record
>>> items = effbench.samples("kl_nats_per_token", suite="quant")  # a row an item
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__version__ = "0.1.0"

FRAME = "effbench.report.frame"  # by name and late: all packages of effbench stand below this one


def records(
    results: str | PathLike[str] | None = None,
    *,
    suite: str | None = None,
    tier: str | None = None,
    model: str | None = None,
    recipe: str | Sequence[str] | None = None,
    outcome: str | None = None,
    intervals: bool = False,
) -> pd.DataFrame:
    """Records as a data frame, a row for the last attempt at every cell.

    results    folder of records; by default `runs` where it has any, else the published ones
    suite, tier, model, outcome    only records of that name
    recipe     only recipes of that name or those steps: names or patterns such as `gptq*`
    intervals  add `<metric>_low`, `<metric>_high` (95 %) and `<metric>_n` (items) beside every metric

    Columns are `suite, suite_version, tier, recipe, steps, model, data, seed, outcome, reason, simulated, imported,
    machine, host, started, seconds, record` and then a number for each metric, by its name and in the unit at its end
    (shares from 0 to 1); NaN where a record lacks it. Failures are rows too: choose `outcome="ok"` to leave them out.
    Rows may be compared where suite, version, tier, model, data and host are equal, and imported rows with none that
    were measured here. What cannot be read is warned of. Raises `effbench.core.errors.Usage` where no record fits.
    """
    frame: pd.DataFrame = importlib.import_module(FRAME).make_records(
        results, suite=suite, tier=tier, model=model, recipe=recipe, outcome=outcome, intervals=intervals
    )
    return frame


def samples(
    name: str,
    results: str | PathLike[str] | None = None,
    *,
    suite: str | None = None,
    tier: str | None = None,
    model: str | None = None,
    recipe: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    """Results per item, or the single timings, of all records that have them, a row an item.

    name  as in the record's `samples`: the metric, `token_ppl_window_nll` (nats a window), or timings such as
          `decode_seconds_b1_c128`

    Columns are `suite, suite_version, tier, recipe, model, seed, item` and `value`, or `value_0, value_1 ...` where an
    item is several numbers. Items of equal number are the same question or window where records have equal
    protocols, so differences between recipes can be paired. Other arguments are those of `records`. Raises
    `effbench.core.errors.Usage` where no record has such samples.
    """
    frame: pd.DataFrame = importlib.import_module(FRAME).make_samples(
        name, results, suite=suite, tier=tier, model=model, recipe=recipe
    )
    return frame


class _Records(ModuleType):
    """The package `effbench.records`, which can be called like the function of its name."""

    def __call__(self, *arguments: Any, **options: Any) -> pd.DataFrame:
        return _read(*arguments, **options)


class _Root(ModuleType):
    """This package. Importing its part `records` puts a module in the place of the function: it can be called too."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "records" and type(value) is ModuleType:
            value.__class__ = _Records
            value.__doc__ = _read.__doc__
        super().__setattr__(name, value)


_read = records
sys.modules[__name__].__class__ = _Root
