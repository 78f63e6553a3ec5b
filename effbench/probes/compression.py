"""What shortening prompts takes and leaves, with the machine to itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.nn.infer.memory import count_kept, find_lead, remember
from effbench.probes import Reading
from effbench.probes.inputs import require_quality
from effbench.probes.prompts import divided
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

ITEMS = 8  # of a task, where the settings do not say
WARM = 1  # prompts that are shortened before time counts

EXCLUSIVE = True
SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`compressor_ms_per_prompt` and `prompt_kept` over prompts of the setting `tasks` that have a context; nothing for
    a recipe without prompt methods."""
    require_quality(run)
    reading = Reading()
    if "prompt" not in run.infer.touches:
        return reading
    prompts = [one for one in itertools.chain.from_iterable(divided(run, settings, ITEMS)) if one.contexts]
    milliseconds: list[float] = []
    before = after = 0
    for number, segments in enumerate([*prompts[:WARM], *prompts]):
        begin = time.perf_counter()
        short = run.rewrite(segments)
        seconds = time.perf_counter() - begin
        ids = run.data.encode_prompt(short.text())
        lead = find_lead(run.data.encode_prompt, short, ids)
        begin = time.perf_counter()
        fed = remember(run, ids, lead)
        seconds += time.perf_counter() - begin
        if number >= WARM:
            milliseconds.append(1000 * seconds)
            before += len(run.data.encode_prompt(segments.text()))
            after += count_kept(fed)
    if not milliseconds:
        return reading
    what = f"{len(milliseconds)} prompts with a context, one at a time"
    reading.samples["compressor_ms_per_prompt"] = milliseconds
    reading.add("compressor_ms_per_prompt", intervals.median(milliseconds), f"wall clock, median; {what}")
    reading.add("prompt_kept", after / before, f"tokens of the prompts after over before; {what}")
    return reading
