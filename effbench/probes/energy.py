"""Energy per token by the GPU's own counter. Without such a counter there is no metric: a guess is worse."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from effbench.probes import Reading, nvml
from effbench.probes.speed import new_tokens, points, prompts

if TYPE_CHECKING:
    from effbench.nn.model_run import ModelRun

VERSION = 1
EXCLUSIVE = True

SECONDS = 5.0  # the counter moves about every 100 ms


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`prefill_energy_j_per_token_<point>` and `decode_...` for the points of speed, `idle_power_w`."""
    reading = Reading()
    counter = nvml.energy_joules(run.device)
    if counter is None:
        return reading
    seconds = max(SECONDS, settings.get("energy_seconds") or SECONDS)
    new = new_tokens(run, settings)
    engine = run.engine()

    def wait() -> None:
        torch.cuda.synchronize(run.device)

    name = torch.cuda.get_device_name(run.device)
    how = f"NVML total energy of {name} over at least {seconds:g} s, idle included"
    joules, spent, _ = window(counter, lambda: time.sleep(0.1), wait, seconds)
    reading.add("idle_power_w", joules / spent, f"{how}; the model resident, nothing running")
    with torch.inference_mode():
        for point in points(run, settings):
            ids = prompts(run, point, new, engine.max_length)
            joules, _, calls = window(counter, functools.partial(engine.prefill, ids), wait, seconds)
            each = joules / (calls * ids.numel())
            reading.add(f"prefill_energy_j_per_token_{point}", each, f"{how}; {calls} prefills")
            prefill = joules / calls

            def decode(ids: torch.Tensor = ids) -> None:
                state = engine.prefill(ids)
                for _ in range(new):
                    state = engine.decode(state)

            joules, _, calls = window(counter, decode, wait, seconds)
            each = (joules / calls - prefill) / (point.batch * new)
            what = f"{how}; {calls} x {new} tokens, less the energy of the prefills"
            reading.add(f"decode_energy_j_per_token_{point}", each, what)
    return reading


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
    while True:
        work()
        calls += 1
        if clock() - begin >= seconds:  # ahead of the device by what is queued, so look again when it is done
            wait()
            return counter() - before, clock() - begin, calls
