"""`effbench list`: methods, suites, models and whatever else can be named in commands."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effbench.cli.command import JSON, Command, print_columns
from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE, RUNS
from effbench.core.usage import named_path, nearest, parse

APART = ("about", "parameters", "facts")  # of a method, too long for a line


@dataclasses.dataclass
class ListOptions:
    """What `effbench list records` can be told."""

    suite: str | None = None  # records of this suite
    recipe: str | None = None  # records of recipes that fit this pattern, such as gptq*
    outcome: str | None = None  # records that ended so
    results: str = RUNS  # folder of records


def _list(arguments: argparse.Namespace) -> int:
    of_package: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "methods": lambda: [describe(entry) for entry in registry.catalog().values()],
        "suites": _suites,
        "presets": _presets,
        "models": _models,
        "ops": _ops,
        "tasks": _tasks,
    }
    of_file: dict[str, Callable[[str], list[dict[str, Any]]]] = {
        "methods": lambda file: [describe(entry) for entry in registry.entries_in(file)],
        "suites": lambda file: [_suite(file)],
    }
    what = arguments.what or "methods"
    if arguments.file is not None and "=" in arguments.file:  # no file but the first option
        arguments.options.insert(0, arguments.file)
        arguments.file = None
    options = parse(ListOptions, arguments.options)
    of_package["records"] = lambda: _records(options)
    if what not in of_package:
        raise Usage(f"cannot list {what!r}{nearest(what, of_package)}")
    if arguments.options and what != "records":
        raise Usage(f"{arguments.options[0]!r}: options choose among records; write `effbench list records ...`")
    if arguments.file is not None and what not in of_file:
        raise Usage(f"{what} are not listed from a file, {' and '.join(of_file)} are")
    rows = of_package[what]() if arguments.file is None else of_file[what](arguments.file)
    if arguments.json:
        print(json.dumps(rows, indent=1, default=str))
    elif rows:
        _print_rows([{key: value for key, value in row.items() if key not in APART} for row in rows])
    else:
        print(f"effbench: there are no {what}", file=sys.stderr)
    return 0


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """A line per row below the names of the columns."""
    print_columns([list(rows[0]), *(["" if value is None else str(value) for value in row.values()] for row in rows)])


def describe(entry: registry.Entry) -> dict[str, Any]:
    """What is known of a method, as plain values."""
    return {
        "key": entry.key,
        "family": entry.family,
        "kind": entry.kind,
        "paper": entry.paper,
        "summary": entry.summary,
        "about": entry.about,
        "parameters": {
            name: {key: value for key, value in dataclasses.asdict(parameter).items() if key != "name"}
            for name, parameter in entry.parameters.items()
        },
        "facts": {name: sorted(fact, key=str) if isinstance(fact, set) else fact for name, fact in entry.facts.items()},
    }


def _records(options: ListOptions) -> list[dict[str, Any]]:
    from effbench.records.index import list_records

    folder = named_path("results", options.results)
    if not folder.is_dir():
        raise Usage(f"results={options.results}: no such folder; `effbench run suite=quant` makes runs/")
    filters = {"suite": options.suite, "recipe": options.recipe, "outcome": options.outcome}
    rows, notes = list_records(folder, filters)
    for note in notes:
        print(f"effbench: {note}", file=sys.stderr)
    return rows


def _suites() -> list[dict[str, Any]]:
    from effbench.cells import suite

    return [_suite(name) for name in suite.names()]


def _suite(name: str) -> dict[str, Any]:
    from effbench.cells import suite

    header = suite.header(name)
    return {key: header.get(key) for key in ("name", "version", "description")}


def _presets() -> list[dict[str, Any]]:
    from effbench.core.recipe import preset_parameters

    return [
        {"name": name, "steps": steps, "takes": ", ".join(parameter.name for _, parameter in preset_parameters(name))}
        for name, steps in registry.presets().items()
    ]


def _models() -> list[dict[str, Any]]:
    from effbench.sources.shapes import SHAPES

    return [
        {"name": "tiny", "summary": "small Llama that ships with effbench, trained on a generated world"},
        {"name": "tiny:moe", "summary": "the same with each MLP copied into 4 experts, of which a token takes 2"},
        {"name": "smollm2", "summary": "SmolLM2-135M-Instruct, which `effbench fetch smollm2` brings"},
        {"name": "gguf:FILE", "summary": "local GGUF file, decoded; needs effbench[gguf]"},
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
    from effbench.ops import list_ops

    folder = PACKAGE / "kernels"
    return [{"name": name, "summary": _summary(folder / name / "reference.py")} for name in list_ops()]


def _summary(path: Path) -> str:
    """First line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0] if path.is_file() else ""


def _tasks() -> list[dict[str, Any]]:
    rows = []
    for path in sorted((PACKAGE / "tiny" / "tasks").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(task|output_type): *(\S+)$", text, re.MULTILINE))
        if "task" in fields:
            rows.append({"name": fields["task"], "type": fields.get("output_type", "multiple_choice")})
    return rows


COMMAND = Command(
    _list,
    "list methods, suites, presets, models, ops, tasks or records",
    {
        "[what]": "methods (if left out), suites, presets, models, ops, tasks or records",
        "[file]": "list what this file holds: methods of a FILE.py, or the suite of a FILE.yaml",
    },
    ListOptions,
    JSON,
)
