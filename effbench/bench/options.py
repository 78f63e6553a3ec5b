"""What `effbench bench` can be told."""

from __future__ import annotations

import dataclasses

from effbench.cells.options import DTYPES
from effbench.core.errors import Usage
from effbench.core.usage import one_of


@dataclasses.dataclass
class BenchOptions:
    """What `effbench bench` can be told."""

    op: str | None = None  # only this op
    device: str | None = None  # cpu, cuda or cuda:N; by default the first GPU, else the processor
    dtype: str | None = None  # float32, bfloat16, float16; by default float32 on a processor, else bfloat16
    seconds: float | None = None  # after which no case is begun any more; what is left out is named
    out: str | None = None  # JSON file to write, or a folder for one named after the machine

    def check(self, compile: bool) -> None:
        """Raise `Usage` for values that cannot be right; `compile`: nothing is to be run."""
        for name in ("device", "dtype", "seconds") if compile else ():
            value = getattr(self, name)
            if value is not None:
                raise Usage(f"{name}={value}: not with --compile, which compiles for sm_90 and runs nothing")
        if self.seconds is not None and not self.seconds > 0:
            raise Usage(f"seconds={self.seconds}: must be above 0")
        one_of("dtype", self.dtype, DTYPES)
