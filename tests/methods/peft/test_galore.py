"""GaLore against its authors' package, over refreshes, and what sets it apart from a projection on both sides."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.checks import FIT, check_resume, fit_two_steps, toy_run
from effbench.core.errors import Diverged, Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.methods.peft import galore
from effbench.methods.peft.galore import GaLore, GaLoreAdamW, find_bases
from effbench.nn.train.fit import fit

with safe_open(Path(__file__).parent.parent.parent / "golden" / "galore.safetensors", "pt") as file:
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    FACTS = {name: float(value) for name, value in file.metadata().items() if name in ("scale", "lr", "weight_decay")}
    RANK, EVERY, STEPS = (int(file.metadata()[name]) for name in ("rank", "every", "steps"))

MATRICES = ("tall", "wide", "square")


def make(weights: list[Tensor], rank: int | None = RANK, **settings: Any) -> GaLoreAdamW:
    """The optimizer of these tensors."""
    settings = {"every": EVERY, "scale": FACTS["scale"], "projection": "one-sided", "decay": "after"} | settings
    groups = [{"params": weights, "lr": FACTS["lr"], "weight_decay": FACTS["weight_decay"], "rank": rank}]
    return GaLoreAdamW(groups, **settings)


def leaf(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone())


def gradient(name: str, step: int) -> Tensor:
    parts = GOLDEN[f"{name}.parts"]
    return sum(part * math.cos((0.1 + 0.07 * k) * step + k) for k, part in enumerate(parts))


@pytest.mark.parametrize("name", [*MATRICES, "vector"])
def test_fifty_steps_are_those_of_the_authors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter(range(0, STEPS, EVERY))

    def compare(own: Tensor, rank: int, projection: str) -> dict[str, Tensor]:
        """Bases are of float32, whose last bits and signs are the library's: compare them, and go on with theirs."""
        ((side, basis),) = find_bases(own, rank, projection).items()
        theirs = GOLDEN[f"{name}.basis.{next(taken)}"]
        assert side == ("left" if name == "wide" else "right") and basis.shape == theirs.shape
        dim = 1 if side == "left" else 0
        signs = (basis * theirs).sum(1 - dim, keepdim=True).sign()
        torch.testing.assert_close(basis * signs, theirs, rtol=0, atol=1e-5)
        return {side: theirs}

    monkeypatch.setattr(galore, "find_bases", compare)
    weight = leaf(GOLDEN[f"{name}.start"])
    optimizer = make([weight], None if name == "vector" else RANK)
    for step in range(STEPS):
        weight.grad = gradient(name, step)
        optimizer.step()
        if step % 10 == 9:
            torch.testing.assert_close(weight.data, GOLDEN[f"{name}.{step + 1}"], rtol=0, atol=1e-10)
    assert name == "vector" or next(taken, None) is None  # all three refreshes


def test_the_basis_is_of_the_float32_decomposition() -> None:
    wide = gradient("wide", 0)
    basis = find_bases(wide, RANK, "one-sided")["left"]
    assert basis.dtype == torch.float64 and torch.equal(basis, basis.float().double())
    assert torch.equal(basis, find_bases(wide.float(), RANK, "one-sided")["left"].double())


@pytest.mark.parametrize(("name", "shape"), [("tall", (12, 3)), ("wide", (3, 12)), ("square", (8, 3))])
def test_moments_are_thin_and_not_small_squares(name: str, shape: tuple[int, int]) -> None:
    weight = leaf(GOLDEN[f"{name}.start"])
    weight.grad = gradient(name, 0)
    for projection, expected in (("one-sided", shape), ("two-sided", (RANK, RANK))):
        optimizer = make([weight], projection=projection)
        optimizer.step()
        assert optimizer.state[weight]["m"].shape == optimizer.state[weight]["v"].shape == expected


@pytest.mark.parametrize("name", MATRICES)
def test_the_first_update_is_bound_on_the_shorter_side_alone(name: str) -> None:
    """With R = P^T G, P the r leading vectors, W <- W - lr scale P R / (|R| + eps'): rank r, any row space."""
    weight, own = leaf(GOLDEN[f"{name}.start"]), gradient(name, 0)
    weight.grad = own
    make([weight]).step()
    decay = 1 - FACTS["lr"] * FACTS["weight_decay"]
    update = (GOLDEN[f"{name}.start"] - weight.data / decay) / (FACTS["lr"] * FACTS["scale"])
    left, _, right = torch.linalg.svd(own)
    left, right = left[:, :RANK], right[:RANK]
    low = left.T @ own if name == "wide" else own @ right.T
    step = low / (low.abs() + 1e-6 / math.sqrt(0.001))
    expected = left @ step if name == "wide" else step @ right
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-4)  # the basis is of float32
    other = update @ (torch.eye(len(right.T)) - right.T @ right) if name == "wide" else update - left @ left.T @ update
    assert other.norm() > 0.1 * update.norm()  # what a projection on both sides would leave out


def test_both_sides_are_an_option_and_the_update_is_theirs() -> None:
    weight, own = leaf(GOLDEN["tall.start"]), gradient("tall", 0)
    weight.grad = own
    optimizer = make([weight], projection="two-sided", scale=1.0)
    optimizer.step()
    state = optimizer.state[weight]
    low = state["left"].T @ own @ state["right"].T
    torch.testing.assert_close(state["m"], 0.1 * low)
    step = state["left"] @ (low / (low.abs() + 1e-6 / math.sqrt(0.001))) @ state["right"]
    moved = (GOLDEN["tall.start"] - FACTS["lr"] * step) * (1 - FACTS["lr"] * FACTS["weight_decay"])
    torch.testing.assert_close(weight.data, moved)


def test_a_zero_gradient_at_a_refresh_keeps_the_basis_until_one_has_directions() -> None:
    weight = leaf(GOLDEN["tall.start"])
    optimizer = make([weight], every=2)
    bases = []
    for step, factor in enumerate((1, 1, 0, 0, 1, 1, 1)):
        weight.grad = factor * gradient("tall", 5 * step)
        optimizer.step()
        bases.append(optimizer.state[weight]["right"].clone())
    same = [torch.equal(before, after) for before, after in itertools.pairwise(bases)]
    assert same == [True, True, True, False, True, False]  # after the second zero, and two steps later
    torch.testing.assert_close(bases[4], find_bases(gradient("tall", 20), RANK, "one-sided")["right"])


def test_a_first_gradient_of_zero_leaves_all_but_the_decay_to_the_next() -> None:
    weight = leaf(GOLDEN["tall.start"])
    optimizer = make([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    decayed = GOLDEN["tall.start"] * (1 - FACTS["lr"] * FACTS["weight_decay"])
    torch.testing.assert_close(weight.data, decayed)
    weight.grad = gradient("tall", 0)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["right"], find_bases(weight.grad, RANK, "one-sided")["right"])


def test_the_decay_comes_after_the_update_or_before_it() -> None:
    found = {}
    for decay in ("after", "before"):
        weight = leaf(GOLDEN["tall.start"])
        weight.grad = gradient("tall", 0)
        make([weight], decay=decay).step()
        found[decay] = weight.data
    start, factor = GOLDEN["tall.start"], 1 - FACTS["lr"] * FACTS["weight_decay"]
    torch.testing.assert_close(found["after"] / factor - start, found["before"] - factor * start)
    assert not torch.allclose(found["after"], found["before"], atol=1e-6)


def test_a_gradient_that_is_not_finite_is_told() -> None:
    weight = leaf(GOLDEN["tall.start"])
    weight.grad = torch.full_like(weight, math.inf)
    with pytest.raises(Diverged, match="not finite"):
        make([weight]).step()


@pytest.mark.parametrize("settings", ["every=3", "every=3, projection='two-sided'", "every=1"])
def test_a_killed_fit_goes_on_to_the_same_bits_over_a_refresh(settings: str) -> None:
    check_resume(parse_step(f"galore(rank=8, {settings})"))


def spy(run: Any, rank: int) -> GaLoreAdamW:
    """The optimizer that a fit of the run has used."""
    built: list[GaLoreAdamW] = []
    run.apply(GaLore(rank=rank))
    original = GaLore.optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GaLore, "optimizer", lambda *args: built.append(original(*args)) or built[-1])
        fit(run, FIT)
    return built[0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_linears_of_the_blocks_are_projected_and_nothing_else(architecture: str) -> None:
    run = toy_run(architecture)
    linears = {module.weight: module for module in run.linears().values()}
    optimizer = spy(run, 8)
    thin = {parameter for parameter, state in optimizer.state.items() if "age" in state}
    assert thin == set(linears) and len(optimizer.state) > len(thin)
    for weight, module in linears.items():
        out, width = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
        state = optimizer.state[weight]
        assert ("right" in state) == (out >= width), (out, width)
        assert state["m"].shape == ((out, 8) if out >= width else (8, width))
    numbers = sum(state["m"].numel() for state in optimizer.state.values())
    bases = sum(tensor.numel() for s in optimizer.state.values() for n, tensor in s.items() if n in ("left", "right"))
    assert run.log.fits[0]["cost"]["optimizer_bytes"] == 4 * (2 * numbers + bases)


def test_a_transposed_square_weight_moves_as_the_weight_itself_does() -> None:
    own = gradient("square", 0)
    plain, turned = leaf(GOLDEN["square.start"]), leaf(GOLDEN["square.start"].T.contiguous())
    plain.grad, turned.grad = own, own.T.contiguous()
    make([plain]).step()
    optimizer = make([turned])
    optimizer.param_groups[0]["transposed"] = True
    optimizer.step()
    torch.testing.assert_close(turned.data.T, plain.data)


def test_weights_that_are_not_trained_themselves_are_refused() -> None:
    for steps in ("lora(), galore()", "nf4(), galore()"):
        run = toy_run()
        for step in parse(steps).steps:
            run.apply(step)
        with pytest.raises(Unsupported, match="no linear has a weight that is trained"):
            fit_two_steps(run)


@pytest.mark.parametrize("settings", ["rank=0", "every=0", "scale=0.0", "projection='full'", "decay='never'"])
def test_wrong_settings(settings: str) -> None:
    with pytest.raises(Usage, match="galore"):
        parse_step(f"galore({settings})")
