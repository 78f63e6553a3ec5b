"""`effbench check`: run the contract that every method must pass on one of them."""

from __future__ import annotations

import argparse
import dataclasses
import json

from effbench.cli.command import JSON, Command
from effbench.core import registry


def _check(arguments: argparse.Namespace) -> int:
    cls = registry.load(registry.find(arguments.name).key)
    from effbench.checks import examine

    failed = []
    for verdict in examine(cls):
        if arguments.json:
            print(json.dumps(dataclasses.asdict(verdict)), flush=True)
        else:
            name = verdict.check.removeprefix("check_").replace("_", " ")
            reason = f": {verdict.reason}" if verdict.reason else ""
            mark = "ok" if verdict.ok else "FAILED"
            given = ", ".join(f"{key}={value!r}" for key, value in verdict.settings.items())
            print(f"{mark:<6}  {name}{given and f' with {given}'}{reason}  [{verdict.seconds:.1f} s]", flush=True)
        failed += [] if verdict.ok else [verdict]
    if not arguments.json:
        print(f"{len(failed)} checks failed" if failed else "all checks passed")
    return int(bool(failed))


COMMAND = Command(
    _check,
    "run the checks that every method must pass; exit code 1 if one fails",
    {"name": "of a method, its FILE.py, or FILE.py:CLASS"},
    flags=JSON,
)
