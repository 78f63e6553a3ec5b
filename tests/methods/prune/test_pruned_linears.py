"""Pruning before and after quantization and fits, and how it is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effbench import checks
from effbench.core.errors import Unsupported
from effbench.core.recipe import parse, parse_step
from effbench.formats.csr import BitmaskLinear, CSRLinear, Unstructured
from effbench.formats.nm import NMIntLinear, NMLinear
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, kept, rebuilt, stored_bytes

QUANTIZERS = ["rtn()", "gptq()", "gptq(act_order=True)", "awq()", "nf4()", "squeezellm()", "fp8_weight()"]


@pytest.mark.parametrize("pruner", ["wanda(sparsity=0.6)", "sparsegpt(pattern='2:4')", "block_sparse()"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantization_keeps_the_zeros(pruner: str, quantizer: str) -> None:
    run = checks.toy_run()
    run.apply(parse_step(pruner))
    masks = {path: kept(module) for path, module in Blocks(run.model).linears()}
    run.apply(parse_step(quantizer))
    run.finish()
    for path, module in Blocks(run.model).linears():
        mask = masks[path]
        assert mask is not None and torch.equal(kept(module), mask), path
        assert not dense_weight(module)[~mask].any(), path
        again = rebuilt(module, torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(kept(again), mask) and not dense_weight(again)[~mask].any(), path


@pytest.mark.parametrize("quantizer", ["rtn()", "nf4()", "fp8_weight()"])
def test_pruning_after_quantization_keeps_the_codes(quantizer: str) -> None:
    run = checks.toy_run()
    run.apply(parse_step(quantizer))
    kinds = {path: type(module) for path, module in Blocks(run.model).linears()}
    run.apply(parse_step("wanda()"))
    for path, module in Blocks(run.model).linears():
        mask = kept(module)
        assert type(module) is kinds[path] and mask is not None
        assert not dense_weight(module)[~mask].any() and float(mask.double().mean()) == pytest.approx(0.5, abs=0.02)


def test_codes_without_a_zero_refuse_to_be_pruned() -> None:
    run = checks.toy_run()
    run.apply(parse_step("quip_sharp(tune_iters=0)"))
    with pytest.raises(Unsupported, match="prune before"):
        run.apply(parse_step("magnitude()"))


def test_four_bit_two_of_four_is_stored_as_such() -> None:
    run = checks.toy_run()
    for step in parse("sparsegpt(pattern='2:4'), gptq(bits=4)").steps:
        run.apply(step)
    run.finish()
    for _, module in Blocks(run.model).linears():
        assert isinstance(module, NMIntLinear)
        out, width = module.out_features, module.in_features
        codes, places = out * width // 2 * 4 // 8, out * width // 2 * 2 // 8
        scales, zeros = out * (width // 128) * 2, out * 4 // 8 * (width // 128)
        assert tuple(stored_bytes(module, torch.bfloat16)) == (codes, places + scales + zeros)


@pytest.mark.parametrize(
    ("step", "form", "bits"),
    [
        ("wanda()", BitmaskLinear, 0.5 * 16 + 1),
        ("wanda(sparsity=0.75)", BitmaskLinear, 0.25 * 16 + 1),
        ("wanda(sparsity=0.96875)", CSRLinear, 0.03125 * (16 + 16)),
        ("wanda(sparsity=0.046875)", nn.Linear, 16),  # a sixteenth of the weights pays for a bit each
        ("wanda(sparsity=0.0625, pattern='15:16')", nn.Linear, 16),
        ("magnitude(sparsity=0.0625, pattern='block:1x1')", nn.Linear, 16),
        ("wanda(pattern='2:4')", NMLinear, 0.5 * (16 + 2)),
        ("wanda(pattern='4:8')", NMLinear, 0.5 * (16 + 3)),
    ],
)
def test_stored_bits_per_weight(step: str, form: type[nn.Module], bits: float) -> None:
    run = checks.toy_run()
    run.apply(parse_step(step))
    run.finish()
    for _, module in Blocks(run.model).linears():
        assert type(module) is form
        rows = 4 * (module.out_features + 1) * 8 if issubclass(form, Unstructured) else 0
        found = sum(stored_bytes(module, torch.bfloat16)) * 8
        weights = dense_weight(module)
        assert found == bits * weights.numel() + rows and float((weights == 0).double().mean()) > 0.04


@pytest.mark.parametrize("step", ["wanda()", "sparsegpt(pattern='2:4')", "block_sparse()", "magnitude(scope='global')"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_fit_after_pruning_trains_and_keeps_the_zeros(step: str, architecture: str) -> None:
    run = checks.toy_run(architecture)
    run.apply(parse_step(step))
    masks = {path: kept(module) for path, module in Blocks(run.model).linears()}
    before = {path: dense_weight(module).clone() for path, module in Blocks(run.model).linears()}
    checks.fit_two_steps(run)
    run.finish()
    for path, module in Blocks(run.model).linears():
        mask = masks[path]
        assert mask is not None and not dense_weight(module)[~mask].any()
        assert not torch.equal(dense_weight(module), before[path]), "was trained"
