"""Where cells run: the devices that `device=` names, and how cells share them."""

from __future__ import annotations

import dataclasses
import os
import re

from effbench.core.errors import Usage
from effbench.machine.devices import CPU, VISIBLE, Device, visible


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where cells run: the devices, what they are, and how the machine is shared."""

    devices: tuple[Device, ...]  # of one model
    machine: str  # what they are, such as amd-epyc-2core
    threads: int
    jobs: int
    tier: str
    cores: int
    notes: tuple[str, ...] = ()  # what may surprise the user

    @property
    def device(self) -> str:
        """The devices by name."""
        return ", ".join(device.name for device in self.devices)


def place(
    device: str | None = None, threads: int | None = None, jobs: int | None = None, tier: str | None = None
) -> Placement:
    """Resolve devices, threads, jobs and tier. Raises `Usage` for a device that is not there."""
    from effbench.machine.environment import describe, slug

    devices, notes = choose_devices(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if devices == (CPU,):
        threads = threads or 1
        jobs = jobs or max(1, cores // threads)
        return Placement(devices, str(describe("cpu")["machine"]), threads, jobs, tier or "quick", cores)
    jobs = jobs or len(devices)
    if jobs > len(devices):
        gpus = f"{len(devices)} GPU{'s' * (len(devices) > 1)}"
        notes = (*notes, f"jobs={jobs} on {gpus}: cells share memory, and the time that their methods take")
    threads = threads or max(1, cores // jobs)
    return Placement(devices, slug(devices[0].model), threads, jobs, tier or "full", cores, notes)


def choose_devices(name: str | None) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """The devices that `device=` names, and notes for the user. Raises `Usage` where one is missing."""
    if name == "cpu":
        return (CPU,), ()
    kind, _, index = (name or "cuda:0").partition(":")
    if kind != "cuda" or not re.fullmatch("[0-9]{1,4}", index or "0"):
        raise Usage(f"device={name}: must be cpu, cuda or cuda:N")
    devices = visible()
    built = not devices or _cuda_is_built()
    if built and int(index or 0) < len(devices):
        if index:
            return (devices[int(index)],), ()
        # One table is of one machine, so GPUs of another model wait for a run of their own.
        alike = tuple(device for device in devices if device.model == devices[0].model)
        others = f"device=cuda: {len(alike)} of {len(devices)} GPUs are used, those like the first ({devices[0].model})"
        return alike, (others,) if len(alike) < len(devices) else ()
    if name is None:
        return (CPU,), ()
    if not built:
        raise Usage(f"device={name}: the installed torch is built without CUDA")
    count = f"{len(devices)} CUDA device{'s' * (len(devices) > 1)}" if devices else "no CUDA device"
    hint = f" that CUDA_VISIBLE_DEVICES={os.environ[VISIBLE]} shows" if VISIBLE in os.environ else ""
    raise Usage(f"device={name}: this machine has {count}{hint}")


def _cuda_is_built() -> bool:
    import torch

    return bool(torch.backends.cuda.is_built())
