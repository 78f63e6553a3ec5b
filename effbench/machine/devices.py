"""CUDA devices as this program sees them, listed without starting CUDA on any.

The list comes from the driver, because it alone reads CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER as CUDA does; NVML
counts in another order. Reading names and UUIDs creates no context, so a program that only plans and starts processes
holds no memory on any device.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from effbench.core.errors import OutOfMemory

VISIBLE = "CUDA_VISIBLE_DEVICES"
ROOM = 2**29  # bytes; with less than this free, CUDA and its libraries may not even start


@dataclasses.dataclass(frozen=True)
class Device:
    """A processor, or one GPU or MIG instance."""

    name: str  # cpu, or cuda:N as this program counts
    model: str = ""  # what its maker calls it
    uuid: str = ""  # GPU-... or MIG-..., the same for every program; empty if the driver does not say
    visible: str = ""  # what CUDA_VISIBLE_DEVICES is in a process that sees this device alone


CPU = Device("cpu")


def visible() -> tuple[Device, ...]:
    """CUDA devices in CUDA's order; none without a driver."""
    listed = os.environ.get(VISIBLE)
    entries = map(str, itertools.count()) if listed is None else map(str.strip, listed.split(","))
    if (listed or "").startswith("MIG-"):  # CUDA shows a process only the first of them
        shown = [(entry, *names) for entry in entries if (names := _read_instance(entry)) is not None]
    else:
        shown = [(entry, *names) for names, entry in zip(_list_devices(), entries, strict=False)]
    return tuple(Device(f"cuda:{i}", model, uuid, entry) for i, (entry, model, uuid) in enumerate(shown))


def check_room(name: str) -> None:
    """Raise `OutOfMemory` if the device of that name is so full that CUDA could not start there."""
    if name == CPU.name:
        return
    device = next((device for device in visible() if device.name == name), None)
    memory = _memory(device) if device is not None else None
    if device is None or memory is None:
        return
    free, total = memory
    if free < ROOM:
        raise OutOfMemory(
            f"{device.model} is full: {gib(free)} of {gib(total)} are free, and CUDA itself takes {gib(ROOM)}",
            asked_bytes=ROOM,
            free_bytes=free,
            total_bytes=total,
        )


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.2f} GiB"


def _driver() -> Any:
    """The CUDA driver's library, started, or None."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return cuda if cuda.cuInit(0) == 0 else None


def _list_devices() -> Iterator[tuple[str, str]]:
    """Model and UUID of every device that the driver shows."""
    cuda, count = _driver(), ctypes.c_int(0)
    if cuda is None or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return
    for index in range(count.value):
        device, name, raw = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
        if cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetName(name, len(name), device):
            return
        model = name.value.decode(errors="replace")
        unknown = cuda.cuDeviceGetUuid_v2(raw, device) != 0  # of a MIG instance its own, not its GPU's
        yield model, "" if unknown else f"{'MIG' if ' MIG ' in model else 'GPU'}-{UUID(bytes=raw.raw)}"


def _read_instance(uuid: str) -> tuple[str, str] | None:
    """Model and UUID of a MIG instance; None if there is none of that name."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        return str(pynvml.nvmlDeviceGetName(handle)), str(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError:
        return None


def _memory(device: Device) -> tuple[int, int] | None:
    """Free and all bytes of a device, without a context on it; None where NVML cannot tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(device.uuid))
    except pynvml.NVMLError:
        return None
    return int(memory.free), int(memory.total)
