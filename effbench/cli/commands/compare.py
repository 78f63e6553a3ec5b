"""`effbench compare`: two rows, or all rows of two folders or git revisions, metric by metric."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from effbench.cli.command import JSON, Command
from effbench.core.errors import Usage
from effbench.core.usage import parse

if TYPE_CHECKING:
    from effbench.report.changes import Change
    from effbench.report.sides import Rows, Tables

Percent = Annotated[float, msgspec.Meta(ge=0)]


@dataclasses.dataclass
class CompareOptions:
    """What `effbench compare` can be told."""

    suite: str | None = None  # the suite in which the names are looked up
    results: str | None = None  # folder of records; by default runs, for git revisions the published results
    tier: str | None = None  # only this tier
    model: str | None = None  # only this model
    rows: str | None = None  # of two folders, files or revisions: only these rows, names or patterns between commas
    fail_on: str | None = None  # exit code 1 on any of these verdicts, such as worse,slower,larger,more,failed,missing
    effect: Percent = 2.0  # smallest difference of speed, size, energy and cost that gets a verdict, in percent
    quality_effect: Percent = 0.5  # the same of quality: points of a share, percent of a perplexity


def _compare(arguments: argparse.Namespace) -> int:
    names = arguments.a, arguments.b
    for name in names:
        if "=" in name and name.partition("=")[0] in CompareOptions.__dataclass_fields__:
            raise Usage(f"{name!r} is an option: two names are needed before it, `effbench compare A B {name}`")
    options = parse(CompareOptions, arguments.options)
    from effbench.report.sides import Rows, Where, open_sides
    from effbench.report.verdicts import Effects, read_words

    fatal = read_words(options.fail_on)
    effects = Effects(options.effect, options.quality_effect)
    with open_sides(names, Where(options.results, options.suite, options.tier, options.model)) as sides:
        act = _compare_rows if isinstance(sides[0], Rows) else _compare_tables
        found = act(sides, effects, options.rows, arguments.json)  # type: ignore[arg-type]
    return int(bool(fatal & set(found)))


def _compare_rows(sides: tuple[Rows, Rows], effects: Any, rows: str | None, as_json: bool) -> Iterable[str]:
    """Print the comparison of two rows; the verdicts that were given."""
    from effbench.report.compare import compare_rows, correct, find_pair, write_comparison
    from effbench.report.verdicts import judge

    if rows is not None:
        raise Usage("rows= chooses rows of folders, files and revisions: leave it out where two rows are named")
    before, after = find_pair(sides)
    changes = compare_rows(before, after)
    adjusted = correct(changes.found)
    verdicts = [judge(one.metric, one.test, p, effects) for one, p in zip(changes.found, adjusted, strict=True)]
    if as_json:
        parts = zip(changes.found, adjusted, verdicts, strict=True)
        _print_json([{"row": after.recipe} | _to_plain(one, p, verdict) for one, p, verdict in parts])
    else:
        print(write_comparison(before, after, changes, effects))
    failed = before.worst.outcome == "ok" != after.worst.outcome
    return [*verdicts, *(["failed"] if failed else [])]


def _compare_tables(sides: tuple[Tables, Tables], effects: Any, rows: str | None, as_json: bool) -> Iterable[str]:
    """Print the comparison of all rows of two places; the verdicts that were given."""
    from effbench.report.compare_tables import compare_tables, write_tables

    comparison = compare_tables(*sides, effects, rows)
    if as_json:
        told = [
            {"place": one.place, "row": one.row} | _to_plain(one.change, one.p, one.verdict)
            for one in comparison.findings
        ]
        _print_json([*told, *map(dataclasses.asdict, comparison.rows)])
    else:
        print(write_tables(*sides, comparison, effects))
    return comparison.count()


def _to_plain(change: Change, p: float | None, verdict: str) -> dict[str, Any]:
    """A change for JSON; numbers that are not finite are None."""
    numbers = {
        "a": change.before,
        "b": change.after,
        "b/a" if change.relative else "b-a": change.value,
        "low": change.low,
        "high": change.high,
        "p": None if p is None else change.test.p,
        "p_holm": p,
    }
    kept = {name: value if value is not None and math.isfinite(value) else None for name, value in numbers.items()}
    return {"metric": change.metric, "verdict": verdict, "basis": change.basis, **kept, "n": change.test.n}


def _print_json(rows: Sequence[dict[str, Any]]) -> None:
    print(json.dumps(rows, indent=1))


def _notes() -> str:
    return (
        "A and B are two rows, each the name of a recipe or a record's file; or two places with rows, each a folder\n"
        "of results, a publication's file, a git revision or REVISION:FOLDER, of which all rows are compared.\n"
        "Exit code 0; 1 if a verdict is one of fail_on=; 2 if there is nothing to compare."
    )


COMMAND = Command(
    _compare,
    "compare two rows, folders or git revisions, with a verdict for each metric",
    {"a": "recipe, record's file, folder of results, publication's file, or git revision", "b": "the other"},
    CompareOptions,
    JSON,
    notes=_notes,
)
