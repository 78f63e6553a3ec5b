"""All rows of two places compared: of two folders, files or git revisions of results, one by one."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from effbench.core.errors import Usage
from effbench.report.changes import Change, Changes, find_changes
from effbench.report.choice import Choice
from effbench.report.compare import (
    RATIOS,
    correct,
    find_obstacle,
    write_effects,
    write_notes,
    write_ratio,
)
from effbench.report.groups import Row, Table, find_place, get_host
from effbench.report.sides import Tables
from effbench.report.text import DASH, LONGEST, markdown_table, one_line, rounded
from effbench.report.verdicts import Effects, judge

HEADER = ("row", "metric", "A", "B", "change", "95 % interval", "p (Holm)", "verdict")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One metric of one row, with its verdict over all that was compared."""

    place: str  # suite, tier and model
    row: str
    change: Change
    p: float | None  # after Holm; None for what was counted
    verdict: str


@dataclasses.dataclass(frozen=True)
class RowFinding:
    """A row of which nothing could be compared, or that ended otherwise than before."""

    place: str
    row: str
    verdict: str  # failed, missing or incomparable; new or mended, which are no faults
    why: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What became of all rows of two places."""

    findings: tuple[Finding, ...]
    rows: tuple[RowFinding, ...]
    compared: int  # rows
    changes: tuple[Changes, ...]  # of the rows that were compared

    def count(self) -> Counter[str]:
        """How often each verdict was given."""
        return Counter([one.verdict for one in self.findings] + [one.verdict for one in self.rows])


def compare_tables(before: Tables, after: Tables, effects: Effects, rows: str | None = None) -> Comparison:
    """Compare the rows that both places have, and correct for all tests together.

    Rows are the same by their names, else by their steps, within tables of one suite, tier, model and data. Raises
    `Usage` where there is no such row.
    """
    choice = Choice.read(rows, None)
    choice.check([*before.found, *after.found])
    apart: list[RowFinding] = []
    compared: list[tuple[str, Row, Changes]] = []
    for left, right in _pair_tables(before.found, after.found):
        place = _name_place(right or left)  # type: ignore[arg-type]
        sides = [choice.select_rows(table) if table else [] for table in (left, right)]
        for old, new in _pair_rows(*sides):
            if (finding := _judge_row(place, old, new)) is not None:
                apart.append(finding)
            elif old is not None and new is not None and old.worst.outcome == "ok":
                compared.append((place, new, find_changes(old, new)))
    if not compared and not any(one.verdict in ("failed", "incomparable", "mended") for one in apart):
        raise Usage(
            f"{before.name[:LONGEST]} and {after.name[:LONGEST]} have no row in common: there is "
            f"{_list_places(before)} in one and {_list_places(after)} in the other"
        )
    flat = [(place, row, change) for place, row, changes in compared for change in changes.found]
    adjusted = correct([change for *_, change in flat])
    findings = [
        Finding(place, row.recipe, change, p, judge(change.metric, change.test, p, effects))
        for (place, row, change), p in zip(flat, adjusted, strict=True)
    ]
    return Comparison(tuple(findings), tuple(apart), len(compared), tuple(changes for *_, changes in compared))


def _judge_row(place: str, old: Row | None, new: Row | None) -> RowFinding | None:
    """What there is to say of a row before its metrics are looked at."""
    if old is None or new is None:
        there = new or old
        assert there is not None
        return RowFinding(place, there.recipe, "missing" if new is None else "new", "")
    was, now = old.worst, new.worst
    if now.outcome != "ok":
        if was.outcome != "ok":
            return None
        return RowFinding(place, new.recipe, "failed", f"{now.outcome}: {one_line(now.reason)[:LONGEST]}")
    if was.outcome != "ok":
        return RowFinding(place, new.recipe, "mended", f"was {was.outcome}")
    obstacle = find_obstacle(old, new)
    return RowFinding(place, new.recipe, "incomparable", obstacle) if obstacle else None


def _pair_tables(before: Sequence[Table], after: Sequence[Table]) -> list[tuple[Table | None, Table | None]]:
    """Tables of one suite, tier, model and data: those of one host, version and settings first. Each is taken once."""
    alike = [
        (left, right)
        for left, right in itertools.product(range(len(before)), range(len(after)))
        if _find_subject(before[left]) == _find_subject(after[right])
    ]
    partners: dict[int, int] = {}  # of the tables of the second side
    for left, right in sorted(alike, key=lambda pair: _rank(before[pair[0]], after[pair[1]]), reverse=True):
        if right not in partners and left not in partners.values():
            partners[right] = left
    pairs: list[tuple[Table | None, Table | None]] = [
        (before[partners[right]] if right in partners else None, table) for right, table in enumerate(after)
    ]
    return [*pairs, *((table, None) for left, table in enumerate(before) if left not in partners.values())]


def _rank(old: Table, new: Table) -> tuple[bool, bool, bool, int]:
    cells = old.cell, new.cell
    first, second = old.records[0], new.records[0]
    return (
        get_host(first) == get_host(second),
        cells[0].suite_version == cells[1].suite_version,
        find_place(first) == find_place(second),
        len({row.recipe for row in old.rows} & {row.recipe for row in new.rows}),
    )


def _pair_rows(before: Iterable[Row], after: Iterable[Row]) -> list[tuple[Row | None, Row | None]]:
    """Rows of one name, else of the same steps, in the order of the second side; then those that have no partner."""
    left = {row.recipe: row for row in before}
    pairs: list[tuple[Row | None, Row | None]] = []
    others: list[Row] = []
    for row in after:
        if row.recipe in left:
            pairs.append((left.pop(row.recipe), row))
        else:
            others.append(row)
    by_steps = {row.steps: row for row in left.values()}
    for row in others:
        old = by_steps.pop(row.steps, None)
        if old is not None:
            del left[old.recipe]
        pairs.append((old, row))
    return [*pairs, *((row, None) for row in left.values())]


def _find_subject(table: Table) -> tuple[str, str, str, str]:
    cell = table.cell
    return cell.suite, cell.tier, cell.model, cell.data


def _name_place(table: Table) -> str:
    return f"{table.cell.suite}, {table.cell.tier} tier, model {table.cell.model}"


def _list_places(side: Tables) -> str:
    return "; ".join(dict.fromkeys(map(_name_place, side.found))) or "nothing"


# ---- as text ------------------------------------------------------------------------------------


def write_tables(before: Tables, after: Tables, comparison: Comparison, effects: Effects) -> str:
    """All verdicts by table, and a summary."""
    parts = [f"A: {before.name}\nB: {after.name}"]
    places = dict.fromkeys([one.place for one in comparison.findings] + [one.place for one in comparison.rows])
    for place in places:
        told = [one for one in comparison.findings if one.place == place and one.verdict != "indistinguishable"]
        rows = [one for one in comparison.rows if one.place == place]
        if told:
            parts.append(f"{place}\n\n{markdown_table(HEADER, list(map(_write_line, told)))}")
        if rows:
            parts.append(f"{'' if told else place + ': '}{_write_rows(rows)}")
    parts.append(_sum_up(comparison, effects))
    return "\n\n".join(parts)


def _write_line(finding: Finding) -> list[str]:
    change = finding.change
    p = DASH if finding.p is None else f"{finding.p:.2g}"
    if change.relative:
        _, left, right, ratio, interval, _ = write_ratio(change)
        return [finding.row, change.metric, left, right, f"×{ratio}", interval, p, finding.verdict]
    interval = DASH
    if change.low is not None and change.high is not None:
        interval = f"{rounded(change.low)} to {rounded(change.high)}"
    left, right = (rounded(value, 4) for value in (change.before, change.after))
    sign = "+" if change.value > 0 else ""
    return [finding.row, change.metric, left, right, f"{sign}{rounded(change.value)}", interval, p, finding.verdict]


def _write_rows(rows: Sequence[RowFinding]) -> str:
    """Rows by verdict, those of one reason together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in rows:
        groups.setdefault((one.verdict, one.why), []).append(one.row)
    return "; ".join(
        f"{verdict}{f' ({why})' if why else ''}: {', '.join(names)}" for (verdict, why), names in groups.items()
    )


def _sum_up(comparison: Comparison, effects: Effects) -> str:
    counts = comparison.count()
    told = [f"{count} {verdict}" for verdict, count in sorted(counts.items(), key=lambda item: -item[1])]
    equal = sum(changes.equal for changes in comparison.changes)
    kinds = [[getattr(one, name) for one in comparison.changes] for name in ("untested", "apart", "elsewhere")]
    left_out = Changes((), 0, *(tuple(dict.fromkeys(itertools.chain(*names))) for names in kinds))
    lines = [
        f"{comparison.compared} rows of both, {len(comparison.findings)} differences judged together, {equal} counted "
        f"metrics equal: {', '.join(told) or 'nothing to judge'}.",
        *write_notes(left_out),
        write_effects(effects),
        RATIOS,
    ]
    return "\n".join(lines)
