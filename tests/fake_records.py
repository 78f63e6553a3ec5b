"""Records as if something had been measured."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from effbench.records.record import Cell, Metric, Record
from effbench.records.store import Store

WINDOWS, QUESTIONS = 60, 120
PROTOCOL = "ppl.world.joined.window512.stride512.token.first-of-window-unscored.windows60.oneblock"


def make(recipe="baseline", seed=0, outcome="ok", *, worse=0.0, wrong=0, bits=16.0, rng_seed=0, **changes):
    """A record whose windows are `worse` nats worse, and whose task has `wrong` more wrong answers."""
    steps = "" if recipe == "baseline" else recipe
    cell = Cell(
        suite="quant", suite_version=1, tier="quick", recipe=recipe, steps=steps, resolved=(), model="tiny",
        data="tiny", seed=seed, settings={"threads": 1, "dtype": "float32"},
        digests={"model": "m1", "data": "d1", "tasks": "t1", "probes": "p1", "methods": recipe},
    )  # fmt: skip
    cell = dataclasses.replace(cell, **{k: changes.pop(k) for k in list(changes) if hasattr(cell, k) and k != "name"})
    noise = np.random.default_rng(rng_seed + seed)
    nll = np.random.default_rng(99).normal(2.3, 0.3, WINDOWS) + worse + noise.normal(0, 0.002, WINDOWS) * (bits < 16)
    right = [int(i >= 20 + wrong) for i in range(QUESTIONS)]
    middle, reach = float(nll.mean()), 1.96 * float(nll.std()) / math.sqrt(WINDOWS)
    share = sum(right) / QUESTIONS
    accuracy = Metric(share, share - 0.05, share + 0.05, QUESTIONS)
    metrics = {
        "token_ppl": Metric(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), WINDOWS),
        "kl_nats_per_token": Metric(worse / 2, n=WINDOWS),
        "top1_agreement": Metric(1 - worse / 3, n=WINDOWS),
        "recall_acc": accuracy,
        "tasks_acc": accuracy,
        "bits_per_weight": Metric(bits),
        "stored_bytes": Metric(16e6 * bits / 16),
        "compression": Metric(16 / bits),
        "weight_bytes": Metric(1e6 * bits),
        "prefill_speedup_b1_c128": Metric(0.81, 0.79, 0.83, 12),
        "decode_speedup_b1_c128": Metric(1.26, 1.2, 1.31, 12),
        "decode_speedup_b8_c128": Metric(0.97, 0.95, 0.99, 12),
        "apply_seconds": Metric(1.25),
        "apply_peak_rss_bytes": Metric(2.5e7),
        "score_peak_rss_bytes": Metric(1.2e8),
    }
    values = {
        "metrics": metrics,
        "samples": {"token_ppl_window_nll": nll.tolist(), "recall_acc": right},
        "protocols": {"token_ppl": PROTOCOL, "recall_acc": "task recall v1, 0-shot"},
        "facts": {"type": "PTQ", "calibration_data": "128 sequences", "weight_update": "Hessian"} if steps else {},
        "environment": {"machine": "acme-cpu-2core"},
        "started": "2026-01-02T03:04:05+00:00",
    }
    return Record(cell=cell, outcome=outcome, **values | changes)


def failed(recipe, seed=0, outcome="oom", reason="needs 9 GiB", **changes):
    return make(recipe, seed, outcome, reason=reason, metrics={}, samples={}, protocols={}, **changes)


RECORDS = [
    make(),
    make("gptq(bits=4)", 0, worse=0.02, bits=4.25, rng_seed=1),
    make("gptq(bits=4)", 1, worse=0.021, bits=4.25, rng_seed=1),
    make("gptq(bits=4)", 2, worse=0.022, bits=4.25, rng_seed=1),
    make("rtn(bits=2)", worse=0.9, wrong=40, bits=2.25, rng_seed=2),
    make("rtn(bits=8)", worse=0.0, bits=8.25, rng_seed=3),
    make("fp8_weight()", worse=0.0, bits=8.0, rng_seed=4, simulated=True),
    failed("squeezellm(bits=3)"),
]


def store_records(folder, records=RECORDS):
    """A store in that folder that holds the records."""
    store = Store(folder)
    for record in records:
        store.write(record)
    return store
