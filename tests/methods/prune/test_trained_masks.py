"""Masks that change during a fit: what GMP, movement and learned masks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toys_training import METHODS, linear, linears, seen
from transformers.pytorch_utils import Conv1D

from effbench import checks
from effbench.checks import fit_two_steps, toy_run
from effbench.core.errors import Diverged, Unsupported, Usage
from effbench.core.kinds import Train
from effbench.core.recipe import parse_step
from effbench.formats.sparse import PrunedLinear
from effbench.methods.prune._l0 import HardConcreteMask
from effbench.methods.prune.gmp import GMP, MagnitudeMask
from effbench.methods.prune.learned_mask import CandidateMask, LearnedMask
from effbench.methods.prune.lottery_ticket import LotteryTicket
from effbench.methods.prune.movement import Movement, ScoredMask
from effbench.nn.model.linear import dense_weight, kept, replace


def test_settings_no_data_can_mend_are_usage_errors() -> None:
    for make in (
        lambda: GMP(sparsity=1.0),
        lambda: GMP(every=0),
        lambda: GMP(initial=0.6),
        lambda: GMP(begin=0.5, end=0.4),
        lambda: GMP(pattern="2:4", sparsity=0.6),
        lambda: Movement(lr=0.0),
        lambda: Movement(end=1.1),
        lambda: LearnedMask(pattern="block:4x4"),
        lambda: LearnedMask(pattern="8:16"),
        lambda: LearnedMask(pattern="unstructured", sparsity=0.0),
        lambda: LearnedMask(pattern="1:4"),
        lambda: LearnedMask(temperature=(4.0, 0.0)),
        lambda: LearnedMask(lr=0.0),
        lambda: LotteryTicket(rounds=0),
        lambda: LotteryTicket(rewind=200),
    ):
        with pytest.raises(Usage):
            make()


@pytest.mark.parametrize(
    ("step", "architecture"),
    [("gmp()", architecture) for architecture in checks.DENSE]
    + [(step, architecture) for step in METHODS[1:] for architecture in ("llama", "gpt2")]
    + [("lottery_ticket(steps=2, rounds=2, rewind=1, max_length=32)", "opt")],
)
def test_every_architecture_ends_half_pruned(step: str, architecture: str) -> None:
    run = toy_run(architecture)
    method = parse_step(step)
    run.apply(method)
    if isinstance(method, Train):
        fit_two_steps(run)
    zeros = weights = 0
    for path, module in linears(run).items():
        assert isinstance(module, PrunedLinear) and not module.training, path
        assert torch.equal(module.dense_weight() != 0, module.kept()), path
        assert all(parameter.requires_grad for parameter in module.parameters())
        zeros += int((~module.kept()).sum())
        weights += module.kept().numel()
        if "unstructured" not in step:
            assert int((~module.kept()).sum()) == module.kept().numel() // 2, path
    assert zeros == weights // 2
    assert torch.isfinite(checks.probe(run)).all()


@pytest.mark.parametrize("step", METHODS)
def test_a_fit_that_fails_puts_the_plain_linears_back(step: str) -> None:
    run = toy_run()
    before = linears(run)

    def fail(*_: Any) -> None:
        raise Diverged("on purpose")

    run.apply(parse_step(step))
    seen(run, fail)
    with pytest.raises(Diverged):
        fit_two_steps(run)
    assert all(module is before[path] for path, module in linears(run).items())
    assert all(parameter.requires_grad for parameter in run.model.parameters())


@pytest.mark.parametrize("step", [*METHODS, "lottery_ticket(steps=2, rounds=1, max_length=32)"])
def test_zeros_of_an_earlier_step_stay_and_count(step: str) -> None:
    run = toy_run()
    generator = torch.Generator().manual_seed(3)
    earlier = {}
    for path, module in linears(run).items():
        weight = dense_weight(module)
        earlier[path] = keep = torch.rand(weight.shape, generator=generator) >= 0.3
        replace(run.model, path, PrunedLinear.of(weight, keep))
    method = parse_step(step)
    run.apply(method)
    if isinstance(method, Train):
        fit_two_steps(run)
    fractions, left, weights = [], 0, 0
    for path, module in linears(run).items():
        mask = kept(module)
        assert mask is not None and not (mask & ~earlier[path]).any()
        assert not dense_weight(module)[~mask].any()
        fractions.append(float(mask.float().mean()))
        left, weights = left + int(mask.sum()), weights + mask.numel()
    if step == "learned_mask()":  # groups of four with three zeros lose more than half
        assert 0.35 < left / weights < 0.5
    else:
        assert left == weights - weights // 2
        assert "unstructured" in step or all(fraction == 0.5 for fraction in fractions)


@pytest.mark.parametrize("step", [*METHODS, "lottery_ticket(steps=2, rounds=1, max_length=32)"])
def test_packed_linears_are_refused(step: str) -> None:
    run = toy_run()
    run.apply(parse_step("rtn()"))
    with pytest.raises(Unsupported, match=r"q_proj: gradients need dense weights; put this step first"):
        run.apply(parse_step(step))
        fit_two_steps(run)


def test_two_masks_for_one_fit_are_refused() -> None:
    run = toy_run()
    run.apply(GMP())
    run.apply(Movement())
    with pytest.raises(Unsupported, match="q_proj"):
        fit_two_steps(run)
    assert all(type(module) is nn.Linear for module in linears(run).values())


@pytest.mark.parametrize("step", [*METHODS, "lottery_ticket()"])
def test_a_model_whose_linears_are_all_skipped_is_refused(step: str) -> None:
    run = toy_run(skip=("*",))
    with pytest.raises(Unsupported, match="every linear is skipped"):
        run.apply(parse_step(step))
        fit_two_steps(run)


def test_earlier_zeros_rank_just_below_everything_else() -> None:
    held = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) >= 0.5
    module = ScoredMask(PrunedLinear.of(linear().weight.detach(), held), "x", 0, "unstructured")
    module.score.data = torch.randn(8, 16)
    alive = module.rank_pruned_last(module.score.detach())
    assert torch.equal(alive[held], module.score[held])
    assert alive[~held].max() < alive[held].min() <= alive[~held].min() + 1e-5
    dead = int((~held).sum())
    assert torch.equal(module.choose(dead / 128), held)
    assert not (module.choose((dead - 9) / 128) & held != held).any()


def test_linears_of_gpt2_are_seen_the_right_way_round() -> None:
    conv = Conv1D(6, 8)  # 8 inputs, 6 outputs
    conv.bias.data.normal_()
    x = torch.randn(3, 8)
    module = MagnitudeMask(conv, "c", 0, "unstructured")
    assert torch.allclose(module(x), conv(x), atol=1e-6)
    module.mask = module.choose(0.5)
    pruned = module.finish("unstructured")
    assert isinstance(pruned, PrunedLinear) and pruned.weight.shape == (6, 8) and pruned.weight.is_contiguous()
    assert torch.equal(pruned.weight, conv.weight.T * module.mask)
    assert torch.allclose(pruned(x), module(x), atol=1e-6)


@pytest.mark.parametrize("kind", [MagnitudeMask, ScoredMask, CandidateMask, HardConcreteMask])
def test_sixteen_bit_weights_train_under_wide_masks(kind: Any) -> None:
    plain = linear().bfloat16()
    extra: tuple[Any, ...] = {MagnitudeMask: ("2:4",), ScoredMask: ("2:4",), CandidateMask: (LearnedMask(),)}.get(
        kind, ()
    )
    module = kind(plain, "x", 0, *extra)
    out = module(torch.randn(4, 16).bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name.startswith("linear.") else torch.float32)
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    pruned = module.finish("unstructured")
    assert all(parameter.dtype == torch.bfloat16 for parameter in pruned.parameters())
