"""What the numbers were measured on and with. Never names the host or a user: of the host it gives a fingerprint."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import effbench

PACKAGES = ("torch", "transformers", "lm_eval", "triton", "numpy", "tokenizers", "datasets", "safetensors")
MACHINE_IDS = ("/etc/machine-id", "/sys/class/dmi/id/board_name", "/sys/class/dmi/id/product_name")
CONTAINERS = ("/.dockerenv", "/run/.containerenv")  # there only in a container
SOURCE = ("effbench", "methods", "kernels", "suites")  # of the checkout; results may change while running


def describe(device: str = "cpu") -> dict[str, Any]:
    """Plain values; `machine` is a slug of the device the cell runs on, such as `amd-epyc-2core`."""
    import torch

    from effbench.machine import nvml

    cores, cpu = usable_cores(), cpu_model()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "cores": cores,
        "memory_bytes": memory_bytes(),
        "host": host(),
        "threads": torch.get_num_threads(),
        "packages": packages(),
        "cuda": torch.version.cuda,
        **nvml.describe(),
        **source(),
    }
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{cpu} {cores}core"
    facts["machine"] = slug(name)
    return {name: value for name, value in facts.items() if value is not None}


@functools.cache
def host() -> str:
    """A fingerprint by which two hosts are told apart: equal as long as hardware and kernel are the same.

    A digest of the machine's id, its name, processor, cores, memory in GiB and kernel. A container's name is left out
    because it is a new one at every start.
    """
    container = os.environ.get("KUBERNETES_SERVICE_HOST") or any(map(os.path.exists, CONTAINERS))
    memory = memory_bytes()
    parts = (
        *map(_content, MACHINE_IDS),
        "" if container else platform.node(),
        cpu_model(),
        str(usable_cores()),
        "" if memory is None else str(round(memory / 2**30)),
        f"{platform.system()} {platform.release()} {platform.machine()}",
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _content(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packages() -> dict[str, str]:
    """Versions of what decides numbers; a package that is not installed is absent."""
    versions = {"effbench": effbench.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


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
        # Without optional locks: an interrupt may end git at any moment, and its lock would stay in the checkout.
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
