"""The command line. Wrong usage is one line on stderr and exit code 2. Importing this imports no torch."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from effbench import __version__
from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.record import FAILED, Record
from effbench.export import ExportOptions
from effbench.options import RunOptions, parse

if TYPE_CHECKING:
    from effbench.runner import Run

INTERRUPTED = 130
SHOWN = ("bits_per_weight", "token_ppl", "kl_nats_per_token", "tasks_acc")  # metrics of `effbench show`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and give the exit code: 0 fine, 1 some cell failed, 2 wrong usage, 130 interrupted."""
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except Usage as error:
        print(f"effbench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("effbench: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `Usage`."""

    def error(self, message: str) -> NoReturn:
        raise Usage(f"{message}; see {self.prog} --help")


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: what it does, how it is written, and the function that takes its arguments."""

    act: Callable[[argparse.Namespace], int]
    summary: str
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)  # arguments by position, [optional], and help
    options: type | None = None  # the class of its key=value options
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def parser(self, name: str) -> Parser:
        """The parser of this command's arguments."""
        parser = Parser(
            prog=f"effbench {name}",
            description=self.summary,
            allow_abbrev=False,
            epilog=_documented(self.options) if self.options else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for word, text in self.words.items():
            parser.add_argument(word.strip("[]"), nargs="?" if word.startswith("[") else None, help=text)
        if self.options:
            parser.add_argument("options", nargs="*", metavar="key=value", help="options, listed below")
        for flag, text in self.flags.items():
            parser.add_argument(flag, action="store_true", help=text)
        return parser


@dataclasses.dataclass
class ReportOptions:
    """What `effbench report` can be told."""

    suite: str | None = None  # only this suite
    results: str = "results"  # folder of records and tables
    format: str | None = None  # md, csv, tex or rich


@dataclasses.dataclass
class CompareOptions:
    """What `effbench compare` can be told."""

    suite: str | None = None  # the suite in which the names are looked up
    results: str = "results"  # folder of records and tables


@dataclasses.dataclass
class ShowOptions:
    """What `effbench show` can be told."""

    results: str = "results"  # folder of records


@dataclasses.dataclass
class BenchOptions:
    """What `effbench bench` can be told."""

    op: str | None = None  # only this op
    device: str | None = None  # cpu, cuda or cuda:N; by default the first GPU, else the processor
    dtype: str | None = None  # float32, bfloat16, float16; by default float32 on a processor, else bfloat16
    seconds: float | None = None  # after which no case is begun any more; what is left out is named
    out: str | None = None  # JSON file to write, or a folder for one named after the machine


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        raise Usage(f"unknown command {name!r}{registry.nearest(name, COMMANDS)}")
    command = COMMANDS[name]
    try:
        return command.act(command.parser(name).parse_intermixed_args(rest))
    except SystemExit as end:  # argparse ends the program after --help
        return int(end.code or 0)


def _overview() -> str:
    lines = [f"  {name:<9} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: effbench COMMAND ...",
            "",
            "What does an efficiency method for language models cost, and what does it buy?",
            "",
            *lines,
            "",
            "`effbench COMMAND --help` tells more, `effbench run suite=quant` is a good start.",
        ]
    )


def _documented(cls: type) -> str:
    """Help on the fields of an options class, from the comments beside them."""
    fields = re.findall(r"^    (\w+): .*? = (.*?)  # (.*)$", inspect.getsource(cls), re.MULTILINE)
    lines = [
        f"  {name + '=':<11}{text}" + ("" if default == "None" else f" [{default}]") for name, default, text in fields
    ]
    return "\n".join(["options:", *lines])


# ---- list and show ----


def _list(arguments: argparse.Namespace) -> int:
    listings: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "methods": _methods,
        "suites": _suites,
        "models": _models,
        "ops": _ops,
        "tasks": _tasks,
    }
    what = arguments.what or "methods"
    if what not in listings:
        raise Usage(f"cannot list {what!r}{registry.nearest(what, listings)}")
    rows = listings[what]()
    if arguments.json:
        print(json.dumps(rows, indent=1, default=str))
    else:
        shown = [key for key in (rows[0] if rows else {}) if key not in ("parameters", "facts")]
        _print_columns([[str(row[key]) for key in shown] for row in rows])
    return 0


def _methods() -> list[dict[str, Any]]:
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
    from effbench import suite

    headers = [suite.header(name) for name in suite.names()]
    return [{key: header.get(key) for key in ("name", "version", "description")} for header in headers]


def _models() -> list[dict[str, Any]]:
    from effbench.shapes import SHAPES

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
    from effbench.core.op import ops

    folder = registry.PACKAGE / "kernels"
    return [{"name": name, "summary": _summary(folder / name / "reference.py")} for name in ops()]


def _summary(path: Path) -> str:
    """First line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_bytes())) or "").partition("\n")[0] if path.is_file() else ""


def _tasks() -> list[dict[str, Any]]:
    found = []
    for path in sorted((registry.PACKAGE / "tiny" / "tasks").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        fields = dict(re.findall(r"^(task|output_type): *(\S+)$", text, re.MULTILINE))
        if "task" in fields:
            found.append({"name": fields["task"], "type": fields.get("output_type", "multiple_choice")})
    return found


def _show(arguments: argparse.Namespace) -> int:
    from effbench import suite

    results = Path(parse(ShowOptions, arguments.options).results)
    name, methods, presets = arguments.name, registry.catalog(), registry.presets()
    if name in methods:
        facts = next(row for row in _methods() if row["key"] == name)
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
        raise Usage(f"unknown name {name!r}{registry.nearest(name, [*methods, *presets, *suite.names()])}")
    if arguments.json:
        print(json.dumps(facts, indent=1, default=str))
        return 0
    for key, value in facts.items():
        if isinstance(value, Mapping):
            print(f"{key}:")
            _print_columns([[f"  {field}", str(text)] for field, text in value.items()])
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            print(f"{key}:")
            _print_columns([["  ", *(str(text) for text in row.values())] for row in value])
        else:
            print(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
    return 0


def _tests(key: str) -> list[str]:
    """Test files of the checkout that name a method."""
    folder = registry.PACKAGE.parent / "tests"
    return sorted(
        str(path.relative_to(folder.parent))
        for path in folder.rglob("test_*.py")
        if f"{key}(" in path.read_text(encoding="utf-8") or f".{key}" in path.read_text(encoding="utf-8")
    )


def _measured(key: str, results: Path) -> list[dict[str, Any]]:
    """The last records of recipes that use a method, with their telling metrics."""
    from effbench.store import Store, latest

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


def _print_columns(rows: Iterable[Sequence[str]]) -> None:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=False)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())


# ---- run ----


def _run(arguments: argparse.Namespace) -> int:
    from effbench import progress, runner
    from effbench.executors import Event, Local
    from effbench.store import Store

    options = parse(RunOptions, arguments.options)
    run = runner.plan(options)
    out = sys.stderr if arguments.json else sys.stdout
    for note in run.notes:
        print(f"effbench: {note}", file=sys.stderr)
    if arguments.dry_run:
        _print_plan(run, arguments.json)
        return 0
    print(progress.opening(run), file=out, flush=True)
    for record in run.done if arguments.json else []:
        _print_record(record)

    begin = time.monotonic()
    executor = Local(run.placement.jobs, options.timeout, run.placement.threads)
    display = (progress.Live if out.isatty() else progress.Lines)(len(run.todo), out)

    def watch(event: Event) -> None:
        display.watch(event)
        if arguments.json and event.record is not None:
            _print_record(event.record)

    with display:
        fresh, interrupted = runner.run_cells(run.todo, Store(options.folder), executor, watch)
    if interrupted:
        kept = f"{len(fresh)} of {len(run.todo)} cells are done and kept"
        print(f"effbench: interrupted; {kept}, the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    print(progress.closing(fresh, time.monotonic() - begin), file=out)
    by_identity = {record.cell.identity: record for record in [*run.done, *fresh]}
    records = [by_identity[cell.job.cell.identity] for cell in run.cells]
    if not arguments.json:
        from effbench.report import render

        print(f"\n{render(records, run.suite.name, 'rich' if out.isatty() else 'md')}", end="")
    return int(any(record.outcome in FAILED for record in records))


def _print_plan(run: Run, as_json: bool) -> None:
    from effbench.progress import opening

    rows = [
        {
            "action": "run" if planned.done is None else "skip",
            "recipe": planned.job.cell.recipe,
            "seed": planned.job.cell.seed,
            "steps": planned.job.cell.steps,
            "why": planned.why,
            "identity": planned.job.cell.identity,
        }
        for planned in run.cells
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print(opening(run))
    _print_columns([[str(row[key]) for key in ("action", "recipe", "seed", "why")] for row in rows])


def _print_record(record: Record) -> None:
    print(json.dumps(json.loads(record.to_json())), flush=True)


# ---- what reads records, and the machine ----


def _report(arguments: argparse.Namespace) -> int:
    from effbench import report

    options = dataclasses.asdict(parse(ReportOptions, arguments.options))
    return report.main(options | {"check": arguments.check, "write": arguments.write})


def _compare(arguments: argparse.Namespace) -> int:
    from effbench import compare

    options = dataclasses.asdict(parse(CompareOptions, arguments.options))
    return compare.main(options | {"a": arguments.a, "b": arguments.b})


def _bench(arguments: argparse.Namespace) -> int:
    options = dataclasses.asdict(parse(BenchOptions, arguments.options))
    from effbench import bench

    return bench.main(options | {"compile": arguments.compile, "json": arguments.json})


def _docs(arguments: argparse.Namespace) -> int:
    from effbench import docs

    return docs.main({"check": arguments.check})


def _doctor(arguments: argparse.Namespace) -> int:
    import torch

    from effbench.probes.environment import describe

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    facts = {"device": device} | describe(device)
    broken = {key: entry.summary for key, entry in registry.catalog().items() if entry.kind == "broken"}
    for key in registry.catalog():
        if key not in broken:
            try:
                registry.load(key)
            except Usage as error:
                broken[key] = str(error)
    facts |= {"methods": len(registry.catalog()), "broken_methods": broken}
    if arguments.json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        _print_columns([[key, str(value)] for key, value in facts.items()])
    return int(bool(broken))


def _export(arguments: argparse.Namespace) -> int:
    from effbench.diagnosis import diagnose
    from effbench.export import export

    options = parse(ExportOptions, arguments.options)
    try:
        print(export(options))
    except Usage:
        raise
    except Exception as error:
        failure = diagnose(error)
        if failure.traceback:
            raise
        print(f"effbench: {failure.outcome}: {failure.reason}", file=sys.stderr)
        return 1
    return 0


JSON = {"--json": "for machines"}
COMMANDS: dict[str, Command] = {
    "list": Command(
        _list, "name what there is", {"[what]": "methods (if left out), suites, models, ops or tasks"}, flags=JSON
    ),
    "show": Command(
        _show,
        "tell about a method, suite or preset, and its last measured rows",
        {"name": "of a method, suite or preset"},
        ShowOptions,
        JSON,
    ),
    "run": Command(
        _run,
        "run a suite or a recipe; cells that are done are not run again",
        options=RunOptions,
        flags={
            "--dry-run": "say what would run and why, and run nothing",
            "--json": "one record per line on stdout, nothing else",
        },
    ),
    "report": Command(
        _report,
        "print the tables of the records",
        options=ReportOptions,
        flags={"--check": "1 if the written tables are not these", "--write": "write them to results/tables"},
    ),
    "compare": Command(
        _compare,
        "compare two rows item by item",
        {"a": "name of a recipe, or a record's file", "b": "the other"},
        CompareOptions,
    ),
    "export": Command(_export, "run a recipe and write its model to a folder", options=ExportOptions),
    "bench": Command(
        _bench,
        "compare kernels at the sizes of real models: correct first, then timed",
        options=BenchOptions,
        flags={"--compile": "compile them for sm_90 instead, which needs no GPU", "--json": "for machines"},
    ),
    "docs": Command(_docs, "write the generated pages", flags={"--check": "1 if they are not up to date"}),
    "doctor": Command(_doctor, "describe this machine and check every method", flags=JSON),
}
