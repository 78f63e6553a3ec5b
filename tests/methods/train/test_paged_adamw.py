"""Paged AdamW: torch's trajectory with states of 32 bits, bitsandbytes' with 8, and what the record says."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from effbench.checks import FIT, probe, toy_run
from effbench.core.errors import Unavailable, Usage
from effbench.core.recipe import parse, parse_step
from effbench.kernels._common.dynamic_map import SIGNED, UNSIGNED
from effbench.kernels.adamw8bit import reference
from effbench.kernels.adamw8bit.reference import decode, encode
from effbench.methods.train.paged_adamw import SMALLEST, AdamW8bit, PagedAdamW
from effbench.nn.train.fit import fit

with safe_open(Path(__file__).parent.parent.parent / "golden" / "adamw8bit.safetensors", "pt") as file:
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    LR, DECAY = (float(file.metadata()[name]) for name in ("lr", "weight_decay"))
    STEPS = int(file.metadata()["steps"])


def trained(make: Any) -> tuple[dict[str, nn.Parameter], Any]:
    """The golden tensors after all steps of an optimizer, and itself."""
    starts = {name: GOLDEN[f"{name}.start"] for name in ("large", "small")}
    weights = {name: nn.Parameter(start.clone()) for name, start in starts.items()}
    optimizer = make([{"params": list(weights.values()), "lr": LR, "weight_decay": DECAY}])
    for step in range(STEPS):
        for name, weight in weights.items():
            weight.grad = math.cos(0.3 * step) * starts[name] + math.sin(0.2 * step) * starts[name].flip(-1)
        optimizer.step()
    return weights, optimizer


def share_off(found: Tensor, wanted: Tensor, tolerance: float) -> float:
    """Share of numbers that differ: another processor may round one that lies between two levels to the other."""
    return float(((found.double() - wanted.double()).abs() > tolerance).double().mean())


def test_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(SIGNED, GOLDEN["signed"]) and torch.equal(UNSIGNED, GOLDEN["unsigned"])


def test_eight_bits_go_where_those_of_bitsandbytes_go() -> None:
    weights, optimizer = trained(AdamW8bit)
    for name, weight in weights.items():
        assert share_off(weight.data, GOLDEN[f"{name}.nearest"], 1e-6) < 2e-3
    state = optimizer.state[weights["large"]]
    for ours, theirs in (("m", "1"), ("v", "2")):
        codes, absmax = GOLDEN[f"state{theirs}.nearest"], GOLDEN[f"absmax{theirs}.nearest"]
        assert state[ours].dtype == torch.uint8 and state[ours].shape == weights["large"].shape
        torch.testing.assert_close(state[f"{ours}_absmax"], absmax, rtol=1e-3, atol=0)
        assert share_off(state[ours], codes, 0) < 2e-3


def encode_by_table(codes: Tensor, absmax: Tensor, values: Tensor, levels: Tensor) -> None:
    """What bitsandbytes does on a processor: the level nearest to the nearest of 2^16 places in [-1, 1]."""
    flat = values.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % 256)).view(-1, 256)
    absmax.copy_(blocks.abs().amax(1))
    places = ((blocks / absmax[:, None] + 1) / 2 * 65535 + 0.5).floor() / 65535 * 2 - 1
    found = (places.unsqueeze(-1) - levels).abs().argmin(-1)
    codes.copy_(found.flatten()[: len(flat)].view(codes.shape))


def test_all_that_sets_bitsandbytes_apart_on_a_processor_is_its_table_of_levels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    off = share_off(trained(AdamW8bit)[0]["large"].data, GOLDEN["large.table"], 1e-6)
    monkeypatch.setattr(reference, "encode", encode_by_table)
    weights, _ = trained(AdamW8bit)
    for name, weight in weights.items():
        assert share_off(weight.data, GOLDEN[f"{name}.table"], 1e-6) < 2e-3
    assert off > 0.02


def test_rounding_of_states_shows_and_small_tensors_have_none() -> None:
    coarse, optimizer = trained(AdamW8bit)
    exact, _ = trained(torch.optim.AdamW)
    assert coarse["large"].numel() >= SMALLEST > coarse["small"].numel()
    assert float((coarse["large"] - exact["large"]).detach().abs().max()) > 1e-4
    torch.testing.assert_close(coarse["small"], exact["small"], rtol=0, atol=1e-6)
    assert optimizer.state[coarse["small"]]["m"].dtype == torch.float32


def test_numbers_go_to_the_nearest_level_of_their_block() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 2, 1000)
    values[300] = 0.0
    values[512:768] = 0.0  # a block of zeros
    for levels, wanted in ((SIGNED, values), (UNSIGNED, values.abs())):
        codes, absmax = torch.zeros(1000, dtype=torch.uint8), torch.zeros(4)
        encode(codes, absmax, wanted, levels)
        found = decode(codes, absmax, levels)
        for block in range(4):
            part = slice(256 * block, 256 * block + 256)
            factor = wanted[part].abs().max()
            assert absmax[block] == factor
            nearest = (wanted[part, None].double() - (levels * factor).double()).abs().amin(1)
            torch.testing.assert_close((found[part] - wanted[part]).abs().double(), nearest, rtol=1e-3, atol=1e-9)


def fitted(steps: str, architecture: str = "llama") -> Any:
    """A toy run after the steps and a fit."""
    run = toy_run(architecture)
    for step in parse(steps).steps:
        run.apply(step)
    fit(run, FIT)
    return run


def test_32_bits_are_adamw_and_the_record_says_that_nothing_was_paged() -> None:
    paged, plain = fitted("paged_adamw()"), fitted("")
    assert torch.equal(probe(paged), probe(plain))
    assert paged.log.to_json()["notes"] == {"paging": "none on cpu: states of the optimizer stay where they are"}
    assert "notes" not in plain.log.to_json()


def test_bytes_of_states_are_those_of_the_codes() -> None:
    run = fitted("paged_adamw(bits=8)")
    sizes = [parameter.numel() for parameter in run.model.parameters()]
    large = [size for size in sizes if size >= SMALLEST]
    small = sum(sizes) - sum(large)
    expected = 2 * (sum(large) + 4 * sum(-(-size // 256) for size in large)) + 2 * 4 * small
    assert run.log.fits[0]["cost"]["optimizer_bytes"] == expected
    assert expected < 0.3 * fitted("paged_adamw()").log.fits[0]["cost"]["optimizer_bytes"]


def test_loading_keeps_codes_and_factors_in_their_types() -> None:
    weights, optimizer = trained(AdamW8bit)
    again = AdamW8bit([{"params": [nn.Parameter(w.data.double()) for w in weights.values()], "lr": LR}])
    again.load_state_dict(optimizer.state_dict())
    before, after = optimizer.state[weights["large"]], again.state[again.param_groups[0]["params"][0]]
    for name, value in before.items():
        assert after[name] == value if name == "step" else torch.equal(after[name], value)
        assert name == "step" or after[name].dtype == value.dtype


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [32, 8])
def test_qlora_is_a_recipe(architecture: str, bits: int) -> None:
    steps = f"nf4(double_quant=True), lora(rank=4), paged_adamw(bits={bits}), bf16()"
    run = fitted(steps, architecture)
    report = run.log.fits[0]
    assert math.isfinite(report["loss_last"]) and "paging" in run.log.notes
    assert sum(group["parameters"] for group in report["groups"]) == sum(
        4 * (module.in_features + module.out_features) for module in run.linears().values()
    )
    run.finish()
    assert probe(run).isfinite().all()


@pytest.mark.parametrize(("bits", "name"), [(32, "PagedAdamW32bit"), (8, "PagedAdamW8bit")])
def test_on_a_gpu_it_is_that_of_bitsandbytes(bits: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optim = SimpleNamespace(**{name: lambda groups: (name, groups)})
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    run: Any = SimpleNamespace(device=torch.device("cuda"))
    groups = [{"params": [], "lr": 0.1}]
    assert PagedAdamW(bits=bits).optimizer(groups, run) == (name, groups)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Unavailable, match=r"pip install 'effbench\[peers\]'"):
        PagedAdamW(bits=bits).optimizer(groups, run)


def test_wrong_settings() -> None:
    with pytest.raises(Usage, match="bits=5: must be one of 32, 8"):
        parse_step("paged_adamw(bits=5)")
