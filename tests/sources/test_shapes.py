"""Real shapes: random weights in true sizes, for memory and speed of methods that pack them for real."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
import yaml

from effbench import sources
from effbench.cells import execute as cells
from effbench.cells import plan as runner
from effbench.cells import suite
from effbench.cells.options import RunOptions
from effbench.cli import main as cli
from effbench.core.errors import OutOfMemory, Refused, Unsupported
from effbench.core.paths import SUITES
from effbench.core.recipe import parse_step
from effbench.nn.files import load
from effbench.nn.files.load import needs, open_run
from effbench.nn.model.linear import Replaced, top_linears
from effbench.sources import shapes

SMALL = shapes._llama(256, 2, 2, 1, 512, 500, tie_word_embeddings=True, head_dim=128, **shapes._rope(5e5))
GIB = 2**30


@pytest.fixture
def small(monkeypatch):
    """`shape:small`: two layers of a Llama whose head is its embedding."""
    monkeypatch.setitem(shapes.SHAPES, "small", SMALL)


def opened(dtype="bfloat16", device="cpu", name="shape:small", **settings):
    return open_run(sources.model(name), sources.data(None), device, dtype, 0, {"calibration_length": 64} | settings)


# Parameters as the publishers count them, in billions.
PUBLISHED = {
    "llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-2-70b": 68.98, "llama-65b": 65.29, "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55, "llama-3.3-70b": 70.55, "mistral-7b": 7.25, "qwen3-0.6b": 0.6, "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0, "qwen3-8b": 8.2, "qwen3-14b": 14.8, "qwen3-32b": 32.8, "opt-125m": 0.125, "gpt2": 0.124,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_parameters_that_are_published(name):
    weights = needs(load._config(sources.model(f"shape:{name}")), torch.bfloat16).weights
    assert weights / 2e9 == pytest.approx(PUBLISHED[name], rel=0.02)
    assert {*shapes.SHAPES} - {*PUBLISHED} == {"deep-tiny", "moe-tiny"}  # which nobody has published


def test_a_shape_is_built_as_a_checkpoint_would_be(small):
    run = opened()
    model, original = run.model, run.reference
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == original.config.dtype == torch.bfloat16 and run.storage == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(map(torch.equal, model.parameters(), original.parameters()))
    assert float(model.lm_head.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)
    assert opened(None).model.dtype == torch.float32, "on a processor arithmetic is float32"


def test_the_estimate_is_what_the_weights_take(small):
    run = opened()
    held = {t.data_ptr(): t.numel() * t.element_size() for t in [*run.model.parameters(), *run.model.buffers()]}
    found = needs(run.reference.config, torch.bfloat16)
    assert found.weights == sum(held.values())
    assert found.work == 4 * 256 * 512


def test_building_draws_no_chance_from_the_run(small):
    """A reference loaded in the middle of a run must not start its random numbers anew."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    opened()
    assert torch.equal(torch.rand(4), expected)


def room(monkeypatch, *numbers):
    monkeypatch.setattr(load, "_memory", lambda device: numbers)


def test_a_shape_that_cannot_fit_is_refused_before_it_is_built(monkeypatch):
    def build(*_):
        raise AssertionError("it was built")

    monkeypatch.setattr(load, "open_model", build)
    room(monkeypatch, 100 * GIB, 128 * GIB, 0)
    with pytest.raises(OutOfMemory, match=r"weights take 131\.42 GiB, .* 100\.00 GiB of 128\.00 GiB are free") as error:
        opened(name="shape:llama-3.1-70b")
    assert error.value.shortfall["asked_bytes"] > 131 * GIB
    assert error.value.shortfall["total_bytes"] == 128 * GIB


def test_the_work_of_a_method_counts(small, monkeypatch):
    weights, work = needs(load._config(sources.model("shape:small")), torch.bfloat16)
    room(monkeypatch, weights + work - 1, 10 * weights, 0)
    with pytest.raises(OutOfMemory):
        opened()
    room(monkeypatch, weights + work, 10 * weights, 0)
    opened()


def test_no_room_for_the_reference(small, monkeypatch):
    """For good where the device is too small for both, for now where others hold it."""
    run = opened()
    weights = needs(run.model.config, torch.bfloat16).weights
    room(monkeypatch, weights - 1, 2 * weights - 2, weights - 1)
    with pytest.raises(Unsupported, match=r"the unchanged model takes 0\.00 GiB beside"):
        _ = run.reference
    room(monkeypatch, weights - 1, 3 * weights, weights)
    with pytest.raises(OutOfMemory) as error:
        _ = run.reference
    assert error.value.shortfall["free_bytes"] == weights - 1
    room(monkeypatch, weights, 3 * weights, weights)
    assert run.reference is not run.model


# ---- methods on shapes ----

PROBES = {"probes": ["memory", "speed"], "speed_points": [[1, 8]], "speed_new_tokens": 1, "speed_seconds": 0.01}
PROBES |= {"memory_batch": 1, "memory_context": 8, "memory_new_tokens": 1, "calibration_length": 64}


@pytest.fixture
def execute(small, make_job):
    """Runs a recipe on the small shape, in this process, as a cell does."""

    def run(steps, **settings):
        job = make_job("row", steps, **PROBES | settings)
        return cells.execute(dataclasses.replace(job, source=sources.model("shape:small"), data=sources.data(None)))

    return run


@pytest.mark.parametrize(
    "steps", ["gptq()", "awq()", "squeezellm()", "quip_sharp(bits=2, tune_iters=0)", "sparsegpt(pattern='2:4')"]
)
def test_calibrating_methods_pack_for_real_with_two_sequences(small, steps):
    run = opened(None, calibration_sequences=128)
    run.apply(parse_step(steps))
    run.finish()
    assert run.log.calibration_tokens == 2 * 64
    packed = [module for path, module in top_linears(run.model) if path != "lm_head"]
    assert len(packed) == 14 and all(isinstance(module, Replaced) and not module.simulated for module in packed)


def test_memory_and_speed_are_measured_and_quality_is_refused(execute):
    record = execute("gptq()", probes=["memory", "perplexity", "quality", "speed"])
    assert record.outcome == "refused"
    assert record.reason == "perplexity, quality: quality of random weights means nothing"
    assert 4 < record.metrics["bits_per_weight"].value < 5
    assert record.metrics["decode_speedup_b1_c8"].value > 0
    run = opened(None)
    with pytest.raises(Refused):
        run.data.heldout_ids()


def test_memory_is_kept_where_the_reference_does_not_fit(execute, monkeypatch):
    weights = needs(load._config(sources.model("shape:small")), torch.float32).weights
    numbers = iter([(10 * weights, 10 * weights, 0), (weights - 1, 2 * weights - 2, weights)])
    monkeypatch.setattr(load, "_memory", lambda device: next(numbers))
    record = execute("rtn()")
    assert record.outcome == "unsupported"
    assert record.reason.startswith("speed: the unchanged model takes")
    assert record.metrics["stored_bytes"].value > 0


# ---- the suite of real shapes ----


def test_gpu_smoke_covers_what_is_asked_of_it():
    smoke = suite.load("gpu-smoke")
    for tier, model in (("quick", "shape:llama-3.2-1b"), ("full", "shape:llama-3.1-8b")):
        plan = smoke.tier(tier)
        assert plan.models == (model,)
        batches, contexts = ({point[i] for point in plan.settings["speed_points"]} for i in (0, 1))
        assert batches == {1, 8, 64} and len(contexts) == 2
        assert {"memory", "speed"} <= set(plan.settings["probes"]) <= {"cost", "energy", "flops", "memory", "speed"}
    used = {step.key for recipe in smoke.recipes for step in recipe.steps}
    assert used >= {step.key for recipe in suite.load("quant").recipes for step in recipe.steps}, "all of the family"


def test_gpu_smoke_scaled_down(small, tmp_path, monkeypatch, capsys):
    """Its cells end `ok`: nothing in it is refused for random weights."""
    body = yaml.safe_load((SUITES / "gpu-smoke.yaml").read_text(encoding="utf-8"))
    body["tiers"]["quick"]["settings"] |= PROBES | {"probes": body["tiers"]["quick"]["settings"]["probes"]}
    body["settings"] = {"calibration_length": 64, "flops_context": 8}
    path = tmp_path / "smaller.yaml"
    path.write_text(yaml.safe_dump(body | {"name": path.stem}), encoding="utf-8")
    plan = runner.plan(
        RunOptions(suite=str(path), recipes="rtn-4b", model="shape:small", device="cpu", results=str(tmp_path))
    )
    records = [cells.execute(job.at(job.places[:1])) for job in plan.todo]
    assert [(record.cell.recipe, record.outcome) for record in records] == [("baseline", "ok"), ("rtn-4b", "ok")]
    assert {record.cell.model for record in records} == {"shape:small"}
    metrics = records[1].metrics
    assert {"stored_bytes", "prefill_speedup_b1_c8", "decode_percent_of_bandwidth_b1_c8", "apply_seconds"} <= set(
        metrics
    )


def test_a_dry_run_of_gpu_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "suite=gpu-smoke", "device=cpu", "--dry-run", "--json"]) == 0
    assert {row["recipe"] for row in json.loads(capsys.readouterr().out)} >= {"baseline", "rtn-4b", "gptq-4b"}


# ---- on the device itself ----


@pytest.mark.gpu
def test_a_shape_is_built_on_the_device_in_16_bit_and_in_seconds():
    torch.zeros(1, device="cuda:0")  # the device is started
    torch.cuda.reset_peak_memory_stats()
    before, begin = torch.cuda.memory_allocated(), time.monotonic()
    run = opened(None, "cuda:0", "shape:llama-3.2-1b")
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 20
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in run.model.parameters()} == {"cuda"}
    weights = needs(run.model.config, torch.bfloat16).weights
    assert torch.cuda.max_memory_allocated() - before < 1.1 * weights, "no wider copy on the way"
    assert all(map(torch.equal, run.model.parameters(), run.reference.parameters()))


@pytest.mark.gpu
def test_a_shape_that_cannot_fit_touches_nothing():
    free, total = torch.cuda.mem_get_info(0)
    taken = torch.empty(max(0, free - 2 * GIB), dtype=torch.uint8, device="cuda:0")
    torch.cuda.reset_peak_memory_stats(0)
    with pytest.raises(OutOfMemory, match="the weights take") as error:
        opened(None, "cuda:0", "shape:llama-3.1-8b")
    assert torch.cuda.max_memory_allocated(0) == torch.cuda.memory_allocated(0) >= len(taken)
    assert error.value.shortfall["total_bytes"] == total
