"""Fits on a GPU: float32 inside, costs by its allocator, and the same bits again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from effbench import sources
from effbench.core.recipe import parse
from effbench.core.run import FitReport
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun
from effbench.nn.train import fit as library
from effbench.nn.train.settings import FitSettings

pytestmark = pytest.mark.gpu

SETTINGS = FitSettings(steps=25, lr=1e-4, max_length=128)


def trained(steps: str = "", dtype: str = "bfloat16", folder: Path | None = None) -> tuple[ModelRun, FitReport]:
    run = open_run(sources.model("tiny", None), sources.data("tiny:task"), "cuda:0", dtype, 0)
    run.folder = folder
    for step in parse(steps).steps:
        run.apply(step)
    return run, library.fit(run, SETTINGS)


def test_weights_of_sixteen_bits_have_masters_of_thirty_two() -> None:
    """Steps of 1e-4 are below the resolution of most weights in bfloat16: added there, they would be lost."""
    run, _ = trained()
    before = dict(run.reference.named_parameters())
    moved = [float((p != before[name]).float().mean()) for name, p in run.model.named_parameters() if p.ndim == 2]
    assert next(run.model.parameters()).dtype == torch.bfloat16
    assert min(moved) > 0.2 and sum(moved) / len(moved) > 0.4
    wide, _ = trained(dtype="float32")
    assert {p.dtype for p in wide.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("steps", ["", "bf16()", "lora()", "prefix_tuning(hidden=64)", "prompt_tuning()", "kd()"])
def test_losses_fall_and_costs_are_measured(steps: str) -> None:
    _, report = trained(steps, "float32")
    assert report["loss_last"] < report["loss_first"]
    cost = report["cost"]
    assert cost["activation_bytes"] > 0 and cost["step_ms"] > 0 and cost["flops_per_token"] > 0
    assert cost.get("joules", 1.0) > 0


def test_checkpointing_takes_less_of_the_allocator() -> None:
    whole, less = trained(dtype="float32")[1]["cost"], trained("checkpointing()", "float32")[1]["cost"]
    assert less["activation_bytes"] < 0.7 * whole["activation_bytes"]


def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "EVERY", 0.0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        whole, _ = trained(dtype="float32")
        part = dataclasses.replace(SETTINGS, steps=25)
        cut = open_run(sources.model("tiny", None), sources.data("tiny:task"), "cuda:0", "float32", 0)
        cut.folder = tmp_path

        def stop(unit: str, done: int, total: int) -> None:
            if done == 12:
                raise KeyboardInterrupt

        cut.progress = stop
        with pytest.raises(KeyboardInterrupt):
            library.fit(cut, part)
        again, report = trained(dtype="float32", folder=tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert report["resumed"]
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name
