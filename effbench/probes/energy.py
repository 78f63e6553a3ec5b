"""Energy per token by the GPU's own counter. Without such a counter there is no metric: a guess is worse."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench.machine import nvml
from effbench.machine.watch import Watch
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.graphs import Decoder, StaticDecoder, decoders
from effbench.probes import Reading
from effbench.probes.speed import new_tokens, points, prompts

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

EXCLUSIVE = True
SEES = {"weights", "cache", "attention"}
POINTED = True

SECONDS = 5.0  # the counter moves about every 100 ms


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`prefill_energy_j_per_token_<point>` and `decode_...` for the points of speed, `idle_power_w`."""
    reading = Reading()
    counter = nvml.energy_joules(run.device)
    if counter is None:
        if run.device.type == "cuda":
            run.log.energy = f"not measured: {_why_not(run.device)}"
        return reading
    seconds = max(SECONDS, settings.get("energy_seconds") or SECONDS)
    new = new_tokens(run, settings)
    engine = open_engine(run)
    measure = functools.partial(window, counter, wait=lambda: torch.cuda.synchronize(run.device), seconds=seconds)
    name = torch.cuda.get_device_name(run.device)
    how = f"NVML total energy of {name} over at least {seconds:g} s, idle included"
    joules, spent, _ = measure(lambda: time.sleep(0.1))
    reading.add("idle_power_w", joules / spent, f"{how}; the model resident, nothing running")
    with torch.inference_mode():
        for point in points(run, settings):
            ids = prompts(run, point, new, engine.max_length)
            watch = Watch(run.device)
            joules, _, prefills = measure(functools.partial(engine.prefill, ids))
            prefill = joules / prefills
            watch.look()
            (decoder,), kind = decoders([engine], ids, new)
            spent_on_decoding, calls, what = decoding(decoder, ids, new, measure, prefill)
            watch.look()
            if watch.rows:
                reading.samples[f"energy_state_{point}"] = [*watch.rows]
            each = prefill / ids.numel()
            findings = watch.findings()
            reading.add(f"prefill_energy_j_per_token_{point}", each, f"{how}; prefills", findings | {"calls": prefills})
            each = spent_on_decoding / (point.batch * new)
            protocol = f"{how}; decode: {kind}; {what}"
            reading.add(f"decode_energy_j_per_token_{point}", each, protocol, findings | {"calls": calls})
    return reading


def decoding(
    decoder: Decoder, ids: Tensor, new: int, measure: Callable[..., tuple[float, float, int]], prefill: float
) -> tuple[float, int, str]:
    """Joules of decoding `new` tokens after prompts [B, T], how often that was done, and how it was measured.

    A static cache is rewound, so that nothing but decoding runs. A growing one has to be filled anew each time, and the
    `prefill`'s joules are taken off again: a small difference of large numbers where contexts are long.
    """
    state = decoder.prefill(ids)

    def decode() -> None:
        nonlocal state
        state = decoder.rewind(ids.shape[1]) if isinstance(decoder, StaticDecoder) else decoder.prefill(ids)
        for _ in range(new):
            state = decoder.decode(state)

    joules, _, calls = measure(decode)
    if isinstance(decoder, StaticDecoder):
        return joules / calls, calls, f"{new} tokens a call, the cache rewound in between"
    return joules / calls - prefill, calls, f"{new} tokens a call, less the energy of the prefills"


def _why_not(device: torch.device) -> str:
    gpu = nvml.handle(device)
    if gpu is None:
        return "NVML does not know the device"
    if nvml.whole(gpu):
        return "the device has no energy counter"
    return "the counter is the whole GPU's, not a MIG instance's"


def window(
    counter: Callable[[], float],
    work: Callable[[], object],
    wait: Callable[[], None],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float, int]:
    """Joules, seconds and calls of `work` repeated for at least `seconds`, after one call to warm up."""
    work()
    wait()
    begin, before, calls = clock(), counter(), 0
    while clock() - begin < seconds:
        work()
        wait()  # every time: graphs are launched much faster than they run, and would queue up for minutes
        calls += 1
    return counter() - before, clock() - begin, calls
