"""Which rows and columns of tables are wanted."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

from effbench.core.errors import Usage
from effbench.core.usage import LONGEST, nearest
from effbench.report.columns import Column, list_columns, make_columns, make_others
from effbench.report.fronts import is_ranking
from effbench.report.groups import Row, Table

APART = re.compile(r",\s*(?![^(]*\))")  # commas between names; those in the brackets of a recipe are part of it


@dataclasses.dataclass(frozen=True)
class Choice:
    """Rows and columns by name or by pattern with `*` and `?`; all of them where none is named.

    The baseline is always among the rows.
    """

    rows: tuple[str, ...] = ()  # names of recipes
    columns: tuple[str, ...] = ()  # headers, with or without their unit, or names of metrics

    @staticmethod
    def read(rows: str | None, columns: str | None) -> Choice:
        """The choice of two texts in which names stand between commas."""
        names: list[str] = []
        for part in _split(columns):
            if names and part.split()[0] in _list_units():
                names[-1] += f", {part}"  # of a header with its unit, such as KL, nats
            else:
                names.append(part)
        return Choice(tuple(_split(rows)), tuple(names))

    def check(self, tables: Sequence[Table]) -> None:
        """Raise `Usage` for a name that no row or column of the tables has."""
        recipes = [row.recipe for table in tables for row in table.rows]
        for name in self.rows:
            if not any(map(_match(name), recipes)):
                raise Usage(f"rows={name[:LONGEST]}: no row has this name{nearest(name, dict.fromkeys(recipes))}")
        found = [self.find_columns(table.measured) for table in tables]
        for number, name in enumerate(self.columns):
            if not any(columns[number] for columns in found):
                known = {key for table in tables for column in _list_all(table.measured) for key in column.keys}
                raise Usage(f"columns={name[:LONGEST]}: no column or metric has this name{nearest(name, known)}")

    def select_rows(self, table: Table) -> list[Row]:
        """The wanted rows of a table; none where the baseline alone would be left."""
        wanted = [row for row in table.rows if row.is_baseline or any(_match(name)(row.recipe) for name in self.rows)]
        return list(table.rows) if not self.rows else [] if all(row.is_baseline for row in wanted) else wanted

    def find_columns(self, measured: Sequence[str]) -> list[list[Column]]:
        """The columns of each name, one of a plain name and all of a pattern, where these metrics were measured."""
        columns = _list_all(measured) if self.columns else []
        found = []
        for name in self.columns:
            matching = [column for column in columns if any(map(_match(name.casefold()), column.keys))]
            found.append(matching if re.search("[*?]", name) else matching[:1])
        return found

    def select_columns(self, measured: Sequence[str]) -> list[Column]:
        """The chosen columns in the order in which they were named, each once."""
        unique: dict[tuple[str, ...], Column] = {}
        for columns in self.find_columns(measured):
            for column in columns:
                unique.setdefault(column.metrics or (column.header,), column)
        return list(unique.values())


ALL = Choice()


def find_metric(name: str, measured: Sequence[str]) -> str | None:
    """The metric of a name or a header, of those that are better or worse for being more; None where none has it."""
    metrics = list_metrics(measured)
    return metrics.get(name.casefold())


def list_metrics(measured: Sequence[str]) -> dict[str, str]:
    """The metrics by which rows can be ranked, by all names that they have."""
    columns = [column for column in _list_all(measured) if column.metrics and is_ranking(column.metrics[0])]
    named = {key: column.metrics[0] for column in reversed(columns) for key in column.header_keys}
    return named | {name.casefold(): name for name in measured if is_ranking(name)}


def _list_all(measured: Sequence[str]) -> list[Column]:
    """Every column, those of the summary first; metrics that have none get one of their own."""
    columns = [column for detail in make_columns(measured).values() for column in detail]
    return columns + make_others(measured, columns)


def _split(text: str | None) -> list[str]:
    """The names of a text, between commas."""
    return [name for part in APART.split(text or "") if (name := part.strip())]


@functools.cache
def _list_units() -> frozenset[str]:
    """The first word of each unit that stands in a header behind a comma."""
    headers = [column.header for columns in list_columns().values() for column in columns]
    return frozenset(unit.split()[0] for header in headers if (unit := header.partition(", ")[2]))


@functools.cache
def _match(name: str) -> functools.partial[re.Match[str] | None]:
    """Whether a text is the name; `*` and `?` stand for any characters, brackets for themselves."""
    pattern = re.escape(name).replace(r"\*", ".*").replace(r"\?", ".")
    return functools.partial(re.fullmatch, pattern)
