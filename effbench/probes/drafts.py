"""How much faster drafts make a text, and how many of them are taken: only real text has drafts that are right."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from effbench.core.errors import Refused, Unsupported
from effbench.machine.clock import Span, timed
from effbench.nn.infer.engine import Engine, open_engine
from effbench.probes import Reading
from effbench.probes.inputs import require_quality
from effbench.probes.speed import SECONDS, paired
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

CONTEXT, NEW_TOKENS = 64, 32  # of each text
TEXTS = 16  # different ones, in turns

EXCLUSIVE = True
SEES = {"weights", "cache", "attention", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`drafted_speedup` and the shares of drafts that are taken; nothing for a recipe that drafts nothing.

    Raises `Unsupported` where there is too little held-out text, and `Refused` where drafts change the text.
    """
    require_quality(run)
    reading, decoder = Reading(), run.infer.slot("decoder")
    if decoder is None:
        return reading
    texts = [part.tolist() for part in run.data.heldout_ids(TEXTS * CONTEXT).split(CONTEXT) if len(part) == CONTEXT]
    if not texts:
        raise Unsupported(f"the held-out text has fewer than {CONTEXT} tokens")
    seconds = settings.get("speed_seconds") or SECONDS.get(run.device.type, SECONDS["cpu"])
    engines = open_engine(run), open_engine(run, run.role(decoder.role))
    turns = [itertools.cycle(texts) for _ in engines]  # both write the same texts, in the same order

    def write(number: int) -> Span:
        engine: Engine = engines[number]
        with torch.inference_mode():
            return timed(lambda: engine.generate([next(turns[number])], NEW_TOKENS, set()), run.device).per(NEW_TOKENS)

    first = [engine.generate([texts[0]], NEW_TOKENS, set()) for engine in engines]
    if first[0] != first[1]:
        raise Refused("the text made with drafts is not the one that the model that checks them makes")
    decoder.accepted.clear()
    times = paired(lambda: write(0), lambda: write(1), seconds)
    how = f"{NEW_TOKENS} tokens greedily behind {CONTEXT} of held-out text, {len(texts)} texts in turns, batch 1"
    rate = intervals.median(times.seconds(), lambda s: 1 / s)
    reading.add("drafted_tok_per_s", rate, f"{how}, prompt included; median", times.findings)
    ratio = intervals.median(times.ratios())
    reading.add("drafted_speedup", ratio, f"{how}, prompt included, in turns with the verifier alone", times.findings)
    accepted = [float(count) for count in decoder.accepted]
    if accepted:  # none where whole drafts are longer than the text
        reading.add("accepted_per_pass", intervals.mean(accepted), f"of {decoder.k} drafted; {how}")
    for place in range(1, decoder.k + 1):
        reached = [count >= place for count in accepted if count >= place - 1]
        if reached:
            share = intervals.fraction([float(taken) for taken in reached])
            reading.add(f"accepted_at_{place}", share, f"of the drafts that were taken up to there; {how}")
    return reading
