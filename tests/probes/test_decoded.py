"""Quality probes on a processor meet packed linears decoded: the same numbers, and nothing else ever sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from effbench import probes
from effbench.checks import applied
from effbench.core.recipe import parse
from effbench.formats.packed import Packed
from effbench.nn.infer.engine import Engine
from effbench.nn.model.decoded import Decoded, decoded

ROTATED = ("quip_sharp",)  # their rotations round in another order
STEPS = [
    "rtn(group_size=32)", "rtn(bits=3, granularity='channel')", "gptq(group_size=32, act_order=True)", "nf4()",
    "nf4(double_quant=True)", "squeezellm()", "fp8_weight(activations=False)", "quip_sharp(bits=2, tune_iters=0)",
    "magnitude(sparsity=0.5)", "magnitude(sparsity=0.97)", "magnitude(pattern='2:4')",
    "magnitude(sparsity=0.5, pattern='block:16x16')", "sparsegpt(pattern='2:4', bits=4)",
]  # fmt: skip


def made(steps: str) -> Any:
    (step,) = parse(steps).steps
    return applied(step)


def list_kinds(model: nn.Module) -> list[type]:
    return [type(entry) for entry in model.modules()]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_numbers_are_those_of_the_packed_model(steps: str, tokens: int) -> None:
    run = made(steps)
    ids = torch.randint(1, 90, (3, tokens), generator=torch.Generator().manual_seed(0))
    engine = Engine(run.model, run.infer)
    before, kinds = engine.logits(ids), list_kinds(run.model)
    assert any(isinstance(entry, Packed) for entry in run.model.modules())
    with decoded(run.model) as any_decoded:
        assert any_decoded and not any(isinstance(entry, Packed) for entry in run.model.modules())
        inside = engine.logits(ids)
    exact = not steps.startswith(ROTATED)
    assert torch.equal(inside, before) if exact else torch.allclose(inside, before, rtol=1e-6, atol=1e-5)
    assert list_kinds(run.model) == kinds and torch.equal(engine.logits(ids), before)


def test_linears_that_round_their_inputs_stay_as_they_are() -> None:
    run = made("fp8_weight()")
    before = list_kinds(run.model)
    with decoded(run.model) as any_decoded:
        assert not any_decoded and list_kinds(run.model) == before


def test_without_memory_for_the_copies_all_stays_packed(monkeypatch: Any) -> None:
    run = made("rtn(group_size=32)")
    before = list_kinds(run.model)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with decoded(run.model) as any_decoded:
        assert not any_decoded and list_kinds(run.model) == before


def test_a_gpu_has_kernels_of_its_own(monkeypatch: Any) -> None:
    run = made("rtn(group_size=32)")
    run.model.to("meta")
    with decoded(run.model) as any_decoded:
        assert not any_decoded


def test_the_packed_linears_are_back_after_a_failure() -> None:
    run = made("rtn(group_size=32)")
    before = [id(entry) for entry in run.model.modules()]
    with pytest.raises(ZeroDivisionError), decoded(run.model):
        raise ZeroDivisionError
    assert [id(entry) for entry in run.model.modules()] == before


def test_only_probes_of_quality_see_it_and_the_log_names_them(monkeypatch: Any) -> None:
    run = made("rtn(group_size=32)")
    seen: dict[str, bool] = {}

    def look(name: str) -> Any:
        def take(run: Any, settings: Any) -> probes.Reading:
            seen[name] = any(isinstance(entry, Decoded) for entry in run.model.modules())
            return probes.Reading()

        return take

    for name in probes.names():
        monkeypatch.setattr(f"effbench.probes.{name}.take", look(name))
        probes.take(name, run, {})
    quality = {"acceptance", "answers", "completion", "distance", "floor", "perplexity", "quality"}
    assert {name for name, is_decoded in seen.items() if is_decoded} == quality == probes.QUALITY
    assert set(run.log.to_json()["decoded"]) == quality
