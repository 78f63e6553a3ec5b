"""Records that were not measured here but taken from the results of another tool."""

from __future__ import annotations

from effbench.records.record import Record

TIER = "imported"  # no tier of a suite has this name, so imported records share no table with measured ones


def is_imported(record: Record) -> bool:
    """Whether a record was not measured here."""
    return record.cell.tier == TIER
