"""What the last selection of the recipe kept of the pool, and what it cost: read from the log that the run kept."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.nn.train.examples import measure_losses
from effbench.probes import Reading

if TYPE_CHECKING:
    from effbench.core.run import SelectionReport
    from effbench.nn.run import ModelRun

SEES = {"weights", "cache", "attention", "prompt", "decoder"}
SAMPLED = 200  # examples of the pool that one forward pass is timed over


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`select_*`; nothing where nothing was selected."""
    reading = Reading()
    if not run.log.selections:
        return reading
    last = "the last selection of the recipe"
    report = run.log.selections[-1]
    kept, pool = report["kept"], report["pool"]
    of_pool = f"{last}, of a pool of {pool['examples']} examples"
    reading.add("select_kept", kept["examples"], of_pool)
    seconds = sum(one["seconds"] for one in run.log.selections)
    reading.add("select_seconds", seconds, "all selections of the recipe; wall clock, beside other cells")
    per_thousand = "wall clock, beside other cells; over thousands of examples in the pool"
    reading.add("select_s_per_1000", 1000 * seconds / pool["examples"], f"all selections of the recipe; {per_thousand}")
    reading.add("select_forward_s_per_1000", 1000 * _time_forward(run), f"{FORWARD}; wall clock, beside other cells")
    for name, share in report["coverage"].items():
        reading.add(f"select_{name}s_covered", share, f"{of_pool}; by the field {name!r} of its examples")
    for what, made in (("kept", kept), ("pool", pool)):
        whose = last if what == "kept" else "the pool of it"
        for quantile, tokens in made["lengths"].items():
            name = f"select_{what}_length_q{100 * float(quantile):.0f}"
            reading.add(name, tokens, f"{whose}; tokens with those at both ends")
        reading.add(f"select_{what}_topics_nats", made["topics"], f"{whose}; {TOPICS}")
        if "balance" in made:
            reading.add(f"select_{what}_label_balance", made["balance"], f"{whose}; examples without a label left out")
    _add_planted(reading, report, last)
    return reading


def _add_planted(reading: Reading, report: SelectionReport, last: str) -> None:
    """What was planted and is known, so that it can be said how right the selection was."""
    for kind, share in report.get("planted", {}).items():
        reading.add(f"select_{kind}_kept", share, f"{last}; over all that its source says was planted so")
    for name, how in JUDGED.items():
        if name in report:
            value: float = report[name]  # type: ignore[literal-required]
            reading.add(f"select_{name}", value, f"{last}; {how}")


def _time_forward(run: ModelRun) -> float:
    """Seconds of a forward pass per example, over examples evenly spread over the pool, after one to warm up."""
    pool = run.data.pool
    sampled = pool[:: -(-len(pool) // SAMPLED)]
    measure_losses(run, run.model, sampled[:1])
    begun = time.perf_counter()
    measure_losses(run, run.model, sampled)
    return (time.perf_counter() - begun) / len(sampled)


FORWARD = f"losses of at most {SAMPLED} examples evenly spread over the pool under the final model"
TOPICS = "16 clusters of the pool, by spherical k-means of its weighted counts of tokens"
JUDGED = {
    "noise_last": "those ranked last, as many as noise was planted among those it ranked",
    "turned_away": "judged one by one",
    "rightly": "those turned away one by one that were planted as noise, or are near one that is kept",
    "pairs_kept": "pairs of 5-grams' Jaccard index of 0.7 and more, by construction",
}
