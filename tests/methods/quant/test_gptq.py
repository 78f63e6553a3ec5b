"""GPTQ against its authors' loop and llm-compressor."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_quant import golden, make_layer, proxy_loss

from effbench.core.errors import Unsupported
from effbench.formats.compensation import inverse_factor
from effbench.formats.grid import Grid, fit_grid
from effbench.formats.integer import IntLinear
from effbench.methods.quant.gptq import GPTQ, solve
from effbench.methods.quant.rtn import RTN
from effbench.nn.model.linear import dense_weight


def test_gptq_compensates_pruned_weights_too() -> None:
    method, layer = GPTQ(group_size=32), make_layer(pruned=0.5)
    assert layer.kept is not None
    held = proxy_loss(layer, dense_weight(method.compress(layer)))
    unaware = make_layer(pruned=0.5)
    unaware.kept = None
    zeroed_later = dense_weight(method.compress(unaware)) * layer.kept
    rounded = dense_weight(RTN(group_size=32).compress(make_layer(pruned=0.5)))
    assert held < proxy_loss(layer, zeroed_later) and held < proxy_loss(layer, rounded)


SETTINGS = sorted(ast.literal_eval(golden("gptq")[1]["settings"]).items())


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_gptq_codes_are_those_of_llm_compressor(name: str, setting: tuple[int, int | None, bool, bool]) -> None:
    tensors, facts = golden("gptq")
    bits, size, _, act = setting
    weight, block = tensors["weight"], int(facts["block"])
    width = weight.shape[1]
    order = tensors["order"] if act else torch.arange(width)
    group = (order // (size or width)).tolist()
    scale, zero, codes = (tensors[f"{name}.{key}"] for key in ("scale", "zero", "codes"))

    def grid_of(column: int, _: Tensor) -> Grid:
        return Grid(scale[:, group[column]], zero[:, group[column]], bits)

    factor = tensors["factor_act" if act else "factor"]
    assert torch.equal(solve(weight[:, order], factor, grid_of, block), codes[:, order])
    # The whole chain, factorisation included; factorisations differ in the last bit between processors.
    hessian = tensors["hessian"][order][:, order]
    chain = solve(weight[:, order], inverse_factor(hessian, float(facts["damp"]), name), grid_of, block)
    assert (chain == codes[:, order]).double().mean() >= 0.999


def find_grid(weight: Tensor, bits: int, symmetric: bool = False, mse: bool = False) -> tuple[Tensor, Tensor]:
    """Scale, a float16 number, and zero-point of every row of `weight` [out, n] by the published formula, [out, 1]."""
    top = 2**bits - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best, least = torch.empty(0), torch.full_like(low, torch.inf)
    for step in range(80 if mse else 1):
        shrink = 1 - step / 100
        scale = (shrink * high - shrink * low) / top
        zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-shrink * low / scale).round()
        error = (round_to(weight, scale, zero, bits) - weight).abs().pow(2.4).sum(1, keepdim=True)
        found = torch.stack([scale, zero])
        best = torch.where(error < least, found, best) if step else found
        least = torch.minimum(error, least)
    return best[0].half().float(), best[1]


def round_to(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scale * (((weight / scale).round() + zero).clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize(("grid", "setting"), ast.literal_eval(golden("gptq_authors")[1]["grids"]).items())
def test_the_grid_of_these_tests_is_the_authors(grid: str, setting: tuple[bool, bool]) -> None:
    tensors, _ = golden("gptq_authors")
    for bits in (3, 4):
        parts = tensors[f"100.g64.b{bits}.weight"].split(64, 1)
        rounded = [round_to(part, *find_grid(part, bits, *setting), bits) for part in parts]
        assert torch.equal(torch.cat(rounded, 1), tensors[f"100.g64.b{bits}.rounded.{grid}"])


def authors_loop(weight: Tensor, hessian: Tensor, method: GPTQ, use: Any = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Dequantized weight, the groups' scales and g_idx by the published loop, column by column, written plainly."""

    def find(w: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero = find_grid(w, method.bits, method.symmetric, method.mse)
        return scale[:, 0], zero[:, 0]

    W, H, size = weight.clone(), hessian.clone(), method.group_size
    n = W.shape[1]
    scale, zero = find(W)
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    static = [find(W[:, i : i + size]) for i in range(0, n, size)] if size and method.static_groups else []
    perm = torch.arange(n)
    if method.act_order:
        perm = H.diagonal().argsort(descending=True, stable=True)
        W, H = W[:, perm], H[perm][:, perm]
    H += method.damp * H.diagonal().mean() * torch.eye(n)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q, scales, g_idx = torch.zeros_like(W), [], torch.zeros(n, dtype=torch.long)
    for i1 in range(0, n, method.block):
        i2 = min(i1 + method.block, n)
        W1, E1 = W[:, i1:i2].clone(), torch.zeros(len(W), i2 - i1)
        for i in range(i2 - i1):
            if size and not static and (i1 + i) % size == 0:
                scale, zero = find(W[:, i1 + i : i1 + i + size])  # the outer matrix
                scales.append(scale)
            if static:
                scale, zero = static[perm[i1 + i] // size]
            w = W1[:, i]
            q = round_to(w, scale, zero, method.bits)
            E1[:, i] = (w - q) / U[i1 + i, i1 + i]
            W1[:, i:] -= E1[:, i : i + 1] @ U[i1 + i : i1 + i + 1, i1 + i : i2]
            Q[:, i1 + i] = q
            g_idx[perm[i1 + i]] = (i1 + i) // size if size else 0
        W[:, i2:] -= E1 @ U[i1:i2, i2:]
    return Q[:, perm.argsort()], scales, g_idx


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(group_size=16, block=32),
        GPTQ(group_size=64, block=32, bits=3),
        GPTQ(group_size=16, block=32, act_order=True),
        GPTQ(group_size=32, block=32, act_order=True, static_groups=True, symmetric=True),
        GPTQ(group_size=32, bits=2, mse=True),
        GPTQ(group_size=48, block=32),  # the last group has 32 inputs
        GPTQ(group_size=48, act_order=True, bits=3),
        GPTQ(group_size=100, act_order=True, static_groups=True),
        GPTQ(group_size=500),
        GPTQ(group_size=None, bits=8),
        GPTQ(group_size=None, act_order=True, bits=3),
    ],
    ids=str,
)
def test_gptq_equals_the_authors_loop(method: GPTQ) -> None:
    layer = make_layer(dead=3)
    expected, scales, g_idx = authors_loop(layer.weight, layer.inputs.hessian, method)
    module = method.compress(layer)
    assert isinstance(module, IntLinear)
    got = module.dense_weight()
    assert ((got - expected).abs() < 1e-6).double().mean() >= 0.999
    if scales:
        assert torch.equal(module.scale[:, 0].float(), scales[0])
    dynamic_order = method.act_order and method.group_size is not None and not method.static_groups
    assert (module.g_idx is not None) == dynamic_order
    if module.g_idx is not None:
        assert torch.equal(module.g_idx.long(), g_idx)


def test_gptq_does_not_depend_on_the_block_size() -> None:
    weights = [dense_weight(GPTQ(group_size=None, block=b).compress(make_layer())) for b in (1, 17, 32, 128, 500)]
    for weight in weights[1:]:
        assert ((weight - weights[0]).abs() > 1e-6).double().mean() <= 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_than_rounding(bits: int) -> None:
    rounding = proxy_loss(make_layer(), dense_weight(RTN(bits, group_size=32).compress(make_layer())))
    gptq = GPTQ(bits, group_size=32)
    assert proxy_loss(make_layer(), dense_weight(gptq.compress(make_layer()))) < 0.7 * rounding


def test_gptq_reports_a_hopeless_hessian() -> None:
    with pytest.raises(Unsupported, match="raise damp"):
        inverse_factor(-torch.eye(4), 0.01, "x")


def test_true_sequential_is_passed_on() -> None:
    assert GPTQ(true_sequential=True).true_sequence and not GPTQ().true_sequence


def update_loop(weight: Tensor, bits: int, row_of: Any, sign: float) -> Tensor:
    """Column by column with an update row of one's choice: q_j = round(w_j), W += sign * (w_j - q_j) * row(j)."""
    work, out, grid = weight.clone(), torch.zeros_like(weight), find_grid(weight, bits)
    for j in range(weight.shape[1]):
        out[:, j : j + 1] = round_to(work[:, j : j + 1], *grid, bits)
        work[:, j + 1 :] += sign * (work[:, j : j + 1] - out[:, j : j + 1]) * row_of(j)[j + 1 :]
    return out


def test_seed_gptq_update_has_the_wrong_sign_and_the_wrong_rows() -> None:
    layer = make_layer()
    hessian = layer.inputs.hessian
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    static = torch.linalg.inv(damped)
    factor = inverse_factor(hessian, 0.01, "x")

    def by_factor(j: int) -> Tensor:
        return factor[j] / factor[j, j]

    def by_inverse(j: int) -> Tensor:
        return static[j] / static[j, j]

    right = update_loop(layer.weight, 3, by_factor, -1)
    ours = dense_weight(GPTQ(3, group_size=None).compress(make_layer()))
    assert ((right - ours).abs() < 1e-6).double().mean() > 0.999
    losses = {
        "right": proxy_loss(layer, right),
        "rounding": proxy_loss(layer, round_to(layer.weight, *find_grid(layer.weight, 3), 3)),
        "seed": proxy_loss(layer, update_loop(layer.weight, 3, by_inverse, +1)),
        "seed's rows, right sign": proxy_loss(layer, update_loop(layer.weight, 3, by_inverse, -1)),
    }
    assert losses["right"] < losses["seed's rows, right sign"] < losses["seed"]
    assert losses["seed"] > 1.5 * losses["rounding"]


def test_seed_gptq_damping_is_not_the_mean_diagonal() -> None:
    tensors, facts = golden("gptq")
    hessian, damp = tensors["hessian"], float(facts["damp"])
    seed_form = hessian + damp * hessian.diagonal().diag()
    seed_factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(seed_form)), upper=True)
    assert (inverse_factor(hessian, damp, "x") - tensors["factor"]).abs().max() < 1e-4 * tensors["factor"].abs().max()
    assert (seed_factor - tensors["factor"]).abs().max() > 1e-2 * tensors["factor"].abs().max()
    near_dead = torch.diag(torch.tensor([1e-12, 1.0, 1.0]))
    assert inverse_factor(near_dead, damp, "x").max() < 20
    assert (near_dead + damp * near_dead.diagonal().diag()).inverse().max() > 1e11  # no protection


def test_seed_gptq_takes_the_hessian_for_its_factor() -> None:
    hessian = make_layer().inputs.hessian
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    factor = inverse_factor(hessian, 0.01, "x")
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(len(hessian)), atol=1e-3)
    assert torch.equal(factor, factor.triu())
    seed_form = torch.cholesky_inverse(damped)  # reads its argument as a Cholesky factor
    assert not torch.allclose(seed_form @ damped, torch.eye(len(hessian)), atol=0.5)


def test_seed_gptq_groups_run_along_outputs() -> None:
    layer = make_layer(out=64, width=128)
    layer.weight[::2] /= 50  # output rows of uneven size, as they are in models
    module = GPTQ(group_size=32).compress(layer)
    assert isinstance(module, IntLinear) and module.scale.shape == (64, 4)  # groups along the inputs of a row

    def error(groups: Tensor, back: Any) -> Tensor:
        """Relative squared error, averaged over rows."""
        off = back(fit_grid(groups, 4).round(groups)) - layer.weight
        return (off.square().sum(1) / layer.weight.square().sum(1)).mean()

    right = error(layer.weight.unflatten(1, (-1, 32)), lambda w: w.flatten(1))
    seed_form = error(layer.weight.T.unflatten(1, (-1, 32)), lambda w: w.flatten(1).T)  # 32 outputs share a scale
    assert seed_form > 20 * right


def test_seed_gptq_range_leaves_out_zero() -> None:
    weight = torch.tensor([[1.0, 1.1, 1.3, 1.6]])
    low, high = weight.min(), weight.max()
    scale = (high - low) / 15
    seed_zero = (-low / scale).round()
    assert seed_zero < 0  # no code between 0 and 15 stands for it: an unsigned zero-point cannot be stored
    grid = fit_grid(weight, 4)
    assert 0 <= grid.zero.item() <= 15
    assert grid.round(torch.zeros(1, 1)).item() == 0
