"""lm-eval's tasks, opened for probes."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effbench.core.errors import Unsupported, first_line
from effbench.core.usage import nearest
from effbench.sources.tasks import index_tasks

FEWSHOT_SEED = 1234  # lm-eval's own default


def load(wanted: list[str], folders: Sequence[Path]) -> tuple[dict[str, Any], list[Exception]]:
    """Tasks by name, as lm-eval takes them, and why others cannot be had. Raises `Unsupported` for unknown names."""
    manager = index_tasks(wanted, folders)
    for name in wanted:
        if name not in manager.all_tasks:
            raise Unsupported(f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}")
    tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    failures: list[Exception] = []
    for name in wanted:
        try:
            loaded = manager.load([name])
        except (OSError, ImportError) as error:
            failure = Unsupported(f"task {name} cannot be loaded: {first_line(error)}")
            failure.__cause__ = error  # says whether it is to be tried again
            failures.append(failure)
        else:
            for kind, entries in loaded.items():
                tasks[kind] |= entries
    for task in tasks["tasks"].values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks, failures


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's progress bars and messages off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
