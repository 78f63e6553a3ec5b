"""How much faster drafts make a text, and how many of them are taken: only real text has drafts that are right."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from effbench.core.errors import Refused, Unsupported
from effbench.machine.clock import Span, timed
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.infer.sampling import Sampling
from effbench.probes import Reading
from effbench.probes.inputs import require_quality
from effbench.probes.speed import SECONDS, paired
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

CONTEXT, NEW_TOKENS = 64, 32  # of each text
TEXTS = 16  # different ones, at most

EXCLUSIVE = True
SEES = {"weights", "cache", "attention", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`drafted_speedup`, `tokens_per_pass` and the shares of drafts that are taken; the same of sampled text, at
    temperature 1, behind `sampled_`. Nothing for a recipe that drafts nothing.

    Drafts are counted over the texts, as many as the setting `limit` at most, each made once, so that counts do not
    depend on how fast they are made; then making them is timed, for `speed_seconds`, of which greedy and sampled text
    have a half each.

    Raises `Unsupported` where there is too little held-out text, and `Refused` where drafts change the text.
    """
    require_quality(run)
    reading, decoder = Reading(), run.infer.slot("decoder")
    if decoder is None:
        return reading
    most = min(TEXTS, settings.get("limit") or TEXTS)
    texts = [part.tolist() for part in run.data.heldout_ids(most * CONTEXT).split(CONTEXT) if len(part) == CONTEXT]
    if not texts:
        raise Unsupported(f"the held-out text has fewer than {CONTEXT} tokens")
    engines = open_engine(run), open_engine(run, run.role(decoder.role))
    first = [engine.generate([texts[0]], NEW_TOKENS, set()) for engine in engines]
    if first[0] != first[1]:
        raise Refused("the text made with drafts is not the one that the model that checks them makes")
    seconds = settings.get("speed_seconds") or SECONDS.get(run.device.type, SECONDS["cpu"])
    of_texts = f"behind {CONTEXT} of held-out text, {len(texts)} texts"
    for prefix, sampling, way in (
        ("", None, "greedily"),
        ("sampled_", Sampling(seed=run.seed), "drawn at temperature 1 of the whole distribution"),
    ):
        how = f"{NEW_TOKENS} tokens {way} {of_texts}"
        _count(reading, prefix, engines[0], decoder, texts, sampling, how)
        _time(reading, prefix, engines, texts, sampling, seconds / 2, f"{how} in turns, batch 1, prompt included")
    return reading


def _count(
    reading: Reading,
    prefix: str,
    engine: Engine,
    decoder: Any,
    texts: list[list[int]],
    sampling: Sampling | None,
    how: str,
) -> None:
    """Add what was drafted and taken in making each text once."""
    decoder.accepted.clear()
    decoder.committed.clear()
    for number, text in enumerate(texts):
        engine.generate([text], NEW_TOKENS, set(), sampling=sampling, numbers=[number])
    what = f"passes of the verifier behind the prompt's, what it adds to taken drafts counts; {how}"
    reading.add(f"{prefix}tokens_per_pass", intervals.mean([float(count) for count in decoder.committed]), what)
    accepted = [float(count) for count in decoder.accepted]
    if accepted:  # none where whole drafts are longer than the text
        reading.add(f"{prefix}accepted_per_pass", intervals.mean(accepted), f"of {decoder.k} drafted; {how}")
    for place in range(1, decoder.k + 1):
        reached = [count >= place for count in accepted if count >= place - 1]
        if reached:
            share = intervals.fraction([float(taken) for taken in reached])
            reading.add(f"{prefix}accepted_at_{place}", share, f"of the drafts that were taken up to there; {how}")


def _time(
    reading: Reading,
    prefix: str,
    engines: tuple[Engine, Engine],
    texts: list[list[int]],
    sampling: Sampling | None,
    seconds: float,
    how: str,
) -> None:
    """Add how fast texts are made with drafts, and by the verifier alone; both begin with the first and go on."""
    turns = [enumerate(itertools.cycle(texts)) for _ in engines]

    def write(which: int) -> Span:
        number, text = next(turns[which])  # a text that comes again is sampled anew

        def generate() -> None:
            engines[which].generate([text], NEW_TOKENS, set(), sampling=sampling, numbers=[number])

        with torch.inference_mode():
            return timed(generate, engines[which].device).per(NEW_TOKENS)

    times = paired(lambda: write(0), lambda: write(1), seconds)
    rate = intervals.median(times.seconds(), lambda s: 1 / s)
    reading.add(f"{prefix}drafted_tok_per_s", rate, f"{how}; median", times.findings)
    ratio = intervals.median(times.ratios())
    reading.add(f"{prefix}drafted_speedup", ratio, f"{how}, in turns with the verifier alone", times.findings)
