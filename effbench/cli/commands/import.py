"""`effbench import`: results of other tools as records, marked as imported."""

from __future__ import annotations

import argparse
import dataclasses
import json

from effbench.cli.command import JSON, Command
from effbench.core.paths import RUNS
from effbench.core.usage import named_path, parse


@dataclasses.dataclass
class ImportOptions:
    """What `effbench import` can be told."""

    recipe: str | None = None  # name of the row, instead of the one in the file
    model: str | None = None  # name of the model, so that results of one model compare whatever its files are called
    results: str = RUNS  # folder of records to write to


def _import(arguments: argparse.Namespace) -> int:
    options = parse(ImportOptions, arguments.options)
    from effbench.imports import import_results
    from effbench.imports.found import Names
    from effbench.records.store import Store

    store = Store(named_path("results", options.results))
    records = import_results(named_path("file", arguments.file), Names(options.recipe, options.model))
    if not arguments.dry_run:
        store.check()
        for record in records:
            store.write(record)
    if arguments.json:
        print(json.dumps([{"suite": one.cell.suite, "recipe": one.cell.recipe, **_tell(one.facts)} for one in records]))
        return 0
    for one in records:
        lost = one.facts["imported"]["left_out"]
        print(f"{one.cell.recipe} ({one.cell.suite}, model {one.cell.model}, seed {one.cell.seed}): {one.outcome}")
        print(f"  has {', '.join(one.metrics) or 'no metric'}")
        print(f"  lacks {', '.join(one.facts['missing']) or 'nothing'}")
        if lost:
            print(f"  left out {', '.join(lost)}")
    done = "would write" if arguments.dry_run else "wrote"
    print(f"{done} {len(records)} imported records; `effbench report results={options.results}` shows them apart")
    return 0


def _tell(facts: dict[str, object]) -> dict[str, object]:
    return {"imported": facts["imported"], "missing": facts["missing"]}


def _notes() -> str:
    from effbench.imports import list_tools

    return (
        f"Results of {list_tools()} are known by their content; of a folder all\n"
        "of them are taken. A number that means something else than a metric here is left out. Imported records share\n"
        "no table with measured ones."
    )


COMMAND = Command(
    _import,
    "take results of other tools (lm-eval, PEFT, optimum-benchmark) into records of their own",
    {"file": "file of results, or a folder with such files"},
    ImportOptions,
    JSON | {"--dry-run": "say what would be written, and write nothing"},
    notes=_notes,
)
