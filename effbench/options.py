"""Options of the command line: `key=value` arguments, brought to the types of a dataclass and checked.

Everything wrong here is `Usage`: one line that names the option, what is wrong and the mend.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from effbench.core.errors import Usage
from effbench.core.registry import nearest
from effbench.devices import CPU, VISIBLE, Device, visible

T = TypeVar("T")
TIERS = ("quick", "full")
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list[int]": "a list such as [0,1,2]",
}
DTYPES = ("float32", "bfloat16", "float16")
EXECUTORS = ("local",)
EXTRAS = ("ray", "slurm")  # executors that come as extras


@dataclasses.dataclass
class RunOptions:
    """What `effbench run` can be told."""

    suite: str | None = None  # name of a suite
    recipe: str | None = None  # or the steps of one recipe
    model: str | None = None  # tiny, a folder, a Hub id org/name[@REVISION], shape:NAME; else the suite's own
    data: str | None = None  # tiny, text:FOLDER or hub:NAME; by default what belongs to the model
    tokenizer: str | None = None  # folder or Hub id, for a model that comes without one
    device: str | None = None  # cpu, cuda (all GPUs like the first) or cuda:N; by default the first GPU, else the cpu
    dtype: str | None = None  # float32, bfloat16, float16; by default float32 on a processor, else as stored
    tier: str | None = None  # quick or full; by default full with a GPU, else quick
    recipes: str | None = None  # only these rows of the suite: names or patterns, separated by commas
    seeds: list[int] | None = None  # by default those of the tier
    limit: int | None = None  # items per task; by default that of the tier
    probes: str | None = None  # only these instruments, separated by commas; by default those of the tier
    threads: int | None = None  # per cell; by default 1 on a processor, else cores / jobs
    jobs: int | None = None  # cells at a time; by default cores / threads on a processor, else one per GPU
    timeout: float = 3600.0  # seconds for one cell, waiting for the machine not counted
    executor: str = "local"  # what runs the cells
    results: str = "results"  # folder of records and tables

    def check(self) -> None:
        """Raise `Usage` for values that cannot be right, whatever suite and model say."""
        if (self.suite is None) == (self.recipe is None):
            both = "" if self.suite is None else ", not both"
            raise Usage(f"give either suite=NAME or recipe='step(), step()'{both}")
        if self.recipe is not None and self.recipes is not None:
            raise Usage("recipes= chooses rows of a suite; it goes with suite=, not with recipe=")
        for name in ("limit", "jobs", "threads", "timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise Usage(f"{name}={value}: must be above 0")
        if self.seeds is not None and not self.seeds:
            raise Usage("seeds=[]: name at least one seed, such as seeds=[0]")
        if self.seeds is not None and (min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds)):
            raise Usage(f"seeds={self.seeds}: must be different whole numbers from 0 up")
        one_of("tier", self.tier, TIERS)
        one_of("dtype", self.dtype, DTYPES)
        if self.executor in EXTRAS:
            raise Usage(f"executor={self.executor}: needs an extra that is not installed")
        one_of("executor", self.executor, EXECUTORS)

    @property
    def folder(self) -> Path:
        """The results folder."""
        return Path(self.results).expanduser()


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where cells run: the devices, what they are, and how the machine is shared."""

    devices: tuple[Device, ...]  # of one model
    machine: str  # what they are, such as amd-epyc-2core
    threads: int
    jobs: int
    tier: str
    notes: tuple[str, ...] = ()  # what the user may not expect of this

    @property
    def device(self) -> str:
        """The devices by name."""
        return ", ".join(device.name for device in self.devices)


def place(options: RunOptions) -> Placement:
    """Resolve devices, threads, jobs and tier. Raises `Usage` for a device that is not there."""
    from effbench.probes.environment import describe, slug

    devices, notes = chosen_devices(options.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if devices == (CPU,):
        threads = options.threads or 1
        jobs = options.jobs or max(1, cores // threads)
        return Placement(devices, str(describe("cpu")["machine"]), threads, jobs, options.tier or "quick")
    jobs = options.jobs or len(devices)
    if jobs > len(devices):
        gpus = f"{len(devices)} GPU{'s' * (len(devices) > 1)}"
        notes = (*notes, f"jobs={jobs} on {gpus}: cells share memory, and the time that their methods take")
    threads = options.threads or max(1, cores // jobs)
    return Placement(devices, slug(devices[0].model), threads, jobs, options.tier or "full", notes)


def chosen_devices(wanted: str | None) -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """The devices that `device=` names, and what is to be said about them. Raises `Usage` where one is missing."""
    if wanted == "cpu":
        return (CPU,), ()
    kind, _, index = (wanted or "cuda:0").partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise Usage(f"device={wanted}: must be cpu, cuda or cuda:N")
    found = visible()
    built = not found or _cuda_is_built()
    if built and int(index or 0) < len(found):
        if index:
            return (found[int(index)],), ()
        # One table is of one machine, so GPUs of another model wait for a run of their own.
        alike = tuple(device for device in found if device.model == found[0].model)
        others = f"device=cuda: {len(alike)} of {len(found)} GPUs are used, those like the first ({found[0].model})"
        return alike, (others,) if len(alike) < len(found) else ()
    if wanted is None:
        return (CPU,), ()
    if not built:
        raise Usage(f"device={wanted}: the installed torch is built without CUDA")
    count = f"{len(found)} CUDA device{'s' * (len(found) > 1)}" if found else "no CUDA device"
    shown = f" that CUDA_VISIBLE_DEVICES={os.environ[VISIBLE]} shows" if VISIBLE in os.environ else ""
    raise Usage(f"device={wanted}: this machine has {count}{shown}")


def _cuda_is_built() -> bool:
    import torch

    return bool(torch.backends.cuda.is_built())


def one_of(name: str, value: str | None, choices: Iterable[str]) -> None:
    """Raise `Usage` unless `value` is None or one of `choices`."""
    if value is not None and value not in (choices := list(choices)):
        raise Usage(f"unknown {name} {value!r}{nearest(value, choices)}")


def parse(kind: type[T], arguments: Iterable[str], **flags: bool) -> T:
    """The options in `key=value` arguments. Raises `Usage`."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    fields = {field.name: str(field.type).removesuffix(" | None") for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = dict(flags)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if name in fields and not text:
            raise Usage(f"{argument!r}: write {name}=VALUE, or leave the option out")
        if not equals:
            raise Usage(f"unexpected {argument!r}: options are written key=value")
        if name not in fields:
            raise Usage(f"unknown option {name!r}{nearest(name, fields)}")
        if name in values:
            raise Usage(f"option {name} is given twice")
        values[name] = text
        if fields[name] == "str":  # as typed: a recipe is not YAML
            continue
        try:
            values[name] = OmegaConf.from_dotlist([argument])[name]
            typed(kind, {name: values[name]})
        except (Usage, YAMLError):
            raise Usage(f"{name}={text}: must be {KINDS[fields[name]]}") from None
    return typed(kind, values)


def typed(kind: type[T], values: Mapping[str, Any]) -> T:
    """An instance of a dataclass from plain, maybe nested values. Raises `Usage` that starts with the key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values)))
    except ConfigKeyError as error:
        choices = [field.name for field in dataclasses.fields(error.object_type)] if error.object_type else []
        raise Usage(f"{error.full_key}: unknown key{nearest(str(error.key), choices)}") from None
    except OmegaConfBaseException as error:
        raise Usage(f"{error.full_key}: {str(error).splitlines()[0]}") from None
