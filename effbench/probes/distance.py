"""Distance to the reference: KL divergence and flipped predictions on the held-out text.

KL separates methods long before perplexity does; it does not rank variants that are nearly lossless.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench.core.errors import Diverged, Refused
from effbench.nn.infer.engine import open_engine
from effbench.probes import Reading
from effbench.probes.inputs import logits, predictions, windows
from effbench.records.metric import Metric
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun


SOFTMAX = 2**22  # elements of one float32 log-softmax


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`kl_nats_per_token` (reference || model), `top1_agreement` and `flips` as fractions of tokens."""
    if run.infer.streams:
        raise Refused("KL is taken in one block, in which a cache that evicts or encodes is never read")
    text = windows(run, settings)
    divergence: list[float] = []
    flipped: list[float] = []
    with torch.inference_mode():
        references = logits(open_engine(run, run.reference), text.ids)
        for ours, theirs in zip(predictions(run, text), references, strict=True):
            kl, flips = compare(theirs[text.first - 1 : -1], ours[text.first - 1 : -1])
            divergence.append(float(kl.mean()))
            flipped.append(float(flips.double().mean()))
    lost = sum(not math.isfinite(value) for value in divergence)
    if lost:
        raise Diverged(f"the KL divergence is not finite in {lost} of {len(divergence)} windows")
    reading = Reading(samples={"kl_nats_per_token": divergence, "flips": flipped})
    how = "oneblock.float32-softmax"
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
    rows = max(1, SOFTMAX // reference.shape[-1])
    kl, flips = [], []
    for theirs, ours in zip(torch.split(reference, rows), torch.split(model, rows), strict=True):
        p, q = theirs.float().log_softmax(-1), ours.float().log_softmax(-1)
        # where p is 0 the term is 0, even against q = 0
        terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
        kl.append(terms.sum(-1).double())
        flips.append(p.argmax(-1) != q.argmax(-1))
    return torch.cat(kl), torch.cat(flips)


def _within(share: Metric) -> Metric:
    if share.low is None or share.high is None:
        return share
    return Metric(share.value, max(0.0, share.low), min(1.0, share.high), share.n)
