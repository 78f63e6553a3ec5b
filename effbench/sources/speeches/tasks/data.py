"""Loads the items of a task, which are made from the addresses: no cache, no network, nothing written."""

from typing import Any

from datasets import Dataset

from effbench.sources.questions import TASKS


def load(asks: str, **_: Any) -> dict[str, Dataset]:
    """The items of a task as the split ``test``."""
    return {"test": Dataset.from_list([item._asdict() for item in TASKS[asks]()])}
