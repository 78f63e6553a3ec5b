"""What shortening prompts takes and leaves, with the machine to itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effbench.core.kinds import Shorten
from effbench.core.views import Segments
from effbench.machine.clock import timed
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.memory import Tokens, count_kept, find_lead, remember
from effbench.probes import Reading
from effbench.probes.inputs import require_quality
from effbench.probes.prompts import divided
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

ITEMS = 16  # of a task, at most
WARM = 1  # prompts that are shortened before time counts
MORE = 0.05  # share of the tokens of a prompt by which it may keep more than was asked

EXCLUSIVE = True
SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`compressor_ms_per_prompt`, `prompt_saved_ms` and `prompt_kept` over prompts of the setting `tasks` that have a
    context, and for methods that are asked for a share, `prompt_asked` and `prompt_over_asked`; nothing for a recipe
    without prompt methods.

    Time is saved until the first token of the answer, as far as the model has positions for the whole prompt.
    """
    require_quality(run)
    reading = Reading()
    if "prompt" not in run.infer.touches:
        return reading
    fewer = {**settings, "limit": min(settings.get("limit") or ITEMS, ITEMS)}
    prompts = [one for one in itertools.chain.from_iterable(divided(run, fewer, ITEMS)) if one.contexts]
    engine = open_engine(run)
    milliseconds: list[float] = []
    saved: list[float] = []
    kept: list[tuple[int, int]] = []  # tokens of each prompt before and after
    for number, segments in enumerate([*prompts[:WARM], *prompts]):
        whole = run.data.encode_prompt(segments.text())
        fed: list[Tokens] = []

        def shorten(segments: Segments = segments, fed: list[Tokens] = fed) -> None:
            short = run.rewrite(segments)
            ids = run.data.encode_prompt(short.text())
            fed.append(remember(run, ids, find_lead(run.data.encode_prompt, short, ids)))

        def read(tokens: Tokens) -> float:
            return timed(lambda: engine.read([tokens]), run.device).wall

        seconds = timed(shorten, run.device).wall
        fits = engine.room is None or len(whole) <= engine.room
        gain = read(whole) - read(fed[0]) - seconds if fits else None
        if number >= WARM:
            milliseconds.append(1000 * seconds)
            saved += [] if gain is None else [1000 * gain]
            kept.append((len(whole), count_kept(fed[0])))
    if not kept:
        return reading
    what = "{} prompts with a context, one at a time".format
    for name, values in (("compressor_ms_per_prompt", milliseconds), ("prompt_saved_ms", saved)):
        if values:
            reading.samples[name] = values
            reading.add(name, intervals.median(values), f"wall clock, median; {what(len(values))}")
    before, after = map(sum, zip(*kept, strict=True))
    reading.add("prompt_kept", after / before, f"tokens of the prompts after over before; {what(len(kept))}")
    shares = [method.keep for method in run.infer.chain("prompt") if isinstance(method, Shorten)]
    if shares:
        asked = math.prod(shares)
        over = [after > (asked + MORE) * before for before, after in kept]
        reading.add("prompt_asked", asked, "product of `keep` of the methods")
        reading.add("prompt_over_asked", intervals.fraction(over), f"by more than {MORE:g}; {what(len(kept))}")
    return reading
