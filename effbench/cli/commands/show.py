"""`effbench show`: tell about a method, suite or preset."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE
from effbench.core.usage import nearest, parse

if TYPE_CHECKING:
    pass
from effbench.cli.command import JSON, Command, print_columns
from effbench.cli.commands.list import method_rows

SHOWN = ("bits_per_weight", "token_ppl", "kl_nats_per_token", "tasks_acc")  # metrics of `effbench show`


@dataclasses.dataclass
class ShowOptions:
    """What `effbench show` can be told."""

    results: str = "results"  # folder of records


def _show(arguments: argparse.Namespace) -> int:
    from effbench.cells import suite

    results = Path(parse(ShowOptions, arguments.options).results)
    name, methods, presets = arguments.name, registry.catalog(), registry.presets()
    if name in methods:
        facts = next(row for row in method_rows() if row["key"] == name)
        facts |= {
            "file": str(methods[name].path),
            "tests": _tests(name),
            "measured": _measured(name, results),
        }
    elif name in presets:
        facts = {"preset": name, "steps": presets[name]}
    elif name in suite.names():
        facts = suite.header(name)
    else:
        raise Usage(f"unknown name {name!r}{nearest(name, [*methods, *presets, *suite.names()])}")
    if arguments.json:
        print(json.dumps(facts, indent=1, default=str))
        return 0
    for key, value in facts.items():
        if isinstance(value, Mapping):
            print(f"{key}:")
            print_columns([[f"  {field}", str(text)] for field, text in value.items()])
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            print(f"{key}:")
            print_columns([["  ", *(str(text) for text in row.values())] for row in value])
        else:
            print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _tests(key: str) -> list[str]:
    """Test files of the checkout that name a method."""
    folder = PACKAGE.parent / "tests"
    return sorted(
        str(path.relative_to(folder.parent))
        for path in folder.rglob("test_*.py")
        if f"{key}(" in path.read_text(encoding="utf-8") or f".{key}" in path.read_text(encoding="utf-8")
    )


def _measured(key: str, results: Path) -> list[dict[str, Any]]:
    """The last records of recipes that use a method, with their telling metrics."""
    from effbench.records.store import Store, latest

    return [
        {
            "suite": f"{record.cell.suite} v{record.cell.suite_version}",
            "recipe": record.cell.recipe,
            "model": record.cell.model,
            "seed": record.cell.seed,
            "outcome": record.outcome,
            **{name: f"{record.metrics[name].value:.4g}" for name in SHOWN if name in record.metrics},
        }
        for record in latest(Store(results).read()[0]).values()
        if any(step["method"] == key for step in record.cell.resolved)
    ]


COMMAND = Command(
    _show,
    "tell about a method, suite or preset, and its last measured rows",
    {"name": "of a method, suite or preset"},
    ShowOptions,
    JSON,
)
