"""`effbench doctor`: describe this machine and check every method."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from effbench.core import registry
from effbench.core.errors import Usage

if TYPE_CHECKING:
    pass
from effbench.cli.command import JSON, Command, print_columns


def _doctor(arguments: argparse.Namespace) -> int:
    import torch

    from effbench.machine.environment import describe

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
        print_columns([[key, str(value)] for key, value in facts.items()])
    return int(bool(broken))


COMMAND = Command(_doctor, "describe this machine and check every method", flags=JSON)
