"""Loads the items of a task from the file beside the tasks: no cache, no network, nothing written."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(file: str, **_: Any) -> dict[str, Dataset]:
    """The items of ``data/<file>.jsonl`` as the split ``test``."""
    lines = (Path(__file__).parent.parent / "data" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
