"""No memory left on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effbench.core.method import Method
from effbench.core.run import Run

MESSAGE = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 10.50 GiB is "
    "free. Including non-PyTorch memory, this process has 68.61 GiB memory in use. Of the allocated memory 67.00 GiB "
    "is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)


@dataclass(frozen=True)
class DeviceOOM(Method):
    """For tests of the runner: asks a GPU for more than there is; elsewhere says what torch would say."""

    def apply(self, run: Run) -> None:
        if run.device.type != "cuda":
            raise torch.OutOfMemoryError(MESSAGE)
        total = torch.cuda.get_device_properties(run.device).total_memory
        torch.empty(2 * total, dtype=torch.uint8, device=run.device)
