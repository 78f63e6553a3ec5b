"""The document of `effbench bench`: what was measured, or compiled, on one machine. One schema writes and reads it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from effbench.core.errors import Usage, first_line

SCHEMA = 2
Case = dict[str, Any]


class Quartiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one figure over all rounds."""

    p25: float
    median: float
    p75: float


class Row(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One contender at one case; without times where it is absent, failed or not correct."""

    op: str
    case: Case
    name: str
    version: str | None = None
    peer: bool = False  # somebody else's
    note: str = ""
    error: float | Literal["nan", "inf"] | None = None  # largest, see `Op.measure_error`
    ok: bool | None = None  # whether that is tolerable
    absent: str | None = None  # why it does not take part
    failed: str | None = None  # what it raised
    bytes: int | None = None  # that must move
    rotated_bytes: int | None = None  # of all copies that the calls go through
    graph_us: Quartiles | None = None  # per call, in a graph
    call_us: Quartiles | None = None  # per call, launched from Python
    speedup: Quartiles | None = None  # times faster than the yardstick of its case, round by round
    copy_percent: float | None = None  # of the device's ceilings
    read_percent: float | None = None
    matmul_percent: float | None = None
    goals: dict[str, bool] = msgspec.field(default_factory=dict)  # level: reached


class CompiledRow(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one kernel of a backend became at one case; without numbers where it is absent or failed."""

    op: str
    case: Case
    name: str  # of the backend
    kernel: str | None = None
    registers: int | None = None
    spills: int | None = None  # bytes
    shared: int | None = None  # bytes
    matrix_products: int | None = None  # tensor-core instructions
    wide_loads: float | None = None  # share of the loads of global memory that bring 16 bytes to a lane
    lane_instructions: float | None = None  # per number
    absent: str | None = None
    failed: str | None = None


class Ceilings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a device attains at most, the best of several tries each; measured by `effbench.machine.ceilings`."""

    copy_bytes_per_s: float  # read and written
    read_bytes_per_s: float
    matmul_flop_per_s: float  # a multiply-add is 2
    matmul_dtype: str
    graph_node_s: float | None  # one kernel of one number within a CUDA graph; None where there are no graphs

    @property
    def bandwidth(self) -> float:
        """Attainable bytes/s: the ceiling of a step that reads every weight once."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)


@dataclasses.dataclass
class Facts:
    """What captions say of an environment."""

    machine: str
    packages: dict[str, str]
    driver: str | None = None
    commit: str | None = None
    dirty: bool = False


class _Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    schema: int = SCHEMA
    environment: dict[str, Any]  # of `effbench.machine.environment`, whole

    def __post_init__(self) -> None:
        self.facts  # noqa: B018  an environment that lacks them is none

    @property
    def facts(self) -> Facts:
        """The environment as far as captions need it. Raises `msgspec.ValidationError`."""
        return msgspec.convert(self.environment, Facts)


class Timings(_Document, kw_only=True, tag="timed"):
    """Kernels timed beside each other."""

    dtype: str
    rounds: int
    ceilings: Ceilings
    rows: list[Row]
    left_out: list[str]  # cases, for want of time


class Compilation(_Document, kw_only=True, tag="compiled"):
    """Kernels compiled for a GPU that need not be there."""

    rows: list[CompiledRow]


Document = Timings | Compilation


class _Version(msgspec.Struct):
    schema: int


def encode(document: Document) -> str:
    """As JSON, one value a line."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"


def read(path: Path) -> Document:
    """The document in a file. Raises `Usage` that names the file for anything else."""
    try:
        text = path.read_bytes()
        version = msgspec.json.decode(text, type=_Version).schema
        if version != SCHEMA:
            raise Usage(f"{path}: written by another version of effbench (schema {version}, not {SCHEMA})")
        document: Document = msgspec.json.decode(text, type=Document)
        return document
    except (OSError, ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise Usage(f"{path}: not a document of `effbench bench` ({first_line(error)})") from None


def finite(error: float) -> float | Literal["nan", "inf"]:
    """An error as JSON can hold it."""
    if math.isnan(error):
        return "nan"
    return "inf" if math.isinf(error) else error
