"""Intrinsic dimension: the fast transform against a dense P, what is trained, and what is left after the merge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from effbench.checks import FIT, fit_two_steps, probe, probe_model, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.methods.peft.intrinsic_dimension import Fastfood, IntrinsicDimension, IntrinsicLinear, draw
from effbench.nn.files import artifact
from effbench.nn.model.linear import dense_weight, kept
from effbench.nn.train.fit import fit


def dense_projection(seed: int, rows: int, dim: int) -> Tensor:
    """P [rows, dim] as the authors' transform has it, H of +-1, in float64."""
    size = 2 ** math.ceil(math.log2(max(rows, dim)))
    signs, order, normal = (part.double() for part in draw(seed, size, torch.device("cpu")))
    h = torch.from_numpy(hadamard(size)).double()
    permutation = torch.eye(size, dtype=torch.float64)[order.long()]
    product = h @ normal.diag() @ permutation @ h @ signs.diag()
    divisor = torch.sqrt(size * normal.square().sum()) * math.sqrt(rows / size)
    return product[:rows, :dim] / divisor


@pytest.mark.parametrize(("shape", "dim"), [((6, 10), 7), ((8, 8), 64), ((16, 20), 100), ((3, 4), 50)])
def test_the_fast_transform_is_a_dense_matrix(shape: tuple[int, int], dim: int) -> None:
    p = dense_projection(3, math.prod(shape), dim)
    phi = torch.randn(dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made: Any = Fastfood.apply(phi, shape, 3)
    torch.testing.assert_close(made.double(), (p @ phi.double()).view(shape), rtol=0, atol=1e-5)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    made.backward(direction)
    assert phi.grad is not None
    torch.testing.assert_close(phi.grad.double(), p.T @ direction.flatten().double(), rtol=0, atol=1e-4)


def test_columns_have_about_unit_norm_and_are_about_orthogonal() -> None:
    rows, dim = 40 * 50, 30
    columns = torch.stack([Fastfood.apply(unit, (40, 50), 5).flatten() for unit in torch.eye(dim)], 1)
    norms = columns.norm(dim=0)
    assert abs(float(norms.mean()) - 1) < 0.02 and float((norms - 1).abs().max()) < 0.1
    inner = columns.T @ columns - columns.square().sum(0).diag()
    assert float(inner.abs().max()) < 6 / math.sqrt(rows)


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    first, again, other = (draw(seed, 64, torch.device("cpu")) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    signs, order, _ = first
    assert set(signs.tolist()) == {-1.0, 1.0} and sorted(order.tolist()) == list(range(64))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["said", "did"])
def test_it_starts_as_the_model_and_trains_dim_numbers(architecture: str, variant: str) -> None:
    run = toy_run(architecture)
    before = probe(run)
    run.apply(IntrinsicDimension(dim=40, variant=variant))
    assert torch.equal(probe(run), before)
    trained = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    sizes = sorted(parameter.numel() for parameter in trained.values())
    assert sizes == ([2, 38] if variant == "said" else [40])  # a scale for each of two blocks, and phi
    frozen = {name: p.clone() for name, p in run.model.named_parameters() if name not in trained}
    report = fit_two_steps(run)
    assert sum(group["parameters"] for group in report["groups"]) == 40
    assert report["cost"]["gradient_bytes"] == 160
    assert all(torch.equal(p, frozen[name]) for name, p in run.model.named_parameters() if name in frozen)
    assert all(parameter.any() for parameter in trained.values())
    if variant == "said":
        scales = next(parameter for parameter in trained.values() if parameter.numel() == 2)
        assert bool((scales != 1).all())


def test_nothing_of_the_projection_is_stored() -> None:
    run = toy_run()
    before = sum(p.nbytes for p in run.model.parameters())
    run.apply(IntrinsicDimension(dim=40))
    held = [*run.model.parameters(), *run.model.buffers()]
    assert sum(p.nbytes for p in held) - before - sum(b.nbytes for b in toy_run().model.buffers()) == 160


def test_each_linear_has_a_slice_of_its_own_scaled_by_its_block() -> None:
    run = toy_run()
    run.apply(IntrinsicDimension(dim=40))
    modules = [module for module in run.model.modules() if isinstance(module, IntrinsicLinear)]
    assert len(modules) == len({module.seed for module in modules}) == len(run.linears()) == 14
    subspace = modules[0].subspace
    subspace.phi.data.normal_(generator=torch.Generator().manual_seed(0))
    subspace.scales.data[:] = torch.tensor([2.0, -3.0])
    for place, module in enumerate(modules):
        assert module.subspace is subspace
        made = Fastfood.apply(subspace.phi, (module.out_features, module.in_features), module.seed)
        torch.testing.assert_close(module.delta(), (2.0 if place < 7 else -3.0) * made)


@pytest.mark.parametrize("steps", ["", "nf4(double_quant=True)", "wanda()"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_merge_is_what_was_trained_and_reloads(steps: str, architecture: str, tmp_path: Any) -> None:
    run = toy_run(architecture)
    if steps:
        run.apply(parse_step(steps))
    run.apply(IntrinsicDimension(dim=30, merge="dense" if "nf4" in steps else "masked"))
    fit(run, FIT)
    modules = {p: m for p, m in run.model.named_modules() if isinstance(m, IntrinsicLinear)}
    expected = {path: module.dense_weight() for path, module in modules.items()}
    masks = {path: kept(module) for path, module in modules.items()}
    apart = probe(run)
    run.settle()
    assert not any(isinstance(module, IntrinsicLinear) for module in run.model.modules())
    for path, weight in expected.items():
        merged = dense_weight(run.model.get_submodule(path))
        torch.testing.assert_close(merged, weight.to(run.model.dtype).float(), rtol=0, atol=0)
        mask = masks[path]
        assert (mask is None) == (steps != "wanda()") and (mask is None or not merged[~mask].any())
    torch.testing.assert_close(probe(run), apart, rtol=0, atol=1e-4)
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    assert torch.equal(probe_model(artifact.load(tmp_path / "model")), probe(run))


def test_sixteen_bit_arithmetic_round_it_leaves_the_projection_in_float32() -> None:
    phi = torch.randn(20, generator=torch.Generator().manual_seed(0))
    plain = Fastfood.apply(phi, (32, 24), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Fastfood.apply(phi, (32, 24), 1), plain)


def test_scales_have_to_leave_something_to_the_projection() -> None:
    with pytest.raises(Unsupported, match="2 blocks leave nothing of dim=2"):
        toy_run().apply(IntrinsicDimension(dim=2))
    toy_run().apply(IntrinsicDimension(dim=2, variant="did"))


@pytest.mark.parametrize("settings", ["dim=0", "variant='other'", "merge='separate'"])
def test_wrong_settings(settings: str) -> None:
    with pytest.raises(Usage, match="intrinsic_dimension"):
        parse_step(f"intrinsic_dimension({settings})")
