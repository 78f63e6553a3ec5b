"""Quantizers against golden tensors of other implementations, plain re-computations and closed forms."""

from __future__ import annotations

import ast
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from sklearn.cluster import KMeans
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from effbench.core.errors import Unsupported, Usage
from effbench.core.run import RunLog
from effbench.core.views import Layer
from effbench.formats.compensation import inverse_factor
from effbench.formats.grid import Grid, fit_grid
from effbench.formats.integer import IntLinear
from effbench.formats.lattice import encode, rotate, rotate_back
from effbench.kernels.e8p_linear.cases import RESIDUAL_SCALE
from effbench.kernels.e8p_linear.codebook import decode
from effbench.kernels.e8p_linear.reference import E8PMatrix
from effbench.methods.quant import nf4
from effbench.methods.quant._kmeans import Sums, kmeans, lloyd
from effbench.methods.quant.awq import AWQ
from effbench.methods.quant.fp8_weight import FP8Weight
from effbench.methods.quant.gptq import GPTQ, solve
from effbench.methods.quant.nf4 import NF4
from effbench.methods.quant.quip_sharp import QuIPSharp, block_ldl, ldlq
from effbench.methods.quant.rtn import RTN
from effbench.methods.quant.squeezellm import SqueezeLLM
from effbench.nn.calibration import BlockInputs, Inputs, block_inputs, view_layer
from effbench.nn.kinds.weights import stream
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import MaskedLinear, dense_weight, stored_bytes

GOLDEN = Path(__file__).parent.parent.parent / "golden"
NEEDS = {"norm", "hessian", "raw"}


@pytest.fixture(autouse=True)
def _small_and_alone() -> Any:
    """No gradients, and one thread: several only get in each other's way on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a golden file and where they come from."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def make_layer(
    out: int = 48, width: int = 128, seed: int = 0, bias: bool = False, pruned: float = 0.0, dead: int = 0
) -> Layer:
    """A linear with correlated inputs of uneven size; some weights pruned and some inputs dead if asked for."""
    generator = torch.Generator().manual_seed(seed)
    linear: nn.Module = nn.Linear(width, out, bias)
    weight = torch.randn(out, width, generator=generator) * 0.02
    linear.weight.data = weight
    if bias:
        linear.bias.data = torch.randn(out, generator=generator)
    if pruned:
        keep = torch.rand(out, width, generator=generator) >= pruned
        linear = MaskedLinear.of(weight, keep, linear.bias if bias else None)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(1024, width, generator=generator) @ mixing * (0.1 + torch.rand(width, generator=generator) * 2)
    x[:, :dead] = 0
    inputs = Inputs(NEEDS, len(x))
    inputs.add(x)
    inputs.grad2 = torch.rand(out, width, generator=generator) ** 4
    return view_layer("model.layers.0.mlp.up_proj", linear, inputs, seed=seed)


def proxy_loss(layer: Layer, weight: Tensor) -> float:
    """tr(D H D^T), the squared change of the layer's outputs."""
    delta = weight.double() - dense_weight(layer.module).double()
    return float(((delta @ layer.inputs.second_moment) * delta).sum())


# Uniform grids


def test_settings_no_data_can_mend_are_usage_errors() -> None:
    for make in (
        lambda: RTN(bits=5),
        lambda: RTN(group_size=0),
        lambda: RTN(grid="awq", mse=True),
        lambda: GPTQ(bits=1),
        lambda: GPTQ(group_size=None, static_groups=True),
        lambda: GPTQ(damp=0.0),
        lambda: AWQ(bits=16),
        lambda: AWQ(grid=0),
        lambda: QuIPSharp(bits=8),
        lambda: NF4(block=0),
        lambda: SqueezeLLM(bits=8),
        lambda: SqueezeLLM(outliers=1.0),
        lambda: FP8Weight(granularity="group"),  # type: ignore[arg-type]
    ):
        with pytest.raises(Usage):
            make()


@pytest.mark.parametrize("method", [RTN(), GPTQ(), AWQ()])
def test_width_that_groups_do_not_divide(method: Any) -> None:
    with pytest.raises(Unsupported, match=r"up_proj: width 56 is not a multiple of group_size 128"):
        layer = make_layer(width=56)
        method._quantize(layer, None) if isinstance(method, AWQ) else method.compress(layer)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_grid_is_that_of_compressed_tensors(bits: int, symmetric: bool) -> None:
    tensors, _ = golden("rtn")
    grid = fit_grid(tensors["weight"], bits, symmetric)
    name = f"b{bits}_{'sym' if symmetric else 'asym'}"
    assert torch.equal(grid.scale[..., 0], tensors[f"{name}.scale"])
    assert torch.equal(grid.zero[..., 0], tensors[f"{name}.zero"])


def test_the_two_published_grids_differ_where_a_group_has_one_sign() -> None:
    weight = torch.tensor([[0.5, 0.75, 1.0, 1.5]])
    ours, theirs = fit_grid(weight, 4), fit_grid(weight, 4, grid="awq")
    assert ours.scale.item() == pytest.approx(1.5 / 15) and ours.zero.item() == 0
    assert theirs.scale.item() == pytest.approx(1.0 / 15) and theirs.zero.item() == 0  # clamped from -8
    both = torch.tensor([[-0.5, 0.25, 1.0]])
    assert torch.allclose(fit_grid(both, 4).rounded(both), fit_grid(both, 4, grid="awq").rounded(both))
    assert fit_grid(both, 4, True).scale.item() == pytest.approx(2 / 15)
    assert fit_grid(both, 4, True, "awq").scale.item() == pytest.approx(1 / 7)


def test_mse_equals_a_plain_search() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) ** 3
    grid = fit_grid(weight, 3, mse=True)
    for row in range(6):
        w = weight[row]
        low, high = min(w.min().item(), 0), max(w.max().item(), 0)
        best = (float("inf"), 0.0)
        for i in range(80):
            scale = torch.tensor((1 - i / 100) * (high - low) / 7)
            zero = (-(1 - i / 100) * low / scale).round()
            error = (((w / scale).round() + zero).clamp(0, 7) - zero) * scale - w
            best = min(best, (float(error.abs().pow(2.4).sum()), float(scale)))
        assert grid.scale[row].item() == pytest.approx(best[1], rel=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("grid", ["gptq", "awq"])
def test_rtn_rounds_to_the_nearest_stored_point(granularity: Any, symmetric: bool, grid: Any) -> None:
    layer = make_layer(bias=True)
    method = RTN(bits=4, granularity=granularity, group_size=32, symmetric=symmetric, grid=grid)
    module = method.compress(layer)
    assert isinstance(module, IntLinear)
    scale, _ = module.grid()
    error = (module.dense_weight() - layer.weight).abs() / scale
    # The end of the range may lie half a step outside the grid: the zero-point is rounded.
    assert error.max() <= (1.01 if not symmetric else 0.56)
    assert (error > 0.51).float().mean() < 0.02
    rows = 1 if granularity == "tensor" else 48
    assert module.scale.shape == (rows, 4 if granularity == "group" else 1)
    x = torch.randn(3, 128)
    assert torch.allclose(module(x), x @ module.dense_weight().T + layer.bias, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        RTN(group_size=32),
        RTN(grid="awq", group_size=32, bits=2),
        GPTQ(group_size=32),
        GPTQ(group_size=32, act_order=True, symmetric=True),
        NF4(),
        SqueezeLLM(bits=3),
        FP8Weight(),
    ],
    ids=str,
)
def test_pruned_weights_stay_zero(method: Any) -> None:
    layer = make_layer(pruned=0.5)
    weight = dense_weight(method.compress(layer))
    assert layer.kept is not None and not weight[~layer.kept].any()
    assert weight[layer.kept].count_nonzero() > 0.5 * layer.kept.sum()


def test_gptq_compensates_pruned_weights_too() -> None:
    method, layer = GPTQ(group_size=32), make_layer(pruned=0.5)
    assert layer.kept is not None
    held = proxy_loss(layer, dense_weight(method.compress(layer)))
    unaware = make_layer(pruned=0.5)
    unaware.kept = None
    zeroed_later = dense_weight(method.compress(unaware)) * layer.kept
    rounded = dense_weight(RTN(group_size=32).compress(make_layer(pruned=0.5)))
    assert held < proxy_loss(layer, zeroed_later) and held < proxy_loss(layer, rounded)


# GPTQ

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


def authors_loop(weight: Tensor, hessian: Tensor, method: GPTQ, use: Any = None) -> tuple[Tensor, list[Tensor], Tensor]:
    """Dequantized weight, the groups' scales and g_idx by the published loop, column by column, written plainly."""

    def find(w: Tensor) -> tuple[Tensor, Tensor]:
        grid = fit_grid(w, method.bits, method.symmetric, mse=method.mse).stored()
        return grid.scale[:, 0], grid.zero[:, 0]

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
            q = scale * ((w / scale).round().add(zero).clamp(0, 2**method.bits - 1) - zero)
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


def update_loop(weight: Tensor, grid: Grid, row_of: Any, sign: float) -> Tensor:
    """Column by column with an update row of one's choice: q_j = round(w_j), W += sign * (w_j - q_j) * row(j)."""
    work, out = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        out[:, j : j + 1] = grid.rounded(work[:, j : j + 1])
        work[:, j + 1 :] += sign * (work[:, j : j + 1] - out[:, j : j + 1]) * row_of(j)[j + 1 :]
    return out


def test_seed_gptq_update_has_the_wrong_sign_and_the_wrong_rows() -> None:
    layer = make_layer()
    hessian = layer.inputs.hessian
    grid = fit_grid(layer.weight, 3).stored()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    static = torch.linalg.inv(damped)
    factor = inverse_factor(hessian, 0.01, "x")

    def by_factor(j: int) -> Tensor:
        return factor[j] / factor[j, j]

    def by_inverse(j: int) -> Tensor:
        return static[j] / static[j, j]

    right = update_loop(layer.weight, grid, by_factor, -1)
    ours = dense_weight(GPTQ(3, group_size=None).compress(make_layer()))
    assert ((right - ours).abs() < 1e-6).double().mean() > 0.999
    losses = {
        "right": proxy_loss(layer, right),
        "rounding": proxy_loss(layer, grid.rounded(layer.weight)),
        "seed": proxy_loss(layer, update_loop(layer.weight, grid, by_inverse, +1)),
        "seed's rows, right sign": proxy_loss(layer, update_loop(layer.weight, grid, by_inverse, -1)),
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
        off = back(fit_grid(groups, 4).rounded(groups)) - layer.weight
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
    assert grid.rounded(torch.zeros(1, 1)).item() == 0


# NF4 and FP8


def test_nf4_is_that_of_bitsandbytes() -> None:
    tensors, facts = golden("nf4")
    assert torch.equal(nf4.LEVELS, tensors["levels"])
    codes, absmax = nf4.quantize(tensors["weight"], int(facts["block"]))
    assert torch.equal(codes.to(torch.uint8), tensors["codes"])
    assert torch.equal(absmax, tensors["absmax"])
    layer = make_layer()
    layer.weight = tensors["weight"]
    expected = (nf4.LEVELS[tensors["codes"].long()].view(-1, 64) * tensors["absmax"][:, None]).view(layer.weight.shape)
    assert torch.equal(dense_weight(NF4().compress(layer)), expected)


def test_nf4_double_quantization() -> None:
    tensors, _ = golden("nf4")
    layer = make_layer()
    layer.weight = tensors["weight"]
    plain, double = NF4().compress(layer), NF4(double_quant=True).compress(layer)
    theirs = tensors["dynamic_map"][tensors["absmax_code"].long()]
    theirs *= tensors["absmax_scale"].repeat_interleave(256)[: len(theirs)]
    factors = double.factors()
    off = (factors - (theirs + tensors["absmax_mean"])).abs()
    # bitsandbytes' processor code picks the neighbour of the nearest entry for some 0.2 % of the factors.
    assert (off > 1e-6).double().mean() < 0.01
    assert off.max() < 0.02 * tensors["absmax_scale"].max()
    errors = (plain.factors() - factors).abs(), (plain.factors() - theirs - tensors["absmax_mean"]).abs()
    assert errors[0].mean() <= errors[1].mean() * 1.001
    assert (dense_weight(double) - tensors["dense_double"]).abs().mean() < 1e-5


def test_double_quantization_saves_0_373_bit() -> None:
    layer = make_layer(out=1024, width=1024)
    shared = 4 * (256 + 1) * 8 / 1024**2  # the map and the mean, once per matrix
    published = 32 / 64 - (8 / 64 + 32 / (64 * 256))
    assert published == pytest.approx(0.373, abs=5e-4)
    sizes = [sum(stored_bytes(NF4(double_quant=d).compress(layer), torch.float32)) for d in (False, True)]
    assert 8 * (sizes[0] - sizes[1]) / 1024**2 + shared == pytest.approx(published, abs=1e-6)


def test_seed_nf4_levels_are_not_the_published_ones() -> None:
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    seed_form = normal.icdf((2 * torch.arange(16, dtype=torch.float64) + 1) / 32)
    seed_form = (seed_form / seed_form.max()).float()
    assert seed_form.abs().min() > 0.04  # no zero
    assert (seed_form - nf4.LEVELS).abs().max() > 0.04
    assert torch.equal(seed_form, -seed_form.flip(0)) or torch.allclose(seed_form, -seed_form.flip(0), atol=1e-6)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    built = torch.cat([below, torch.zeros(1), above.flip(0)])
    assert torch.allclose((built / built.max()).float(), nf4.LEVELS, atol=3e-7)
    # Blocks are scaled by their largest magnitude: it is kept exactly.
    weight = torch.randn(4, 64)
    codes, absmax = nf4.quantize(weight, 64)
    assert torch.equal(weight.abs().amax(1), absmax) and set(codes[weight.abs() == absmax[:, None]].tolist()) <= {0, 15}


def test_fp8_weight() -> None:
    layer = make_layer(bias=True)
    for granularity, activations in (("row", True), ("tensor", True), ("row", False)):
        module = FP8Weight(granularity, activations).compress(layer)  # type: ignore[arg-type]
        largest = layer.weight.abs().amax(1, keepdim=True) if granularity == "row" else layer.weight.abs().max()
        scale = largest / 448
        expected = (layer.weight / scale).to(torch.float8_e4m3fn).float() * scale
        assert torch.allclose(dense_weight(module), expected, rtol=1e-6)
        x = torch.randn(5, 128)
        close = 0.0 if not activations else 0.1
        assert torch.allclose(module(x), x @ expected.T + layer.bias, atol=1e-4 + close)


# AWQ


def stub_run(model: nn.Module, length: int = 32) -> Any:
    """What streaming asks of a run."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(model.config.vocab_size, (length,), generator=generator) for _ in range(2)]
    return types.SimpleNamespace(
        model=model,
        seed=0,
        device=torch.device("cpu"),
        log=RunLog(),
        targeted=lambda path: True,
        linears=lambda: dict(Blocks(model).linears()),
        calibration=lambda: texts,
    )


def tiny(kind: str = "llama", heads: int = 4) -> nn.Module:
    torch.manual_seed(0)
    common: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    model: nn.Module
    if kind == "opt":
        model = OPTForCausalLM(OPTConfig(**common, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64))
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=128, num_key_value_heads=heads))
    for norm in (m for n, m in model.named_modules() if "norm" in n or ".ln_" in n):
        norm.weight.data = 0.2 + torch.rand_like(norm.weight) ** 4 * 8  # uneven channels, for something to scale
    return model.eval()


def first_block(model: nn.Module) -> tuple[BlockInputs, Any]:
    run = stub_run(model)
    view = Blocks(model)
    hidden, calls = block_inputs(run, view)
    block = BlockInputs(run, 0, hidden, calls[0])
    groups = view.shared_inputs(view.blocks[0])
    block.gather(groups, {"norm", "hessian", "raw"})
    return block, groups


@pytest.mark.parametrize("scale", ["paper", "duo", "seed"])
def test_awq_scales_equal_a_float64_grid_search(scale: Any) -> None:
    method = AWQ(bits=3, group_size=32, scale=scale)
    block, groups = first_block(tiny())
    for group in groups if scale == "paper" else groups[:1]:
        layers = block.layers([group])
        found = method._scale(block, group, layers)
        module, x = group.inspect, layers[0].inputs.raw
        weights = [layer.weight.clone() for layer in layers]
        best = (float("inf"), torch.empty(0))
        originals = [layer.module.weight.data.clone() for layer in layers]
        before = [out.double() for out in block.output_of(module)]
        for step in range(20):
            alpha = step / 20
            size = x.double().abs().mean(0)
            if scale == "paper":
                s = size**alpha
            elif scale == "seed":
                s = (x.double().norm(dim=0) / torch.cat(weights).abs().amax(0).double()) ** alpha
            else:
                parts = torch.cat(weights).double().abs().unflatten(1, (-1, 32))
                share = (parts / (parts.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)
                s = size**alpha / (share ** (1 - alpha) + 1e-4)
            s = s.clamp(min=1e-4)
            s = (s / (s.max() * s.min()).sqrt()).float()
            for layer, weight in zip(layers, weights, strict=True):
                parts = (weight * s).unflatten(1, (-1, 32))
                low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
                step_size = ((high - low).clamp(min=1e-5) / 7).half().float()
                zero = (-(low / ((high - low).clamp(min=1e-5) / 7)).round()).clamp(0, 7)
                q = (((parts / step_size).round() + zero).clamp(0, 7) - zero) * step_size
                layer.module.weight.data = q.flatten(1) / s
            after = [out.double() for out in block.output_of(module)]
            error = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
            if error < best[0]:
                best = (error, s)
            for layer, weight in zip(layers, originals, strict=True):
                layer.module.weight.data = weight.clone()
        assert found is not None
        assert torch.allclose(found, best[1], rtol=1e-4)


def test_awq_without_alpha_and_clip_is_rounding() -> None:
    model, other = tiny(), tiny()
    stream(stub_run(model), AWQ(group_size=32, grid=1, clip=False))
    stream(stub_run(other), RTN(group_size=32, grid="awq"))
    for (_, a), (_, b) in zip(Blocks(model).linears(), Blocks(other).linears(), strict=True):
        assert torch.equal(dense_weight(a), dense_weight(b))


@pytest.mark.parametrize(("kind", "heads"), [("llama", 4), ("llama", 2), ("opt", 4)])
def test_awq_folding_changes_nothing_but_the_rounding(kind: str, heads: int) -> None:
    """At 8 bits the folded model computes what the original did: scales cancel."""
    model = tiny(kind, heads)
    ids = torch.arange(24)[None]
    before = model(ids).logits
    norms = {n: m.weight.clone() for n, m in model.named_modules() if "layers.0" in n and "norm" in n}
    stream(stub_run(model), AWQ(bits=8, group_size=32, clip=False))
    after = model(ids).logits
    assert (after - before).norm() < 0.02 * before.norm()
    assert any(not torch.equal(model.get_submodule(n).weight, w) for n, w in norms.items())


def test_awq_beats_rounding_on_the_module_output() -> None:
    ids = torch.arange(24)[None]
    before = tiny()(ids).logits
    errors = []
    for method in (RTN(bits=3, group_size=32, grid="awq"), AWQ(bits=3, group_size=32)):
        model = tiny()
        stream(stub_run(model), method)
        errors.append(float((model(ids).logits - before).norm()))
    assert errors[1] < errors[0]


def test_awq_clips_all_but_queries_and_keys() -> None:
    with_clip, plain = (AWQ(bits=2, group_size=32, clip=c).compress_block(*first_block(tiny())) for c in (True, False))
    assert with_clip.keys() == plain.keys() and len(plain) == 7
    for name, module in with_clip.items():
        same = torch.equal(dense_weight(module), dense_weight(plain[name]))
        assert same == name.endswith(("q_proj", "k_proj"))


def test_awq_clip_equals_a_search_over_tokens() -> None:
    layer = make_layer(out=16, width=64)
    x = layer.inputs.raw
    weight = layer.weight.unflatten(1, (-1, 32))
    clipped = AWQ(bits=3, group_size=32)._clipped(weight, layer.inputs.second_moment.float())
    tokens = x.unflatten(1, (-1, 32))
    largest = weight.abs().amax(-1, keepdim=True)
    errors = []
    for step in range(10):
        limit = largest * (1 - step / 20)
        cut = weight.clamp(-limit, limit)
        delta = fit_grid(cut, 3, grid="awq").stored().rounded(cut) - weight
        errors.append(torch.einsum("tgi,ogi->tog", tokens, delta).square().mean(0))
    best = torch.stack(errors).argmin(0)
    limit = largest * (1 - best.unsqueeze(-1) / 20)
    assert best.max() > 0
    assert torch.allclose(clipped, weight.clamp(-limit, limit))


def test_seed_awq_scale_is_another_formula() -> None:
    layers = [make_layer()]
    paper, seed = AWQ().candidate(layers, 0.5), AWQ(scale="seed").candidate(layers, 0.5)
    mean = layers[0].inputs.raw.abs().mean(0)
    expected = mean.sqrt() / (mean.sqrt().max() * mean.sqrt().min()).sqrt()
    assert torch.allclose(paper, expected, rtol=1e-3)
    assert (paper / seed - 1).abs().max() > 0.05
    layers[0].weight[:, :8] *= 10  # the seed's form follows the weights, the paper's does not
    assert torch.equal(AWQ().candidate(layers, 0.5), paper)
    assert not torch.allclose(AWQ(scale="seed").candidate(layers, 0.5), seed, rtol=0.05)


# QuIP#


def test_e8p_codebook() -> None:
    points = decode(torch.arange(2**16))
    assert len(points.unique(dim=0)) == 2**16
    vectors = torch.randn(2**16, 8, generator=torch.Generator().manual_seed(0))
    codes, _ = encode(vectors * 1.03, 2)
    error = (decode(codes) / 1.03 - vectors).square().mean()
    assert error == pytest.approx(0.0913, abs=5e-4)


def test_block_ldl() -> None:
    hessian = make_layer(width=64).inputs.second_moment.float() + 0.1 * torch.eye(64)
    lower = block_ldl(hessian)
    blocks = lower.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 1, 3)
    assert torch.allclose(blocks[range(8), range(8)], torch.eye(8).expand(8, 8, 8), atol=1e-5)
    middle = torch.linalg.solve(lower, torch.linalg.solve(lower, hessian).T)
    off = middle.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 1, 3).clone()
    off[range(8), range(8)] = 0
    assert off.abs().max() < 1e-3 and torch.equal(lower, lower * torch.block_diag(*[torch.ones(8, 8)] * 8).cummax(0)[0])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ldlq_equals_the_plain_loops(bits: int) -> None:
    layer = make_layer(out=24, width=32)
    hessian = layer.inputs.second_moment.float() / layer.inputs.second_moment.diagonal().mean().float()
    hessian += 0.01 * torch.eye(32)
    weight = layer.weight / layer.weight.std()

    def points(target: Tensor) -> Tensor:
        codes, residual = encode(target.unsqueeze(1), bits)
        return E8PMatrix(codes, torch.ones(()), residual, RESIDUAL_SCALE[bits]).dense(8)

    hat, lower = torch.zeros_like(weight), block_ldl(hessian)
    for k in range(24, -8, -8):
        hat[:, k : k + 8] = points(weight[:, k : k + 8] + (weight - hat)[:, k + 8 :] @ lower[k + 8 :, k : k + 8])
    for tuned in (0, 2):
        for _ in range(tuned):
            for k in range(24, -8, -8):
                own = torch.linalg.inv(hessian[k : k + 8, k : k + 8])
                hat[:, k : k + 8] = points(hat[:, k : k + 8] + (weight - hat) @ hessian[:, k : k + 8] @ own)
        codes, residual = ldlq(weight, hessian, bits, tuned)
        got = E8PMatrix(codes, torch.ones(()), residual, RESIDUAL_SCALE[bits]).dense(32)
        assert ((got - hat).abs() < 1e-4).double().mean() > 0.99


def quip_loss(method: QuIPSharp, seed: int = 0) -> float:
    layer = make_layer(out=64, width=64, seed=seed)
    return proxy_loss(layer, dense_weight(method.compress(layer)))


def test_quip_sharp_by_bits_and_passes() -> None:
    losses = [quip_loss(QuIPSharp(bits)) for bits in (2, 3, 4)]
    assert losses[0] > 2.5 * losses[1] > 6 * losses[2]
    assert losses[0] < quip_loss(QuIPSharp(2, tune_iters=0))


def test_quip_sharp_rotation_changes_neither_weight_nor_loss() -> None:
    layer = make_layer(out=24, width=96)
    generator = torch.Generator().manual_seed(1)
    signs = [torch.randint(2, (size,), generator=generator) * 2.0 - 1 for size in (96, 24)]
    assert torch.allclose(rotate_back(rotate(layer.weight, *signs), *signs), layer.weight, atol=1e-6)
    moment = layer.inputs.second_moment.float()
    delta = torch.randn(24, 96, generator=generator)
    plain = ((delta @ moment) * delta).sum()
    turned, turned_moment = rotate(delta, *signs), rotate(moment, signs[0], signs[0])
    assert ((turned @ turned_moment) * turned).sum() == pytest.approx(float(plain), rel=1e-4)


def test_quip_sharp_needs_more_than_rotations() -> None:
    """The seed has the rotations only: with them, scalar rounding loses to the lattice with LDLQ."""
    layer = make_layer(out=64, width=64)
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randint(2, (64,), generator=generator) * 2.0 - 1 for _ in range(2)]
    turned = rotate(layer.weight, *signs)
    step = turned.std() * 0.9957  # best step of the four-level mid-rise grid on a normal distribution
    scalar = ((turned / step - 0.5).round().clamp(-2, 1) + 0.5) * step
    assert quip_loss(QuIPSharp(2)) < 0.6 * proxy_loss(layer, rotate_back(scalar, *signs))


def test_quip_sharp_is_deterministic_and_refuses_what_it_cannot_hold() -> None:
    a, b, c = (dense_weight(QuIPSharp().compress(make_layer(64, 64, seed=s))) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    with pytest.raises(Unsupported, match="pruned"):
        QuIPSharp().compress(make_layer(64, 64, pruned=0.5))
    with pytest.raises(Unsupported, match="width 60"):
        QuIPSharp().compress(make_layer(64, 60))
    with pytest.raises(Unsupported, match="Hadamard"):
        QuIPSharp().compress(make_layer(64, 8 * 23))


# SqueezeLLM


def rows(n: int, count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ascending values and heavy-tailed weights [count, n], float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, n, generator=generator, dtype=torch.float64).sort(1).values * 0.02
    return values, torch.randn(count, n, generator=generator, dtype=torch.float64).pow(4)


def inertia(values: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    return ((values.unsqueeze(2) - centres.unsqueeze(1)).square().amin(2) * weights).sum(1)


@pytest.mark.parametrize(("n", "k"), [(64, 4), (128, 8), (300, 16)])
def test_kmeans_equals_scikit_learn(n: int, k: int) -> None:
    values, weights = rows(n)
    share = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    start = values.quantile(share, dim=1).T.contiguous()
    same = lloyd(Sums(values, weights), start)
    ours = inertia(values, weights, kmeans(values, weights, k))
    for row in range(len(values)):
        points, by = values[row, :, None].numpy(), weights[row].numpy()
        theirs = KMeans(k, init=start[row, :, None].numpy(), n_init=1, max_iter=1000, tol=0)
        theirs.fit(points, sample_weight=by)
        centres = torch.from_numpy(theirs.cluster_centers_).flatten().sort().values
        assert torch.allclose(same[row], centres, atol=1e-9)
        authors = KMeans(k, random_state=0, n_init="auto", max_iter=50).fit(points, sample_weight=by)
        assert ours[row] <= authors.inertia_ * (1 + 1e-9)


def test_kmeans_of_short_rows_is_optimal() -> None:
    values, weights = rows(14, count=6)
    found = inertia(values, weights, kmeans(values, weights, 3))
    for row in range(6):
        x, w = values[row], weights[row]
        best = min(
            sum(
                float((w[a:b] * (x[a:b] - (w[a:b] * x[a:b]).sum() / w[a:b].sum()).square()).sum())
                for a, b in ((0, i), (i, j), (j, 14))
            )
            for i in range(1, 13)
            for j in range(i + 1, 14)
        )
        assert found[row].item() == pytest.approx(best, rel=1e-9)


def test_kmeans_of_degenerate_rows() -> None:
    constant = torch.full((2, 40), 0.5)
    constant[1] = 0
    for importance in (torch.zeros(2, 40), torch.ones(2, 40)):
        assert inertia(constant, torch.ones(2, 40), kmeans(constant, importance, 8)).max() == 0
    with_zero = kmeans(*rows(50, count=5), 8, zero=True)
    assert (with_zero == 0).sum(1).tolist() == [1] * 5


def test_squeezellm_keeps_sensitive_and_large_weights() -> None:
    layer = make_layer(out=64, width=256)
    method = SqueezeLLM(bits=3, sensitive=0.005, outliers=0.01)
    module = method.compress(layer)
    dense, numel = dense_weight(module), layer.weight.numel()
    error = (dense - layer.weight).abs()
    sensitive = layer.inputs.grad2.flatten().topk(int(0.005 * numel)).indices
    rest = layer.weight.abs().flatten().index_fill(0, sensitive, 0)
    large = rest.topk(int(0.01 * numel)).indices
    apart = torch.cat([sensitive, large])
    assert error.flatten()[apart].max() < 1e-4  # float16 of what the table leaves over
    assert len(module.values) == len(apart) == int(0.005 * numel) + int(0.01 * numel)
    weighted = [
        float((layer.inputs.grad2 * (dense_weight(m.compress(layer)) - layer.weight).square()).sum())
        for m in (method, SqueezeLLM(bits=3, sensitive=0, outliers=0), RTN(bits=3, granularity="channel"))
    ]
    assert weighted[0] < weighted[1] < weighted[2]


# All of them, on whole models

EVERY = [RTN(), GPTQ(), AWQ(), NF4(), FP8Weight(), SqueezeLLM(), QuIPSharp(bits=4, tune_iters=0)]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("method", EVERY, ids=lambda method: method.key)
def test_on_whole_models(method: Any, kind: str) -> None:
    model = tiny(kind)
    ids = torch.arange(24)[None]
    before = model(ids).logits
    if hasattr(method, "group_size"):
        method = type(method)(group_size=32)
    run = stub_run(model)
    stream(run, method)
    after = model(ids).logits
    linears = [module for _, module in Blocks(model).linears()]
    assert not any(isinstance(module, nn.Linear) for module in linears)
    error = (after - before).norm() / before.norm()
    assert 1e-4 < error < 0.3
    again = tiny(kind)
    stream(stub_run(again), method)
    assert torch.equal(again(ids).logits, after)
