"""LoRA+ trains each tensor at the rate that peft's optimizer would give it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from toys_training import fit, watch_groups

from effbench.checks import toy_run
from effbench.core.errors import Usage
from effbench.core.recipe import parse, parse_step

with safe_open(Path(__file__).parent.parent.parent / "golden" / "low_rank.safetensors", "pt") as file:
    RATES = json.loads(file.metadata()["groups"])

OURS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}


def rates(steps: str, embedding: bool = False) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each trained tensor, by name."""
    run = toy_run("llama", shape={"layers": 1})
    for step in parse(steps).steps:
        run.apply(step)
    if embedding:
        run.model.model.embed_tokens.weight.requires_grad_(True)
    groups = watch_groups(run)
    fit(run, steps=1, lr=1e-3, weight_decay=0.1)
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_rates_are_those_of_pefts_optimizer() -> None:
    found = rates("dora(rank=2, targets=('q_proj', 'down_proj')), lora_plus()", embedding=True)
    expected = {}
    for name, rate in RATES.items():
        path, _, kind = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".")
        if kind in OURS and "embed_tokens" not in path:
            expected[f"{path}.{OURS[kind]}"] = rate
    expected["model.embed_tokens.weight"] = RATES["base_model.model.model.embed_tokens.lora_embedding_A.default"]
    assert {name: rate for name, (rate, _) in found.items()} == pytest.approx(expected)
    decay = {name: decay for name, (_, decay) in found.items()}
    factors = {name: 0.1 if name.endswith((".a", ".b")) else 0.0 for name in found}
    assert decay == factors


@pytest.mark.parametrize(
    ("step", "fast"), [("lora", {"b"}), ("rslora", {"b"}), ("dora", {"b", "m"}), ("adalora", {"p"})]
)
def test_the_factor_of_the_outputs_is_the_fast_one(step: str, fast: set[str]) -> None:
    found = rates(f"{step}(), lora_plus(ratio=4)")
    by_name = {name.rpartition(".")[2]: rate for name, (rate, _) in found.items()}
    assert {name for name, rate in by_name.items() if rate == pytest.approx(4e-3)} == fast
    assert {rate for name, rate in by_name.items() if name not in fast} == {1e-3}


@pytest.mark.parametrize("steps", ["lora_plus(), fit()", "vera(), lora_plus(), fit()", "nf4(), lora_plus(), fit()"])
def test_without_a_low_rank_step_it_is_wrong_usage(steps: str) -> None:
    with pytest.raises(Usage, match=r"needs a low-rank step before it: put .*lora"):
        parse(steps).check_fits()


@pytest.mark.parametrize("step", ["lora_plus(ratio=0.5)", "lora_plus(embedding_lr=0)"])
def test_wrong_usage(step: str) -> None:
    with pytest.raises(Usage, match="must be"):
        parse_step(step)
