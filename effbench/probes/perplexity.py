"""Perplexity per token on the held-out text, through the inference plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.core.errors import Diverged
from effbench.probes import Reading
from effbench.probes.inputs import nll, score_block, windows
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

QUALITY = True
WINDOWED = True
SEES = {"weights", "cache", "attention"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`token_ppl`, with the mean negative log-likelihood of every window (nats per token) in the samples."""
    text = windows(run, settings)
    block, spelled = score_block(run, settings)
    values = nll(run, text, block)
    lost = sum(not math.isfinite(value) for value in values)
    if lost:
        raise Diverged(f"the log-likelihood is not finite in {lost} of {len(values)} windows")
    reading = Reading(samples={"token_ppl_window_nll": values})
    reading.add("token_ppl", intervals.mean(values, intervals.exp), text.protocol("ppl", spelled))
    return reading
