"""Whether records were measured by the present source, model and data."""

from __future__ import annotations

import functools

from effbench import sources
from effbench.cells.plan import digests
from effbench.core.errors import Usage
from effbench.core.recipe import parse
from effbench.records.record import Record


def is_stale(record: Record) -> bool:
    """Whether a run of the same cell today would depend on anything else than the record did."""
    cell = record.cell
    probes = cell.settings.get("probes")
    if not isinstance(probes, (list, tuple)):
        return True
    try:
        return _present(cell.steps, tuple(probes), cell.model, cell.data) != cell.digests
    except (Usage, ValueError):  # a method, a probe, the model or the data is no more
        return True


@functools.lru_cache(maxsize=4096)
def _present(steps: str, probes: tuple[str, ...], model: str, data: str) -> dict[str, str]:
    return digests(parse(steps), probes, sources.model(model).digest, sources.data(data).digest)
