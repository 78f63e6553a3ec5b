"""Floating-point operations, counted while they run, beside the 2d rule of thumb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from effbench.nn.infer.engine import open_engine
from effbench.nn.model.experts import count_used, list_experts
from effbench.nn.model.flops import count_flops
from effbench.nn.model.linear import top_linears
from effbench.probes import Reading
from effbench.probes.inputs import random_ids
from effbench.probes.memory import elements

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun


SEES = {"weights", "cache", "attention"}

CONTEXT = 128  # where the settings do not say


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`score_flops_per_token_c<context>`, `decode_flops_per_token_c<context>` and `flops_2d`."""
    engine, reading = open_engine(run), Reading()
    context = min(settings.get("flops_context") or CONTEXT, engine.max_length - 1)
    ids = random_ids(run, 1, context)
    with torch.inference_mode():
        state = engine.prefill(ids)
        decoding = count_flops(lambda: engine.decode(state))
    counter = "torch FlopCounterMode, a multiply-add is 2, attention counted as if unmasked"
    if not run.infer.streams:  # at once no cache is read
        scoring = count_flops(lambda: engine.logits(ids))
        reading.add(f"score_flops_per_token_c{context}", scoring / context, f"{counter}; {context} tokens at once")
    reading.add(f"decode_flops_per_token_c{context}", decoding, f"{counter}; one token after {context}")
    weights = sum(elements(module) for _, module in top_linears(run.model)) + count_used(run.model)
    mixed = " and of the experts that a token is sent to" if list_experts(run.model) else ""
    reading.add("flops_2d", 2 * weights, f"2 x entries of all linears with the head{mixed}, as if dense, per token")
    return reading
