"""Distance to the reference: KL divergence and flipped predictions on the held-out text.

KL separates methods long before perplexity does; it does not rank variants that are nearly lossless.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench.core.errors import Diverged
from effbench.nn.infer.answers import divergence
from effbench.nn.infer.engine import open_engine
from effbench.probes import Reading
from effbench.probes.inputs import predict, predictions, score_block, windows
from effbench.records.metric import Metric
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

QUALITY = True
WINDOWED = True
SEES = {"weights", "cache", "attention"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`kl_nats_per_token` (reference || model), `top1_agreement` and `flips` as fractions of tokens."""
    text = windows(run, settings)
    block, spelled = score_block(run, settings)
    kl: list[list[float]] = [[] for _ in text.ids]
    changed: list[list[bool]] = [[] for _ in text.ids]
    with torch.inference_mode():
        references = predict(open_engine(run, run.reference), text, block)
        for ours, theirs in zip(predictions(run, text, block), references, strict=True):
            apart, flips = compare(theirs.logits, ours.logits)
            kl[ours.window] += apart.tolist()
            changed[ours.window] += flips.tolist()
    divergence, flipped = list(map(statistics.fmean, kl)), list(map(statistics.fmean, changed))
    lost = sum(not math.isfinite(value) for value in divergence)
    if lost:
        raise Diverged(f"the KL divergence is not finite in {lost} of {len(divergence)} windows")
    reading = Reading(samples={"kl_nats_per_token": divergence, "flips": flipped})
    how = f"{spelled}.float32-softmax"
    kl_mean, flips_mean = intervals.mean(divergence), _within(intervals.mean(flipped))
    agreement = Metric(
        1 - flips_mean.value,
        None if flips_mean.high is None else 1 - flips_mean.high,
        None if flips_mean.low is None else 1 - flips_mean.low,
        flips_mean.n,
    )
    reading.add("kl_nats_per_token", kl_mean, text.protocol("kl(reference||model)", how))
    reading.add("flips", flips_mean, text.protocol("top1-changed", how))
    reading.add("top1_agreement", agreement, text.protocol("top1-same", how))
    return reading


def compare(reference: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """From logits [N, V]: KL(reference || model) in nats [N], whether the most likely token changed [N]."""
    return divergence(reference, model), reference.argmax(-1) != model.argmax(-1)


def _within(share: Metric) -> Metric:
    if share.low is None or share.high is None:
        return share
    return Metric(share.value, max(0.0, share.low), min(1.0, share.high), share.n)
