"""NF4 against bitsandbytes and its closed forms."""

from __future__ import annotations

import pytest
import torch
from toys_quant import golden, make_layer

from effbench.methods.quant import nf4
from effbench.methods.quant.nf4 import NF4
from effbench.nn.model.linear import dense_weight, stored_bytes


def test_nf4_is_that_of_bitsandbytes() -> None:
    tensors, facts = golden("nf4")
    assert torch.equal(nf4.LEVELS, tensors["levels"])
    codes, absmax = nf4.quantize(tensors["weight"], int(facts["block"]))
    assert torch.equal(codes.to(torch.uint8), tensors["codes"])
    assert torch.equal(absmax, tensors["absmax"])
    layer = make_layer()
    layer.weight = tensors["weight"]
    expected = tensors["levels"][tensors["codes"].long()].view(-1, 64) * tensors["absmax"][:, None]
    assert torch.equal(dense_weight(NF4().compress(layer)), expected.view(layer.weight.shape))


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
