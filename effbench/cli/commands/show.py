"""`effbench show`: describe a method, suite or preset."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from effbench.cli.command import JSON, Command, print_columns
from effbench.cli.commands.list import describe
from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE, PUBLISHED, RUNS
from effbench.core.usage import named_path, nearest, parse

METRICS = ("bits_per_weight", "token_ppl", "kl_nats_per_token", "tasks_acc")  # units are part of the names
NEWEST = 12  # measured rows that are printed


@dataclasses.dataclass
class ShowOptions:
    """What `effbench show` can be told."""

    results: str | None = None  # folder of records; by default the published ones


def _show(arguments: argparse.Namespace) -> int:
    given = parse(ShowOptions, arguments.options).results
    results = (PUBLISHED or Path(RUNS)) if given is None else named_path("results", given)
    name = arguments.name
    if name.endswith((".yaml", ".yml")):
        return _show_suite(name, arguments.json)
    if registry.FILE.fullmatch(name):
        return _show_method(registry.find(name), results, arguments.json)

    from effbench.cells import suite
    from effbench.records.definitions import Undefined, describe
    from effbench.report.glossary import write_line

    methods, presets = registry.catalog(), registry.presets()
    if name in methods:
        return _show_method(registry.entry(name), results, arguments.json)
    if name in suite.names():
        return _show_suite(name, arguments.json)
    if name in presets:
        return _show_preset(name, presets[name], arguments.json)
    try:
        definition = describe(name)
    except Undefined:
        raise Usage(f"unknown name {name!r}{nearest(name, [*methods, *presets, *suite.names()])}") from None
    print(json.dumps(dataclasses.asdict(definition)) if arguments.json else write_line(definition))
    return 0


def _show_method(entry: registry.Entry, results: Path, as_json: bool) -> int:
    path = _locate(entry.path)
    tests = list(map(_locate, _tests(entry, PACKAGE.parent / "tests")))
    measured = _measured(entry.key, results)
    if as_json:
        facts = describe(entry) | {"file": path, "tests": tests, "measured": measured}
        print(json.dumps(facts, indent=1, default=str))
        return 0
    print(f"{entry.key}: {entry.summary or 'no summary'}\n")
    if entry.about:
        print(f"{entry.about}\n")
    about = {"kind": entry.kind, "paper": entry.paper or "not named"}
    caveats = "; ".join(entry.facts.get("caveats", ()))
    about |= {"published": entry.facts.get("published") or ("not as a recipe, see caveats" if caveats else "")}
    about |= {"caveats": caveats}
    about["file"] = path
    about |= {"needs": ", ".join(sorted(map(str, entry.facts.get("needs", ())))), "tests": ", ".join(tests)}
    print_columns([[name, text] for name, text in about.items() if text])
    print("\nparameters" if entry.parameters else "\nno parameters")
    print_columns(
        [f"  {parameter.name}", parameter.default or "to be given", parameter.type, parameter.comment]
        for parameter in entry.parameters.values()
    )
    if not measured:
        print(f"\nnot measured yet in {_locate(results)}")
        return 0
    newest = sorted(measured, key=lambda row: row["date"], reverse=True)[:NEWEST]
    more = f", the newest {NEWEST} of {len(measured)} rows" if len(measured) > NEWEST else ""
    print(f"\nmeasured{more}; metrics are means over seeds")
    header = dict(zip(newest[0], newest[0], strict=True))
    print_columns(["", *map(str, row.values())] for row in (header, *newest))
    return 0


def _show_preset(name: str, steps: str, as_json: bool) -> int:
    from effbench.core.recipe import preset_parameters

    takes = preset_parameters(name)
    if as_json:
        parameters = {
            parameter.name: {"step": step, "type": parameter.type, "default": parameter.default}
            | {"comment": parameter.comment}
            for step, parameter in takes
        }
        print(json.dumps({"preset": name, "steps": steps, "parameters": parameters}, indent=1))
        return 0
    print(f"{name}: {steps}")
    print("\nparameters, each of the step that has it" if takes else "\nno parameters")
    print_columns(
        [f"  {parameter.name}", parameter.default or "to be given", parameter.type, f"{step}: {parameter.comment}"]
        for step, parameter in takes
    )
    return 0


def _locate(path: Path) -> str:
    """A path, links resolved: whole, unless it lies in the working folder or that is in the checkout too."""
    path, here, checkout = path.resolve(), Path.cwd(), PACKAGE.parent.resolve()
    near = here.is_relative_to(checkout) and path.is_relative_to(checkout)
    inside = path.is_relative_to(here) and here != Path(here.anchor)
    return os.path.relpath(path) if near or inside else str(path)


def _show_suite(name: str, as_json: bool) -> int:
    from effbench.cells import suite

    loaded = suite.load(name)
    rows = [
        {
            "recipe": recipe.name,
            "steps": str(recipe),
            "tiers": [tier for tier, plan in loaded.tiers.items() if recipe in plan.recipes],
        }
        for recipe in loaded.recipes
    ]
    tiers = {
        tier: {
            "models": plan.models,
            "data": plan.data,
            "seeds": plan.seeds,
            "budget_minutes": plan.budget_minutes,
            **plan.settings,
        }
        for tier, plan in loaded.tiers.items()
    }
    if as_json:
        header = {"name": loaded.name, "version": loaded.version, "description": loaded.description}
        print(json.dumps(header | {"tiers": tiers, "recipes": rows}, indent=1, default=str))
        return 0
    print(f"{loaded.name} v{loaded.version}: {loaded.description}")
    for tier, settings in tiers.items():
        print(f"\ntier {tier}")
        print_columns([f"  {key}", _spell(value)] for key, value in settings.items() if value is not None)
    print("\nrecipes")
    print_columns([f"  {row['recipe']}", ", ".join(row["tiers"]), str(row["steps"])] for row in rows)
    return 0


def _spell(value: Any) -> str:
    """A setting without Python's brackets and quotes."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _tests(entry: registry.Entry, folder: Path) -> list[Path]:
    """Test files that use a method: in a step string, or by importing its module."""
    step = re.compile(rf"(?<![\w.]){re.escape(entry.key)}\(")
    files = []
    for path in sorted(folder.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if entry.key not in text:
            continue
        nodes = list(ast.walk(ast.parse(text)))
        strings = (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
        imports = (n.module for n in nodes if isinstance(n, ast.ImportFrom))
        if entry.module in imports or any(step.search(string) for string in strings):
            files.append(path)
    return files


def _measured(key: str, results: Path) -> list[dict[str, Any]]:
    """The rows whose recipes use a method, each by its newest records, a row of several seeds once."""
    from effbench.records.record import Record
    from effbench.records.store import Store, latest

    newest: dict[tuple[str, ...], dict[int, Record]] = {}
    for record in latest(Store(results).read()[0]).values():
        cell = record.cell
        if any(step["method"] == key for step in cell.resolved):
            seeds = newest.setdefault((f"{cell.suite} v{cell.suite_version}", cell.tier, cell.recipe, cell.model), {})
            if cell.seed not in seeds or seeds[cell.seed].started < record.started:
                seeds[cell.seed] = record
    rows = []
    for row, seeds in sorted(newest.items()):
        records = list(seeds.values())
        means = {
            name: sum(values) / len(values)
            for name in METRICS
            if (values := [record.metrics[name].value for record in records if name in record.metrics])
        }
        rows.append(
            dict(zip(("suite", "tier", "recipe", "model"), row, strict=True))
            | {"seeds": len(seeds), "outcome": ", ".join(sorted({record.outcome for record in records}))}
            | {name: f"{means[name]:.4g}" if name in means else "-" for name in METRICS}
            | {"date": max(record.started for record in records)[:10]}
        )
    return rows


COMMAND = Command(
    _show,
    "describe a method, suite or preset: parameters, rows, what was measured",
    {"name": "of a method, suite, preset or metric; or FILE.py, FILE.py:CLASS, FILE.yaml"},
    ShowOptions,
    JSON,
)
