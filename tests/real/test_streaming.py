"""Texts longer than a model was trained on: perplexity as they go on, printed as it is found."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effbench import sources
from effbench.core.recipe import parse
from effbench.nn.files.load import open_run
from effbench.nn.infer.cache import SlotCache
from effbench.nn.infer.engine import State, open_engine
from effbench.nn.model.blocks import Blocks

LENGTH, PASS, PARTS = 8192, 32, 8
# Tokens of a pass see each other beside what is held: one by one they would take an hour on a processor.
ROWS = {
    "dense": "",
    "sinks and window": "streaming_llm(sinks=4,window=1020)",
    "window alone": "sliding_window(window=1024)",
}


def open_model(model: str, steps: str) -> Any:
    """A model with the held-out text that goes with it, under a recipe."""
    data = {"tiny": "tiny", "smollm2": "speeches"}[model]
    run = open_run(sources.model(model), sources.data(data), "cpu", "float32", 0)
    for step in parse(steps).steps:
        run.apply(step)
    return run


def read_dense(run: Any, ids: Tensor) -> Tensor:
    """[T - 1] nats of each token behind all before it, also where the model has no such positions."""
    cache, found = None, []
    for start in range(0, len(ids) - 1, 256):
        fed = ids[None, start : min(start + 256, len(ids) - 1)]
        with torch.no_grad():
            out = run.model(fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(lose(out.logits[0], ids[start + 1 :]))
    return torch.cat(found)


def read_streaming(run: Any, ids: Tensor) -> tuple[Tensor, set[int]]:
    """[T - 1] nats of each token behind what the cache holds, and the bytes that it held once it was full."""
    engine, cache = open_engine(run), SlotCache(len(Blocks(run.model)), run.infer)
    state, found, sizes = State(cache), [], set()
    for start in range(0, len(ids) - 1, PASS):
        fed = ids[None, start : min(start + PASS, len(ids) - 1)]
        found.append(lose(engine.extend(state, fed, body=False).logits[0], ids[start + 1 :]))
        cache.settle(ends_prompt=not start)
        if start > 2048:
            sizes.add(int(cache.nbytes()))
    return torch.cat(found), sizes


def lose(logits: Tensor, ids: Tensor) -> Tensor:
    """[n] nats of the first n tokens at logits [n, V]."""
    return torch.nn.functional.cross_entropy(logits.float(), ids[: len(logits)], reduction="none")


@pytest.mark.slow
def test_the_tiny_model_goes_on_beyond_its_positions(capsys: pytest.CaptureFixture[str]) -> None:
    """It has 2,048, and dense attention makes little of later ones. As no sinks were learned, a window alone does."""
    found = measure("tiny", capsys)
    dense, sinks = found["dense"], found["sinks and window"]
    assert max(sinks) < 2 * min(sinks) and dense[-1] > 10 * sinks[-1]


@pytest.mark.real
@pytest.mark.usefixtures("file")
def test_smollm2_goes_on_at_the_cost_of_a_window(capsys: pytest.CaptureFixture[str]) -> None:
    """It has 8,192 positions, where dense attention is at home: sinks come near to that, a window without them does not
    (table 1 of arXiv:2309.17453)."""
    found = measure("smollm2", capsys)
    for dense, sinks, window in list(zip(*(found[name] for name in ROWS), strict=True))[1:]:
        assert sinks < 1.15 * dense and window > 1.3 * sinks


def measure(model: str, capsys: pytest.CaptureFixture[str]) -> dict[str, list[float]]:
    """Perplexity of each eighth of a text by each row; a streaming cache stays as large as when it filled."""
    torch.set_num_threads(1)
    table: dict[str, list[float]] = {}
    for name, steps in ROWS.items():
        run = open_model(model, steps)
        ids = run.data.heldout_ids(LENGTH + 1)
        if steps:
            lost, sizes = read_streaming(run, ids)
            assert len(sizes) == 1
        else:
            lost = read_dense(run, ids)
        table[name] = [math.exp(float(part.mean())) for part in lost.double().chunk(PARTS)]
    with capsys.disabled():
        print(f"\n{model}: perplexity of each {LENGTH // PARTS} of {LENGTH} tokens, passes of {PASS}")
        for name, values in table.items():
            print(f"  {name:24}", *(f"{value:8.2f}" for value in values))
    assert all(math.isfinite(value) for values in table.values() for value in values)
    return table
