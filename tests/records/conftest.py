"""A record with something in every field."""

from __future__ import annotations

import dataclasses

import pytest

from effbench.records.metric import Metric
from effbench.records.record import Record


@pytest.fixture
def rich(make_job):
    cell = dataclasses.replace(
        make_job("gptq-4b", "gptq(bits=4)", limit=8, speed_points=[[1, 128]]).cell,
        resolved=({"method": "gptq", "bits": 4},),
    )
    nll = [2.0 + i / 7 for i in range(8)]
    return Record(
        cell,
        "refused",
        reason="distance: a cache that evicts",
        traceback="",
        simulated=True,
        metrics={
            "token_ppl": Metric(12.5, 12.0, 13.0, 8),
            "bits_per_weight": Metric(4.25, findings={"linears": 42, "compressed": True}),
            "text_word_ppl": Metric(9.5, n=3),
            "prefill_speedup_b1_c128": Metric(1.5, n=2, findings={"ratio_interval": 0.187, "device_state": "warm"}),
        },
        samples={
            "token_ppl_window_nll": nll,
            "recall_acc": [1, 0, 1, 1],
            "text_word_ppl": [[-192.9, 79], [-126.7, 71], [-0.1, 3]],
            "text_byte_ppl": [[-192.9, 405], [-126.7, 372], [-0.1, 12]],
            "text_bits_per_byte": [[-192.9, 405], [-126.7, 372], [-0.1, 12]],
            "speed_state_b1_c128": [{"t": 0.0, "sm_mhz": 1980}, {"t": 0.5, "sm_mhz": 1700}],
            "apply_seconds": [],
        },
        protocols={
            "token_ppl": "ppl.token.window512",
            "bits_per_weight": "weights and metadata",
            "text_word_ppl": "lm-eval, task text v1",
            "prefill_speedup_b1_c128": "batch 1, context 128",
        },
        kernels={"int_linear": {"reference": 12}},
        facts={"type": "PTQ", "calibration_data": "128 sequences"},
        log={
            "steps": [{"step": "gptq(bits=4)", "seconds": 1.5, "peaks": {"rss": 7}}],
            "layers": {
                "model.layers.0.q": {"weight_error": 0.25, "output_error": 0.1},
                "model.layers.0.v": {"weight_error": 1 / 3},
            },
        },
        environment={"machine": "acme-2core", "host": "0123456789ab", "packages": {"torch": "2.13.0"}},
        started="2026-01-02T03:04:05+00:00",
        seconds=2.5,
    )
