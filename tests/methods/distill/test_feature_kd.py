"""Feature distillation: errors of projected hidden states over real tokens, and projections that go with the fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_distill import EXAMPLES, check_layouts, layouts, pair, read_blocks, terms
from toys_training import fit, seen

from effbench.checks import probe, probe_model, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.methods.distill.feature_kd import FeatureKD
from effbench.methods.distill.kd import KD
from effbench.methods.distill.snapshot import Snapshot
from effbench.methods.distill.student import Student
from effbench.methods.peft.lora import LoRA
from effbench.methods.train.checkpointing import Checkpointing
from effbench.nn.files import artifact
from effbench.nn.run import ModelRun

NARROW = Student(layers=2, hidden=64, start="random")


def expect(run: ModelRun, places: list[int], weights: list[Tensor], relative: bool) -> list[float]:
    """The error of each layer: examples by their learned tokens, all of their tokens alike."""
    errors = [0.0] * len(places)
    counts = [e.weight * (len(e.ids) - max(1, e.prompt)) for e in EXAMPLES]
    for example, count in zip(EXAMPLES, counts, strict=True):
        states, targets = (read_blocks(run.role(role), list(example.ids)) for role in ("model", "teacher"))
        for layer, place in enumerate(places):
            t = targets[place]
            error = (states[layer] @ weights[layer].T - t).square().mean()
            errors[layer] += float(error / t.square().mean() if relative else error) * count / sum(counts)
    return errors


@pytest.mark.parametrize("error", ["relative", "raw"])
@pytest.mark.parametrize(("layers", "places"), [(None, [1, 3]), ((0, 2), [0, 2])])
def test_the_loss_is_the_sum_of_the_layers_errors(error: Any, layers: Any, places: list[int]) -> None:
    run = pair(student=NARROW)
    weights: list[Tensor] = []

    def note(model: Any) -> None:
        weights[:] = [linear.weight.detach().double() for linear in model.feature_projections_1]

    method = FeatureKD(teacher="teacher", beta=0.3, error=error, layers=layers)
    for name, batch in layouts(run).items():
        (found,) = terms(run, method, batch, note).values()
        assert [w.shape for w in weights] == [(128, 64)] * 2
        expected = expect(run, places, weights, error == "relative")
        assert float(found.detach()) == pytest.approx(0.3 * sum(expected), rel=1e-9), name
        told = [float(run.watched[f"layer_{layer}"].detach()) for layer in range(2)]
        assert told == pytest.approx(expected, rel=1e-9)


def test_the_relative_error_does_not_depend_on_the_size_of_states() -> None:
    """The raw one, which the seed has, does, and with it what a layer counts."""
    values = {}
    for factor in (1.0, 4.0):
        run = pair(student=Student(layers=2))
        with torch.no_grad():
            for role in ("model", "teacher"):  # the state of a block is a sum that these alone add to
                for name, parameter in run.role(role).named_parameters():
                    if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                        parameter.mul_(factor)
                run.role(role).config.rms_norm_eps = 0.0
            for role in ("model", "teacher"):
                for module in run.role(role).modules():
                    if hasattr(module, "variance_epsilon"):
                        module.variance_epsilon = 0.0
        for error in ("relative", "raw"):
            method = FeatureKD(teacher="teacher", error=error)  # type: ignore[arg-type]
            (found,) = terms(run, method, layouts(run)["right"]).values()
            values[factor, error] = float(found.detach())
    assert values[4.0, "relative"] == pytest.approx(values[1.0, "relative"], rel=1e-9)
    assert values[4.0, "raw"] == pytest.approx(16 * values[1.0, "raw"], rel=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_a_copy_has_no_error(architecture: str) -> None:
    run = toy_run(architecture)
    run.apply(Snapshot())
    (found,) = terms(run, FeatureKD(teacher="teacher"), layouts(run)["right"]).values()
    assert float(found.detach()) == 0.0


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("error", ["relative", "raw"])
def test_layouts_are_alike(architecture: str, error: Any) -> None:
    check_layouts(pair(architecture, student=NARROW), FeatureKD(teacher="teacher", error=error))


def test_it_does_not_matter_how_a_step_is_cut(tmp_path: Path) -> None:
    told = {}
    for accumulate in (1, 3):
        run = pair(student=NARROW)
        run.data.pool = EXAMPLES
        run.apply(FeatureKD(teacher="teacher"))
        run.folder = tmp_path / str(accumulate)
        fit(run, steps=1, batch_size=3, accumulate=accumulate)
        told[accumulate] = json.loads((run.folder / "fit-1.jsonl").read_text())
    for part in ("terms", "watched"):
        assert told[3][part] == pytest.approx(told[1][part], rel=1e-9)
    assert told[1]["terms"].keys() == {"feature_kd.feature", "cross_entropy"}
    assert told[1]["watched"].keys() == {"feature_kd.layer_0", "feature_kd.layer_1"}


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (2, 4, (1, 3)),
        (1, 4, (3,)),
        (4, 12, (2, 5, 8, 11)),
        (4, 4, (0, 1, 2, 3)),
        (3, 4, (0, 2, 3)),
        (4, 2, (0, 0, 1, 1)),
    ],
)
def test_blocks_follow_those_at_the_same_depth(student: int, teacher: int, expected: tuple[int, ...]) -> None:
    run = toy_run(shape={"layers": teacher, "hidden_size": 16, "num_key_value_heads": 4})
    run.apply(Snapshot())
    run.model = toy_run(shape={"layers": student, "hidden_size": 16}).model
    assert FeatureKD(teacher="teacher").map_layers(run) == expected


@pytest.mark.parametrize("layers", [(1,), (0, 4), (0, 1, 2)])
def test_layers_that_are_not_there_are_told(layers: tuple[int, ...]) -> None:
    run = pair(student=Student(layers=2))
    with pytest.raises(Unsupported, match=r"the student has 2 blocks, each needs one of the 4 of teacher, from 0"):
        terms(run, FeatureKD(teacher="teacher", layers=layers), layouts(run)["right"])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_projections_are_trained_and_dropped(architecture: str, tmp_path: Path) -> None:
    run = toy_run(architecture)
    run.apply(NARROW)
    names = [name for name, _ in run.model.named_parameters()]
    moved: list[Tensor] = []
    for step in (KD(), FeatureKD(), FeatureKD(layers=(0, 0))):
        run.apply(step)
    seen(run, lambda run: moved.append(torch.stack([p.weight.clone() for p in run.model.feature_projections_2])))
    run.folder = tmp_path
    fit(run, steps=3, lr=1e-2)
    assert moved[0].shape == (2, 128, 64) and not torch.allclose(moved[0], moved[2], atol=1e-3)
    assert [name for name, _ in run.model.named_parameters()] == names
    lines = [json.loads(line) for line in (tmp_path / "fit-1.jsonl").read_text().splitlines()]
    assert lines[0]["terms"].keys() == {"kd.hard", "kd.soft", "feature_kd.feature", "feature_kd#2.feature"}
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    assert torch.equal(probe_model(artifact.load(tmp_path / "model")), probe(run))


def test_states_of_recomputed_blocks_teach_the_same() -> None:
    losses = []
    for steps in ((), (Checkpointing(),)):
        run = toy_run()
        for step in (NARROW, *steps, FeatureKD()):
            run.apply(step)
        losses.append(fit(run, steps=3, lr=1e-2)["loss_last"])
    assert losses[0] == losses[1]


def test_an_adapter_of_the_student_learns_from_states() -> None:
    run = toy_run()
    for step in (Student(layers=1), LoRA(), FeatureKD(beta=10.0)):
        run.apply(step)
    base = run.model.model.layers[0].mlp.up_proj.base.weight.clone()
    report = fit(run, steps=20, lr=1e-2)
    assert torch.equal(run.model.model.layers[0].mlp.up_proj.base.weight, base)
    assert report["loss_last"] < 0.9 * report["loss_first"]


@pytest.mark.parametrize("steps", ["beta=0", "layers=()", "layers=(-1,)", "teacher='model'", "error='squared'"])
def test_settings_that_no_data_can_make_right(steps: str) -> None:
    with pytest.raises(Usage):
        parse_step(f"feature_kd({steps})")
