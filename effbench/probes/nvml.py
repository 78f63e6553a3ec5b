"""NVIDIA's management library, where there is one. Devices are matched by UUID: its order is not CUDA's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pynvml
import torch


@functools.cache
def available() -> bool:
    """Whether the library could be started."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def handle(device: torch.device) -> Any | None:
    """NVML's handle of a CUDA device; None on other devices or without the library."""
    if device.type != "cuda" or not available():
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    for form in (uuid, f"GPU-{uuid}"):
        found = asked(pynvml.nvmlDeviceGetHandleByUUID, form)
        if found is not None:
            return found
    return None


def energy_joules(device: torch.device) -> Callable[[], float] | None:
    """The device's energy counter (joules since the driver was loaded), or None where it has none."""
    gpu = handle(device)
    if gpu is None or asked(pynvml.nvmlDeviceGetTotalEnergyConsumption, gpu) is None:
        return None
    return lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) / 1000


def describe() -> dict[str, Any]:
    """Driver and every GPU: name, UUID, memory, clocks in MHz, power limit in W, temperature in C."""
    if not available():
        return {}
    gpus = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = asked(pynvml.nvmlDeviceGetMemoryInfo, gpu)
        limit = asked(pynvml.nvmlDeviceGetEnforcedPowerLimit, gpu)
        facts = {
            "name": asked(pynvml.nvmlDeviceGetName, gpu),
            "uuid": asked(pynvml.nvmlDeviceGetUUID, gpu),
            "memory_bytes": memory.total if memory is not None else None,
            "sm_mhz": asked(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_SM),
            "sm_max_mhz": asked(pynvml.nvmlDeviceGetMaxClockInfo, gpu, pynvml.NVML_CLOCK_SM),
            "memory_mhz": asked(pynvml.nvmlDeviceGetClockInfo, gpu, pynvml.NVML_CLOCK_MEM),
            "power_limit_w": limit / 1000 if limit is not None else None,
            "temperature_c": asked(pynvml.nvmlDeviceGetTemperature, gpu, pynvml.NVML_TEMPERATURE_GPU),
        }
        gpus.append({name: value for name, value in facts.items() if value is not None})
    cuda = asked(pynvml.nvmlSystemGetCudaDriverVersion)
    return {
        "driver": asked(pynvml.nvmlSystemGetDriverVersion),
        "driver_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda is not None else None,
        "gpus": gpus,
    }


def asked(question: Callable[..., Any], *args: Any) -> Any | None:
    """The answer, or None where this device or driver has none."""
    try:
        return question(*args)
    except pynvml.NVMLError:
        return None
