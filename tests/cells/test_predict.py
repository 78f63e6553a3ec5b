"""What `effbench plan` foretells is what runs measure, and what closed forms say."""

import dataclasses

import pytest
import torch

from effbench import sources
from effbench.cells.predict import PlanOptions, parse_memory, predict
from effbench.core.errors import Usage
from effbench.core.recipe import parse
from effbench.nn.files.load import describe_model, open_run
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.held import held_bytes
from effbench.nn.model.linear import stored_bytes
from effbench.nn.rehearse import Batch, Rows, rehearse
from effbench.probes.memory import resident_bytes

ROWS, TOKENS = 2, 48


def measure(steps):
    """The parts of a prediction as a run on the embedded model has them."""
    run = open_run(sources.model("tiny"), sources.data(None), "cpu", "float32", 0, {"calibration_sequences": 2})
    data = Rows(4, TOKENS)
    data.calibration = run.data.calibration
    run.data = data
    found = {}
    try:
        for step in parse(steps).steps:
            run.apply(step)
            if step.consumes:
                cost = run.log.fits[-1]["cost"]
                found["weights"] = cost["parameter_bytes"] + cost["buffer_bytes"]
                found |= {part: cost[f"{key}_bytes"] for part, key in PARTS.items()}
        run.finish(recipe_is_empty=True)
        stored = stored_bytes(run.model, run.storage)
        found |= {"stored": sum(stored), "stored_constants": stored.metadata, "resident": resident_bytes(run.model)}
        if run.infer.streams:
            engine = open_engine(run)
            engine.score([([1] * TOKENS, [1, 1])] * ROWS)
            found["cache"] = sum(use.nbytes for use in engine.uses)
    finally:
        run.close()
    return found


PARTS = {"gradients": "gradient", "optimizer": "optimizer", "activations": "activation"}


def foretell(steps, model="tiny", dtype=torch.float32, batch=None, context=None, examples=1):
    source = sources.model(model)
    config, _, storage = describe_model(source)
    own, cached = Batch(batch, context), Batch(batch or ROWS, context or TOKENS)
    return rehearse(source, config, storage, dtype, parse(steps).steps, own, cached, examples)


FIT = f"fit(steps=7, batch_size={ROWS}, max_length={TOKENS})"


@pytest.mark.parametrize(
    "steps",
    [
        FIT,
        f"lora(rank=4), {FIT}",
        f"nf4(double_quant=True), lora(rank=4), {FIT}",
        f"galore(rank=8), {FIT}",
        f"paged_adamw(bits=8), {FIT}",
        f"checkpointing(), {FIT}",
        f"bf16(), {FIT}",
        "gptq(group_size=64)",
        "wanda(pattern='2:4')",
        "magnitude(sparsity=0.7)",
        "kv_quant(key_bits=4, value_bits=4, per='group')",
        "streaming_llm(sinks=2, window=16)",
    ],
)
def test_foretells_what_is_measured(steps):
    measured, held = measure(steps), dataclasses.asdict(foretell(steps))
    assert measured.keys() >= ({"weights"} if "fit" in steps else {"stored"})
    for part, size in measured.items():
        if part == "activations":
            assert held[part] == pytest.approx(size, rel=0.1)
        elif part in ("stored", "stored_constants", "resident") and "magnitude" in steps:
            assert held[part] == pytest.approx(size, rel=0.02)  # by how many weights lie above a threshold
        else:
            assert held[part] == size, part
