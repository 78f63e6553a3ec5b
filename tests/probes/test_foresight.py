"""How far predictions are off is taken from what the run itself has held."""

import pytest

from effbench import probes, sources
from effbench.core.recipe import parse
from effbench.nn.files.load import open_run


def run_recipe(steps, data=None):
    run = open_run(sources.model("tiny"), sources.data(data), "cpu", "float32", 0, {"calibration_sequences": 2})
    for step in parse(steps).steps:
        run.apply(step)
    run.finish()
    return run


def read(run):
    return {name: metric.value for name, metric in probes.take("foresight", run, {}).metrics.items()}


@pytest.mark.parametrize("steps", ["fit(steps=7, batch_size=4)", "nf4(), lora(rank=4), fit(steps=7, batch_size=4)"])
def test_what_is_held_whatever_is_read_is_foretold_to_the_byte(steps):
    """Rows of the task are far shorter than `max_length`: those that were read count."""
    run = run_recipe(steps, "tiny:task")
    assert run.log.fits[-1]["cost"]["length"] < 256
    found = read(run)
    for part in ("weights", "gradients", "optimizer", "resident", "stored"):
        assert found[f"plan_{part}_off"] == 0, part
    assert found["plan_training_off"] <= found["plan_activations_off"] < 0.01


def test_a_prediction_of_something_else_is_off():
    run = run_recipe("fit(steps=7, batch_size=4)", "tiny:task")
    cost = run.log.fits[-1]["cost"]
    before = read(run)
    cost["gradient_bytes"] *= 2
    assert read(run)["plan_gradients_off"] == 0.5
    cost["length"] *= 2
    assert read(run)["plan_activations_off"] > 0.8 > before["plan_activations_off"]


def test_without_a_fit_the_model_alone_is_foretold():
    run = run_recipe("rtn(bits=4)")
    assert read(run) == {"plan_resident_off": 0, "plan_stored_off": 0}
    run.close()
