"""Whether records were measured by the present source, model and data. Imports no method, so it answers at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from effbench import sources
from effbench.cells.plan import FILES, METHOD, digest_method, digest_shared
from effbench.core.errors import Usage
from effbench.core.registry import entry
from effbench.records.record import Record
from effbench.sources import DataSource, Source


def is_stale(record: Record) -> bool:
    """Whether a run of the same cell today would depend on anything else than the record did.

    A folder or file of one's own that is not in the working folder is taken as the record says.
    """
    cell = record.cell
    try:
        model = _digest_source(sources.find_model, cell.model) or cell.digests["model"]
        data = _digest_source(sources.find_data, cell.data) or cell.digests["data"]
        shared = _digest_shared(tuple(cell.settings["probes"]), model, data)
        named = {f"{METHOD}{step['method']}" for step in cell.resolved}
        named |= {name for name in cell.digests if name.startswith(METHOD)}  # parts of steps have their own
        own = {name: _digest_step(name.removeprefix(METHOD)) for name in named}
    except (Usage, ValueError, KeyError, TypeError):  # a method, a probe, the model or the data is no more
        return True
    return shared | own != {name: digest for name, digest in cell.digests.items() if name != FILES}  # taken as it is


@functools.lru_cache(maxsize=256)
def _digest_source(find: Callable[[str], Source | DataSource | None], shown: str) -> str | None:
    """Digest of a model or data by their shown name; None where that is a folder or file that is not here."""
    source = find(shown)
    return None if source is None else source.digest


@functools.lru_cache(maxsize=256)
def _digest_shared(probes: tuple[Any, ...], model: str, data: str) -> dict[str, str]:
    return digest_shared(probes, model, data)


@functools.lru_cache(maxsize=1024)
def _digest_step(key: str) -> str:
    method = entry(key)
    return digest_method(method.module, method.kind)
