"""`effbench list`: name what there is."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE
from effbench.core.usage import nearest, parse

if TYPE_CHECKING:
    pass
from effbench.cli.command import JSON, Command, print_columns


@dataclasses.dataclass
class ListOptions:
    """What `effbench list records` can be told."""

    suite: str | None = None  # records of this suite
    recipe: str | None = None  # records of recipes that fit this pattern, such as gptq*
    outcome: str | None = None  # records that ended so
    results: str = "results"  # folder of records


def _list(arguments: argparse.Namespace) -> int:
    listings: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "methods": method_rows,
        "suites": _suites,
        "models": _models,
        "ops": _ops,
        "tasks": _tasks,
    }
    what = arguments.what or "methods"
    options = parse(ListOptions, arguments.options)
    listings["records"] = lambda: _records(options)
    if what not in listings:
        raise Usage(f"cannot list {what!r}{nearest(what, listings)}")
    rows = listings[what]()
    if arguments.json:
        print(json.dumps(rows, indent=1, default=str))
    else:
        shown = [key for key in (rows[0] if rows else {}) if key not in ("parameters", "facts")]
        print_columns([[str(row[key]) for key in shown] for row in rows])
    return 0


def _records(options: ListOptions) -> list[dict[str, Any]]:
    from effbench.records.index import list_records

    filters = {"suite": options.suite, "recipe": options.recipe, "outcome": options.outcome}
    rows, notes = list_records(Path(options.results), filters)
    for note in notes:
        print(f"effbench: {note}", file=sys.stderr)
    return [{key: "" if value is None else value for key, value in row.items()} for row in rows]


def method_rows() -> list[dict[str, Any]]:
    return [
        {
            "key": entry.key,
            "family": entry.family,
            "kind": entry.kind,
            "paper": entry.paper,
            "summary": entry.summary,
            "parameters": entry.parameters,
            "facts": {name: sorted(fact) if isinstance(fact, set) else fact for name, fact in entry.facts.items()},
        }
        for entry in registry.catalog().values()
    ]


def _suites() -> list[dict[str, Any]]:
    from effbench.cells import suite

    headers = [suite.header(name) for name in suite.names()]
    return [{key: header.get(key) for key in ("name", "version", "description")} for header in headers]


def _models() -> list[dict[str, Any]]:
    from effbench.sources.shapes import SHAPES

    return [
        {"name": "tiny", "summary": "small Llama that ships with effbench, trained on a generated world"},
        {"name": "FOLDER", "summary": "local checkpoint in safetensors with its config.json and tokenizer"},
        {"name": "ORG/NAME", "summary": "model on the Hugging Face Hub"},
        *(
            {
                "name": f"shape:{name}",
                "summary": f"random weights, {shape['model_type']}, for memory and speed only",
            }
            for name, shape in SHAPES.items()
        ),
    ]


def _ops() -> list[dict[str, Any]]:
    from effbench.ops import ops

    folder = PACKAGE / "kernels"
    return [{"name": name, "summary": _summary(folder / name / "reference.py")} for name in ops()]


def _summary(path: Path) -> str:
    """First line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0] if path.is_file() else ""


def _tasks() -> list[dict[str, Any]]:
    found = []
    for path in sorted((PACKAGE / "tiny" / "tasks").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(task|output_type): *(\S+)$", text, re.MULTILINE))
        if "task" in fields:
            found.append({"name": fields["task"], "type": fields.get("output_type", "multiple_choice")})
    return found


COMMAND = Command(
    _list,
    "name what there is",
    {"[what]": "methods (if left out), suites, models, ops, tasks or records"},
    ListOptions,
    JSON,
)
