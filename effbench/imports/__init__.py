"""Results of other tools as records, marked as imported: lm-eval, PEFT's method comparison, optimum-benchmark.

An imported record has a suite of the tool's name and the tier `imported`, so it shares no table with what was measured
here, and a footnote that says where it comes from and what it lacks. Nothing is converted by guess: a number that means
something else than the metric of that name here is left out, and said to be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from effbench.core.errors import Usage, first_line
from effbench.imports import harness, method_comparison, optimum
from effbench.imports.found import Found, Names, make_record
from effbench.records.record import Record

TOOLS = (harness, method_comparison, optimum)


def import_results(path: Path, names: Names) -> list[Record]:
    """The records of a file, or of all files of a folder that a known tool wrote, sorted by path.

    Raises `Usage` that names the file, for one that no known tool wrote and for a folder without any.
    """
    if not path.is_dir():
        return [_read(path, names)]
    found = [_read(file, names) for file in _list_files(path)]
    if not found:
        raise Usage(f"{path}: holds no file of results of {list_tools()}")
    if names.recipe and len(found) > 1:
        raise Usage(f"recipe={names.recipe}: {path} holds {len(found)} results; a name is for one of them")
    return found


def list_tools() -> str:
    """The tools whose results can be read, in words."""
    return ", ".join(tool.SOURCE for tool in TOOLS)


def _list_files(folder: Path) -> Iterator[Path]:
    """Files of results in a folder and below it; of several that say the same, the most complete."""
    for path in sorted(folder.rglob("*.json")):
        try:
            body = _load(path)
        except Usage:
            continue
        if any(tool.recognises(body) and not tool.is_said_elsewhere(path) for tool in TOOLS):
            yield path


def _read(path: Path, names: Names) -> Record:
    body = _load(path)
    tool = next((tool for tool in TOOLS if tool.recognises(body)), None)
    if tool is None:
        raise Usage(f"{path}: not a file of results of {list_tools()}")
    try:
        found: Found = tool.read(path, body)
        return make_record(tool.SOURCE, path, found, names)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Usage(f"{path}: not as {tool.SOURCE} writes it ({type(error).__name__}: {first_line(error)})") from None


def _load(path: Path) -> dict[str, object]:
    """The JSON object in a file. Raises `Usage`."""
    try:
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise Usage(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise Usage(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(body, dict):
        raise Usage(f"{path}: not a file of results of {list_tools()}")
    return body
