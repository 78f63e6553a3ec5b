"""What the numbers were measured on and with. Never names the host or a user."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import effbench

PACKAGES = ("torch", "transformers", "lm_eval", "triton", "numpy", "tokenizers", "datasets", "safetensors")
SOURCE = ("effbench", "methods", "kernels", "suites")  # of the checkout; results may change while running


def describe(device: str = "cpu") -> dict[str, Any]:
    """Plain values; `machine` is a slug of the device the cell runs on, such as `amd-epyc-2core`."""
    import torch

    from effbench.machine import nvml

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = cpu_model()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "cores": cores,
        "memory_bytes": memory_bytes(),
        "threads": torch.get_num_threads(),
        "packages": packages(),
        "cuda": torch.version.cuda,
        **nvml.describe(),
        **source(),
    }
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{cpu} {cores}core"
    facts["machine"] = slug(name)
    return {name: value for name, value in facts.items() if value is not None}


def packages() -> dict[str, str]:
    """Versions of what decides numbers; a package that is not installed is absent."""
    found = {"effbench": effbench.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """The processor's name as its maker gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int | None:
    """Memory of the machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def slug(name: str) -> str:
    """A device name in lower case, words joined by dashes, without marks, clock rates and filler."""
    name = re.sub(r"\((r|tm)\)|@.*?hz|\b(cpu|processor|\d+-core)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-")


@functools.cache
def source() -> dict[str, Any]:
    """`commit` and `dirty` of the checkout that effbench runs from; empty for an installed copy."""
    root = Path(effbench.__file__).resolve().parent.parent
    if _git(root, "ls-files", "--error-unmatch", "effbench/__init__.py") is None:
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *(part for part in SOURCE if (root / part).exists()))
    if commit is None or changes is None:
        return {}
    return {"commit": commit, "dirty": bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
