"""Options of the command line: `key=value` arguments, brought to the types of a dataclass and checked.

Everything wrong here is `Usage`: one line that names the option, what is wrong and the mend.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.usage import one_of

TIERS = ("quick", "full")


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
