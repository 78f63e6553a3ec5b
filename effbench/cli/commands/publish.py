"""`effbench publish`: own records of a complete tier become the published ones. For maintainers."""

from __future__ import annotations

import argparse
import dataclasses
import os

from effbench.cli.command import Command
from effbench.core.errors import Usage
from effbench.core.paths import PUBLISHED, RUNS
from effbench.core.usage import named_path, parse


@dataclasses.dataclass
class PublishOptions:
    """What `effbench publish` can be told."""

    suite: str | None = None  # name of the suite
    tier: str | None = None  # quick, full or real; may be left out where only one was run
    runs: str = RUNS  # folder of own records
    results: str | None = None  # folder of published ones; by default that of the checkout


def _publish(arguments: argparse.Namespace) -> int:
    options = parse(PublishOptions, arguments.options)
    if options.suite is None:
        raise Usage("suite=: name the suite to publish")
    results = named_path("results", options.results) if options.results is not None else PUBLISHED
    if results is None:
        raise Usage("results=: name the folder; an installed package has none")

    from effbench.publish import publish
    from effbench.report.pages import check_folder_name

    check_folder_name(results)
    publications, changed = publish(options.suite, named_path("runs", options.runs), results, options.tier)
    for publication in publications:
        print(f"published {publication}: {len(publication.records)} records")
    for path in changed:
        print(f"wrote {os.path.relpath(path)}")
    return 0


COMMAND = Command(
    _publish,
    "publish own records of a complete tier (for maintainers)",
    options=PublishOptions,
)
