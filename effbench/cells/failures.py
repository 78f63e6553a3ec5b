"""What an exception means for a cell: its outcome, the reason, and how much memory was lacking."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import re
import sys
import traceback

from effbench.core.errors import Outcome, OutOfMemory, Unavailable, Usage, first_line
from effbench.core.packages import method_line
from effbench.machine.devices import gib
from effbench.records.record import OutcomeName

NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory"  # torch's allocator on a processor
    r"|CUDA error: out of memory|\[CUDA\]: out of memory"  # the driver, by way of torch and of Triton
    r"|_STATUS_(\w+_)?ALLOC(ATION)?_FAILED|CUSPARSE_STATUS_INSUFFICIENT_RESOURCES"  # CUDA's libraries
)
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
AMOUNT = rf"([\d.]+) ?({'|'.join(UNITS)})"
AMOUNTS = {  # how torch and numpy word them
    "asked_bytes": re.compile(rf"(?:ried|nable) to allocate {AMOUNT}"),
    "free_bytes": re.compile(rf"of which {AMOUNT} is free"),
    "total_bytes": re.compile(rf"total capacity of {AMOUNT}"),
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
UNAVAILABLE = {  # package: exceptions of it that say that something from outside could not be had
    "builtins": ("ConnectionError", "ModuleNotFoundError"),
    "socket": ("gaierror",),
    "httpx": ("TransportError", "HTTPStatusError"),
    "requests": ("RequestException",),
    "huggingface_hub": ("HfHubHTTPError", "LocalEntryNotFoundError", "LocalTokenNotFoundError"),
    "datasets": ("DatasetNotFoundError", "DataFilesNotFoundError"),
}


@dataclasses.dataclass(frozen=True)
class Failure:
    """How a cell, or a part of one, failed."""

    outcome: OutcomeName
    reason: str
    traceback: str = ""  # of crashes only
    shortfall: dict[str, int] = dataclasses.field(default_factory=dict)  # of oom: asked, free and total bytes, if known


def diagnose(error: BaseException) -> Failure:
    """The failure that an exception stands for."""
    message = first_line(error) if str(error).strip() else ""
    if isinstance(error, OutOfMemory):
        return Failure("oom", str(error), shortfall=error.shortfall)
    if any(isinstance(cause, OSError) and cause.errno in NO_SPACE for cause in list_causes(error)):
        trace = "".join(traceback.format_exception(error))
        return Failure("crashed", f"{type(error).__name__}: no space left on the disk", trace)
    if is_unavailable(error):
        return Failure("unavailable", message or type(error).__name__)
    if isinstance(error, Outcome):
        return Failure(error.name, str(error))  # type: ignore[arg-type]
    if isinstance(error, Usage):  # seen only with the model in hand
        return Failure("refused", str(error))
    if isinstance(error, FloatingPointError):
        return Failure("diverged", message or "a number is not finite")
    no_memory = isinstance(error, RuntimeError) and NO_MEMORY.search(message)
    if no_memory or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _out_of_memory(message or "out of memory")
    return Failure(
        "crashed",
        f"{type(error).__name__}: {message}".removesuffix(": ") + method_line(error),
        "".join(traceback.format_exception(error)),
    )


def is_unavailable(error: BaseException) -> bool:
    """Whether an exception, or one that led to it, says that something from outside could not be had."""
    return any(
        isinstance(cause, Unavailable) or kind.__name__ in UNAVAILABLE.get(kind.__module__.partition(".")[0], ())
        for cause in list_causes(error)
        for kind in type(cause).__mro__
    )


def list_causes(error: BaseException) -> list[BaseException]:
    """An exception and those that led to it."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and not any(cause is one for one in found):
        found.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return found


def broken(device: str) -> str:
    """Why nothing can be computed any more on a CUDA device by this process; empty if it can.

    A failed assertion or an illegal access in a kernel spoils the context: every later call of CUDA fails with the same
    error.
    """
    torch = sys.modules.get("torch")
    if not device.startswith("cuda") or torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return first_line(error)
    return ""


def _out_of_memory(message: str) -> Failure:
    matches = {name: pattern.search(message) for name, pattern in AMOUNTS.items()}
    sizes = {name: round(float(match[1]) * UNITS[match[2]]) for name, match in matches.items() if match is not None}
    if "free_bytes" not in sizes:
        sizes |= _left()
    if "free_bytes" not in sizes or "total_bytes" not in sizes:
        return Failure("oom", message, shortfall=sizes)
    what = f"tried to allocate {gib(sizes['asked_bytes'])}" if "asked_bytes" in sizes else message
    left = f"{gib(sizes['free_bytes'])} of {gib(sizes['total_bytes'])} were free"
    return Failure("oom", f"{what}; {left}", shortfall=sizes)


def _left() -> dict[str, int]:
    """Free and all memory of the CUDA device in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            free, total = torch.cuda.mem_get_info()
            return {"free_bytes": free, "total_bytes": total}
    return {}
