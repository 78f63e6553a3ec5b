"""Embeddings and head in one tensor: one count and one state; where they part, the configuration says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit, watch_groups

from effbench.checks import probe, probe_model, toy_run
from effbench.core.kinds import Swap
from effbench.nn.files import artifact
from effbench.nn.model.linear import Around
from effbench.nn.run import ModelRun

TIED = ["llama", "qwen2", "gpt2", "opt"]


class Beside(Around):
    """Embeddings and a trained product beside them."""

    def __init__(self, inner: nn.Module, rank: int = 2) -> None:
        super().__init__(inner)
        self.a = nn.Parameter(torch.randn(inner.weight.shape[0], rank))
        self.b = nn.Parameter(torch.zeros(rank, inner.weight.shape[1]))

    def config(self) -> dict[str, Any]:
        return {"rank": self.a.shape[1]}

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids) + self.a[ids] @ self.b


@dataclasses.dataclass(frozen=True)
class Embedded(Swap):
    """A product beside the embeddings, merged into them or kept."""

    sites: ClassVar = ("embedding",)
    merge: bool = True

    def replace(self, module: nn.Module, site: Any) -> nn.Module:
        return Beside(module)

    def settle(self, module: nn.Module) -> nn.Module:
        if not self.merge:
            return module
        assert isinstance(module, Beside)
        merged = (module.inner.weight + module.a @ module.b).detach()
        return nn.Embedding.from_pretrained(merged, freeze=True)


def tied_run(architecture: str) -> ModelRun:
    run = toy_run(architecture, shape={"tie_word_embeddings": True})
    assert run.model.get_input_embeddings().weight is run.model.get_output_embeddings().weight
    return run


@pytest.mark.parametrize("architecture", TIED)
def test_a_tied_tensor_is_trained_and_counted_once(architecture: str) -> None:
    run = tied_run(architecture)
    groups = watch_groups(run)
    report = fit(run, steps=2)
    weight = run.model.get_input_embeddings().weight
    assert weight is run.model.get_output_embeddings().weight
    assert sum(parameter is weight for group in groups for parameter in group["params"]) == 1
    numbers = sum(parameter.numel() for parameter in set(run.model.parameters()))
    assert sum(group["parameters"] for group in report["groups"]) == numbers
    assert report["cost"]["optimizer_bytes"] == pytest.approx(2 * 4 * numbers, rel=1e-3)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("architecture", TIED)
def test_a_product_on_one_side_leaves_the_other_as_it_was(architecture: str, merge: bool, tmp_path: Path) -> None:
    run = tied_run(architecture)
    head = run.model.get_output_embeddings().weight.detach().clone()
    before = probe(run)
    run.apply(Embedded(merge=merge))
    fit(run, steps=3, lr=1e-2)
    trained = probe(run)
    run.finish()
    assert torch.equal(run.model.get_output_embeddings().weight, head)
    assert not torch.equal(trained, before)
    assert run.model.config.tie_word_embeddings is not merge
    if merge:  # else a class of a test stands there, which no file can name
        artifact.save(run.model, tmp_path / "a", run.storage)
        loaded = artifact.load(tmp_path / "a")
        assert torch.equal(probe_model(loaded), probe(run))
        assert loaded.get_input_embeddings().weight is not loaded.get_output_embeddings().weight
