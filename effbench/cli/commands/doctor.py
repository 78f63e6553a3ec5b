"""`effbench doctor`: describe this machine and import every method."""

from __future__ import annotations

import argparse
import json

from effbench.cli.command import JSON, Command, print_columns
from effbench.core import registry
from effbench.core.errors import Usage


def _doctor(arguments: argparse.Namespace) -> int:
    methods = registry.catalog()

    import torch

    from effbench.machine.environment import describe

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    broken = {}
    for key in methods:
        try:
            registry.load(key)
        except Usage as error:
            broken[key] = str(error)
    facts = {"device": device} | describe(device) | {"methods": len(methods), "broken_methods": broken}
    if arguments.json:
        print(json.dumps(facts, indent=1, default=str))
    else:
        print_columns([[key, str(value)] for key, value in facts.items()])
    return int(bool(broken))


COMMAND = Command(_doctor, "describe this machine and import every method; exit code 1 if one is broken", flags=JSON)
