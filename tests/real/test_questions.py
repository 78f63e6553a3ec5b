"""Questions over the speeches are answered from their facts: far above chance with these, by chance without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effbench import probes, sources
from effbench.nn.files.load import open_run
from effbench.sources.questions import TASKS

pytestmark = pytest.mark.real
CHANCE = 0.25


@pytest.fixture(scope="module")
def asked(file: Path) -> Any:
    """The baseline, with questions over the speeches."""
    torch.set_num_threads(1)
    return open_run(sources.model("smollm2"), sources.data("speeches:questions"), "cpu", None, 0)


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_known_by_the_facts_alone(asked: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = {"tasks": [f"speeches_{name}"], "limit": 40, "score_block": 1}
    metric = f"speeches_{name}_acc"
    known = probes.take("quality", asked, settings).metrics[metric]
    items = TASKS[name]()
    bare = []
    for item in items:
        answer = f"{item.choices[item.gold]}."
        contexts = [" ".join(word for word in context.split(" ") if word != answer) for context in item.contexts]
        assert contexts != item.contexts
        bare.append(item._replace(contexts=contexts))
    monkeypatch.setitem(TASKS, name, lambda: bare)
    asked._shared.clear()
    blind = probes.take("quality", asked, settings).metrics[metric]
    assert known.low is not None and known.low > 1.5 * CHANCE
    assert blind.low is not None and blind.low <= CHANCE
