"""NVIDIA's management library, where there is one. Devices are matched by UUID: its order is not CUDA's."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import pynvml
import torch

MIB = 2**20


@functools.cache
def available() -> bool:
    """Whether the library could be started."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


@functools.cache
def handle(device: torch.device) -> Any | None:
    """NVML's handle of a CUDA device; None on other devices or without the library."""
    if device.type != "cuda" or not available():
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    for form in (f"GPU-{uuid}", f"MIG-{uuid}", uuid):
        gpu = query(pynvml.nvmlDeviceGetHandleByUUID, form)
        if gpu is not None:
            return gpu
    return None


def whole(gpu: Any) -> bool:
    """Whether a handle means a whole GPU. What is counted for the GPU says nothing about one of its MIG instances."""
    mode = query(pynvml.nvmlDeviceGetMigMode, gpu)
    return not (_is_instance(gpu) or (mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE))


def energy_joules(device: torch.device) -> Callable[[], float] | None:
    """The device's energy counter (joules since the driver was loaded), or None where it has none of its own."""
    gpu = handle(device)
    if gpu is None or not whole(gpu) or query(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu) is None:
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1000


def state(device: torch.device) -> dict[str, Any]:
    """What the device is doing now: clocks in MHz, power in W, temperature in C, why clocks are held back, and other
    processes on it. What cannot be read is absent; empty on a processor."""
    gpu = handle(device)
    if gpu is None:
        return {}
    return (_physical(gpu) if whole(gpu) else {"mig_instance": True}) | _company(gpu, device)


def process_bytes(device: torch.device) -> int | None:
    """Device memory of this whole process, CUDA's context and all libraries included; None where it cannot be seen."""
    gpu = handle(device)
    return None if gpu is None else processes(gpu).get(os.getpid())


def processes(gpu: Any) -> dict[int, int | None]:
    """Processes with a context on the device, or on our MIG instance of it: process id to bytes, None where hidden.

    In a container the ids may be those of the host, or all of them be hidden.
    """
    for part in _parts(gpu):
        listed = query(pynvml.nvmlDeviceGetComputeRunningProcesses, part) or ()
        memory = {process.pid: process.usedGpuMemory for process in listed}
        if part is gpu or os.getpid() in memory:
            return memory
    return {}


def describe() -> dict[str, Any]:
    """Driver and every GPU: name, UUID, memory, clocks in MHz, power limit in W, temperature in C."""
    if not available():
        return {}
    gpus = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = query(pynvml.nvmlDeviceGetMemoryInfo, gpu)
        limit = query(pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu)
        facts = {
            "name": query(pynvml.nvmlDeviceGetName, gpu),
            "uuid": query(pynvml.nvmlDeviceGetUUID, gpu),
            "memory_bytes": memory.total if memory is not None else None,
            "sm_mhz": query(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
            "sm_max_mhz": query(pynvml.nvmlDeviceGetMaxClockInfo, gpu, pynvml.NVML_CLOCK_SM),
            "memory_mhz": query(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": limit / 1000 if limit is not None else None,
            "temperature_c": query(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
        }
        gpus.append({name: value for name, value in facts.items() if value is not None})
    cuda = query(pynvml.nvmlSystemGetCudaDriverVersion)
    return {
        "driver": query(pynvml.nvmlSystemGetDriverVersion),
        "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda is not None else None,
        "gpus": gpus,
    }


def query(function: Callable[..., Any], *args: Any) -> Any | None:
    """What a function of the library returns, or None where this device or driver does not know it."""
    try:
        return function(*args)
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):
        return None


def _physical(gpu: Any) -> dict[str, Any]:
    power = query(pynvml.nvmlDeviceGetPowerUsage, gpu)
    # drivers before 535 know the reasons by their older name only
    bits = query(pynvml.nvmlDeviceGetCurrentClocksEventReasons, gpu)
    if bits is None:
        bits = query(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, gpu)
    facts = {
        "sm_mhz": query(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
        "memory_mhz": query(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_MEM),
        "power_w": round(power / 1000, 1) if power is not None else None,
        "temperature_c": query(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
        "clocks_held_by": None if bits is None else [name for bit, name in _reasons().items() if bits & bit],
    }
    return {name: value for name, value in facts.items() if value is not None}


@functools.cache
def _reasons() -> dict[int, str]:
    """Why clocks are not at their highest, by bit, in the library's own words: `sw_power_cap`, `hw_slowdown`."""
    reasons: dict[int, str] = {}
    for name, bit in vars(pynvml).items():
        match = re.fullmatch("nvmlClocks(?:Event|Throttle)Reason([A-Z][A-Za-z]+)", name)
        if match and bit and bit & (bit - 1) == 0:  # not the union of all
            reasons.setdefault(bit, re.sub("(?<!^)(?=[A-Z])", "_", match[1]).lower())
    return reasons


def _company(gpu: Any, device: torch.device) -> dict[str, Any]:
    """Other processes on the device and what they hold, and memory in use that torch did not take."""
    # the second version leaves out what the driver keeps for itself
    memory = query(pynvml.nvmlDeviceGetMemoryInfo, gpu, pynvml.nvmlMemory_v2) if _parts(gpu) == [gpu] else None
    listed = processes(gpu)
    ours = os.getpid() in listed
    others = {pid: held for pid, held in listed.items() if pid != os.getpid()}
    known = [held for held in others.values() if held is not None]
    facts = {
        # In a container our process may be listed under another id: one of the others is then this one.
        "other_processes": len(others) if ours else len(others) - 1 if others else None,
        "other_processes_mib": sum(known) // MIB if ours and known else None,
        "outside_torch_mib": (memory.used - torch.cuda.memory_reserved(device)) // MIB if memory is not None else None,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _is_instance(gpu: Any) -> bool:
    answer = query(pynvml.nvmlDeviceIsMigDeviceHandle, gpu)
    return bool(getattr(answer, "value", answer))


def _parts(gpu: Any) -> list[Any]:
    """The device itself, or the MIG instances of a GPU that is divided."""
    if whole(gpu) or _is_instance(gpu):
        return [gpu]
    indices = range(query(pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu) or 0)
    parts = [query(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, index) for index in indices]
    return [part for part in parts if part is not None]
