"""LLMLingua and LongLLMLingua on the real model, as the llmlingua package computes them on it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from effbench import tiny
from effbench.core.views import Segments
from effbench.methods.prompt.llmlingua import LLMLingua
from effbench.methods.prompt.longllmlingua import LongLLMLingua

pytestmark = pytest.mark.real
GOLDEN = Path(__file__).parents[1] / "golden" / "llmlingua_smollm2.safetensors"
with safe_open(GOLDEN, "pt") as file:
    TEXTS = {name: bytes(file.get_tensor(name).tolist()).decode() for name in file.keys() if name[:4] != "rank"}  # noqa: SIM118


@pytest.mark.parametrize("name", TEXTS)
def test_what_the_package_keeps(name: str, run: Any) -> None:
    found = re.fullmatch(r"(one|many|asked)(?:/(sort|original))?/(\d)/([\d.]+)/(\d+)(?:/([\d.]+))?", name)
    assert found is not None
    kind, order, number, rate, size, spread = found.groups()
    rows = (Path(tiny.__file__).parent / "data" / f"{'needle_256' if kind == 'one' else 'contexts'}.jsonl").open()
    row = [json.loads(line) for line in rows][int(number)]
    settings: dict[str, Any] = {"keep": float(rate), "step": int(size), "tail": "package"}
    method = LLMLingua(**settings)
    if kind == "asked":
        method = LongLLMLingua(reorder=order == "sort", dynamic=float(spread), **settings)
    contexts = tuple(text + "\n\n" for text in row.get("contexts", [row.get("context")]))
    new = method.rewrite(Segments(contexts=contexts, question=row["question"]), run)
    assert "".join(new.text().split()) == "".join(TEXTS[name].split())
