"""Wanda against llm-compressor and its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys_prune import GOLDEN, SETTINGS, make_layer, random_layer

from effbench.methods.prune.magnitude import Magnitude
from effbench.methods.prune.wanda import Wanda
from effbench.nn.calibration import Inputs
from effbench.nn.model.linear import dense_weight, kept


def setting(name: str) -> dict[str, Any]:
    sparsity, _, m = SETTINGS[name]
    return {"sparsity": sparsity, "pattern": name if m else "unstructured"}


@pytest.mark.parametrize("name", SETTINGS)
def test_wanda_masks_are_those_of_llm_compressor(name: str) -> None:
    layer = make_layer(GOLDEN["weight"], GOLDEN["inputs"].float().flatten(0, 1))
    found = dense_weight(Wanda(**setting(name)).compress(layer))
    assert torch.equal(found, GOLDEN[f"wanda.{name}"])


def test_wanda_with_equal_norms_is_magnitude_by_row() -> None:
    layer = random_layer()
    layer.inputs = Inputs({"norm"}, 4)
    layer.inputs.add(torch.eye(64).repeat(4, 1))
    by_row = Magnitude(scope="row").compress(random_layer())
    assert torch.equal(dense_weight(Wanda().compress(layer)), dense_weight(by_row))


def test_wanda_compares_within_a_row_and_does_not_update() -> None:
    layer = random_layer()
    module = Wanda(sparsity=0.25).compress(layer)
    keep = kept(module)
    assert keep is not None and (keep.sum(1) == 48).all()
    assert torch.equal(dense_weight(module), layer.weight * keep)
