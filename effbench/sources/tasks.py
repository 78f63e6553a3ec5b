"""lm-eval's tasks by name. No torch here: names are checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from lm_eval.tasks import TaskManager


def index_tasks(wanted: Collection[str], folders: Sequence[Path]) -> TaskManager:
    """What lm-eval knows: the tasks of the folders, and its own thousands where one of them is wanted."""
    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    return manager if set(wanted) <= set(manager.all_tasks) else TaskManager(include_path=paths)
