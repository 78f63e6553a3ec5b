"""Options of the command line: `key=value` arguments, brought to the types of a dataclass and checked.

Everything wrong here is `Usage`: one line that names the option, what is wrong and the mend.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from effbench.core.errors import Usage
from effbench.core.paths import PUBLISHED, RUNS
from effbench.core.usage import Count, Positive, Seed, named_path, one_of

TIERS = ("quick", "full", "real")  # small and large with the tiny model, and what tells with a real one

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass
class RunOptions:
    """What `effbench run` can be told."""

    suite: str | None = None  # name of a suite, or a YAML file of your own
    recipe: str | None = None  # the steps of one recipe, as one more row of the suite if that is given too
    # tiny, tiny:moe, smollm2, a folder, gguf:FILE, a Hub id org/name[@REVISION], shape:NAME; else the suite's
    model: str | None = None
    data: str | None = None  # tiny, speeches, text:FOLDER, jsonl:FILE or hub:NAME; else the suite's, or tiny
    calibration_data: str | None = None  # as data=, for methods to calibrate and train on; by default the same
    tokenizer: str | None = None  # folder or Hub id, for a model that comes without one
    device: str | None = None  # cpu, cuda (all GPUs like the first) or cuda:N; by default the first GPU, else the cpu
    dtype: str | None = None  # float32, bfloat16, float16; by default float32 on a processor, else as stored
    tier: str | None = None  # quick, full or real; by default full with a GPU, else quick
    recipes: str | None = None  # only these rows of the suite: names or patterns, separated by commas
    seeds: list[Seed] | None = None  # such as [0,1,2]; by default those of the tier
    limit: Count | None = None  # items per task; by default that of the tier
    probes: str | None = None  # only these instruments, separated by commas; by default those of the tier
    threads: Count | None = None  # per cell; by default 1 on a processor, else cores / jobs
    jobs: Count | None = None  # cells at a time; by default cores / threads on a processor, else one per GPU
    timeout: Positive = 3600.0  # seconds for one cell, waiting for the machine not counted
    results: str = RUNS  # folder for records; cells that are done there are not run again

    def check(self) -> None:
        """Raise `Usage` for values that cannot be right, whatever suite and model say."""
        if self.suite is None and self.recipe is None:
            raise Usage("give suite=NAME, recipe='step(), step()' or both")
        if self.suite is None and self.recipes is not None:
            raise Usage("recipes= chooses rows of a suite; it goes with suite=, not with recipe= alone")
        if self.seeds is not None and not self.seeds:
            raise Usage("seeds=[]: name at least one seed, such as seeds=[0]")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise Usage(f"seeds={self.seeds}: must be different whole numbers")
        one_of("tier", self.tier, TIERS)
        one_of("dtype", self.dtype, DTYPES)
        if PUBLISHED is not None and self.folder.resolve() == PUBLISHED.resolve():
            raise Usage(f"results={self.results}: holds what is published; choose another folder, as {RUNS}")

    @property
    def folder(self) -> Path:
        """The folder for records."""
        return named_path("results", self.results)
