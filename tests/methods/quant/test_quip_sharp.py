"""QuIP#: codebook, block LDLQ and rotations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys_quant import make_layer, proxy_loss

from effbench.core.errors import Unsupported
from effbench.formats.lattice import encode, rotate, rotate_back
from effbench.kernels.e8p_linear.cases import RESIDUAL_SCALE
from effbench.kernels.e8p_linear.codebook import decode
from effbench.kernels.e8p_linear.reference import E8PMatrix
from effbench.methods.quant.quip_sharp import QuIPSharp, block_ldl, ldlq
from effbench.nn.model.linear import dense_weight


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
    for shape, reason in {
        (64, 60): "width 60 is not a multiple of 8",
        (64, 8 * 23): "of order 184",
        (7, 64): "of order 7 is",
    }.items():
        with pytest.raises(Unsupported, match=rf"^b\.up: .*{reason}.*; leave such linears out with the setting skip$"):
            QuIPSharp().check_shapes({"b.down": (64, 64), "b.up": shape})
