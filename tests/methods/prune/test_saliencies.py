"""Masks by a score: what magnitude, Wanda and Taylor share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench import checks
from effbench.core.errors import Outcome, Usage
from effbench.core.recipe import parse_step
from effbench.methods.prune._common import keep_mask
from effbench.methods.prune.magnitude import Magnitude
from effbench.nn.calibration import survey
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, kept

SALIENCIES = ("magnitude", "wanda", "taylor")


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 6),
    width=st.integers(1, 6),
    sparsity=st.floats(0, 0.99),
    scope=st.sampled_from(["local", "row"]),
    pattern=st.sampled_from(["unstructured", "2:4", "1:4", "4:8", "block:2x4", "block:1x8"]),
    seed=st.integers(0, 99),
)
def test_masks_prune_the_lowest_of_every_comparison_group(
    out: int, width: int, sparsity: float, scope: Any, pattern: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 9, (2 * out, 8 * width), generator=generator).float()  # with ties
    if ":" in pattern and not pattern.startswith("block"):
        n, m = map(int, pattern.split(":"))
        sparsity = 1 - n / m
    keep = keep_mask(score, sparsity, pattern, scope)
    if pattern.startswith("block"):
        rows, columns = map(int, pattern.removeprefix("block:").split("x"))
        blocks = keep.unfold(0, rows, rows).unfold(1, columns, columns).flatten(2)
        assert torch.equal(blocks.all(2), blocks.any(2)), "a block is kept or goes as a whole"
        keep = blocks[..., 0]
        score = score.unfold(0, rows, rows).unfold(1, columns, columns).flatten(2).sum(2)
    elif ":" in pattern:
        keep, score = keep.reshape(-1, m), score.reshape(-1, m)
        scope = "row"
    groups = zip(keep, score, strict=True) if scope == "row" else [(keep, score)]
    for kept_here, scores in groups:
        assert int((~kept_here).sum()) == int(kept_here.numel() * sparsity + 1e-9)
        if kept_here.any() and not kept_here.all():
            assert scores[~kept_here].max() <= scores[kept_here].min()


@pytest.mark.parametrize("key", SALIENCIES)
@pytest.mark.parametrize("pattern", ["unstructured", "block:16x16"])
def test_one_threshold_for_the_whole_model(key: str, pattern: str) -> None:
    method: Any = parse_step(f"{key}(sparsity=0.6, pattern={pattern!r}, scope='global')")
    run = checks.toy_run()
    scores = {layer.name: method.score(layer) for layer in survey(run, set(method.needs))}
    before = {path: dense_weight(module) for path, module in Blocks(run.model).linears()}
    run.apply(method)
    modules = dict(Blocks(run.model).linears())
    masks = {path: kept(module) if kept(module) is not None else torch.ones_like(before[path], dtype=torch.bool)
             for path, module in modules.items()}  # fmt: skip
    lost = sum(int((~mask).sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    unit = 1 if pattern == "unstructured" else 256
    assert lost == int(total / unit * 0.6 + 1e-9) * unit
    if unit == 1:
        highest = max(float(scores[path][~mask].max()) for path, mask in masks.items() if not mask.all())
        lowest = min(float(scores[path][mask].min()) for path, mask in masks.items() if mask.any())
        assert highest <= lowest
    assert len({float((~mask).double().mean()) for mask in masks.values()}) > 1, "matrices lose different fractions"
    for path, module in modules.items():
        assert torch.equal(dense_weight(module), before[path] * masks[path])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("wanda(sparsity=1.0)", "sparsity must be in"),
        ("wanda(sparsity=-0.1)", "sparsity must be in"),
        ("wanda(sparsity=0.6, pattern='2:4')", "means sparsity 0.5"),
        ("magnitude(pattern='1:4')", "means sparsity 0.75"),
        ("magnitude(pattern='4:2')", "0 < n < m"),
        ("magnitude(pattern='blocks')", "one of"),
        ("magnitude(pattern='block:0x4')", "at least one"),
        ("taylor(pattern='2:4', scope='global')", "contradicts"),
        ("sparsegpt(pattern='block:4x4')", "n:m"),
        ("sparsegpt(pattern='4:8', block=12)", "multiple of 8"),
        ("sparsegpt(bits=5)", "bits must be"),
        ("block_sparse(block=0)", "block must be positive"),
    ],
)
def test_wrong_usage(step: str, message: str) -> None:
    with pytest.raises(Usage, match=message):
        parse_step(step)


@pytest.mark.parametrize("step", ["wanda(sparsity=0.4, pattern='3:5')", "block_sparse(block=48)"])
def test_widths_that_do_not_divide_are_a_typed_outcome(step: str) -> None:
    with pytest.raises(Outcome, match=r"multiple of 5|does not divide"):
        checks.toy_run().apply(parse_step(step))


def test_nothing_pruned_is_refused() -> None:
    run = checks.toy_run()
    run.apply(Magnitude(sparsity=0.0))
    with pytest.raises(Outcome, match="changed nothing"):
        run.finish()
