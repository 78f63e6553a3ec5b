"""Learned n:m masks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import METHODS, fit, linear, linears, masks, seen, watch_groups

from effbench.checks import toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.kinds import Train
from effbench.core.recipe import parse_step
from effbench.methods.prune._l0 import HardConcreteMask
from effbench.methods.prune.learned_mask import CandidateMask, LearnedMask, interpolate
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, kept


def candidate_mask(method: LearnedMask, plain: nn.Module | None = None, seed: int = 0) -> CandidateMask:
    return CandidateMask(plain or linear(), "x", seed, method)


def advance(module: CandidateMask | HardConcreteMask, step: int, steps: int) -> None:
    """The state of a mask when so many steps of a fit are taken."""
    module.clock[:] = torch.tensor([step, steps])


def test_schedules_of_the_learned_mask() -> None:
    assert [interpolate((4.0, 0.05), t / 4) for t in range(5)] == pytest.approx([4.0, 3.0125, 2.025, 1.0375, 0.05])
    assert [interpolate((1e2, 5e2), t / 4) for t in range(5)] == pytest.approx([100, 200, 300, 400, 500])
    run = toy_run()
    progress: list[set[float]] = []
    run.apply(LearnedMask())
    seen(
        run, lambda run, *_: progress.append({m.progress for m in run.model.modules() if isinstance(m, CandidateMask)})
    )
    fit(run, steps=4)
    assert progress == [{0.25}, {0.5}, {0.75}, {1.0}]  # after the steps, so 0, 1/4, 1/2 and 3/4 in them


@pytest.mark.parametrize("step", [0, 5])
def test_the_gate_is_a_gumbel_softmax_over_the_candidates(step: int) -> None:
    module = candidate_mask(LearnedMask())
    assert module.candidates.tolist() == [
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1],
        [0, 1, 1, 0],
        [0, 1, 0, 1],
        [0, 0, 1, 1],
    ]
    advance(module, step, 10)
    uniform = torch.empty(32, 6).exponential_(generator=module.generator("gate"))
    scale, temperature = (100, 4) if step == 0 else (300, 2.025)
    logits = (module.logits * scale - uniform.log()) / temperature
    share = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = sum(share[:, i : i + 1] * module.candidates[i] for i in range(6))
    assert torch.allclose(module.gate().view(32, 4), expected, atol=1e-5)
    assert torch.allclose(module.gate().view(32, 4).sum(1), torch.full((32,), 2.0), atol=1e-5)


def test_gates_are_the_same_within_a_step_and_new_in_the_next() -> None:
    for module in (candidate_mask(LearnedMask()), HardConcreteMask(linear(), "x", 0)):
        first = module.gate()
        torch.rand(5)
        assert torch.equal(module.gate(), first)
        advance(module, 1, 1000)
        assert not torch.equal(module.gate(), first)
    assert not torch.equal(candidate_mask(LearnedMask(), seed=1).logits, candidate_mask(LearnedMask()).logits)


@pytest.mark.parametrize("step", METHODS[2:])
def test_recomputed_blocks_see_the_same_gates(step: str) -> None:
    losses = []
    for checkpointing in (False, True):
        run = toy_run()
        if checkpointing:
            run.model.gradient_checkpointing_enable()
        run.apply(parse_step(step))
        losses.append(fit(run, steps=2)["loss_last"])
    assert losses[0] == losses[1]


def test_candidates_are_drawn_by_the_softmax_of_their_scaled_logits() -> None:
    wide = nn.Linear(4, 20000, bias=False)
    module = candidate_mask(LearnedMask(prior=None, temperature=(1e-3, 1e-3), scale=(1.0, 1.0)), wide)
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, -0.5])
    module.logits.data = logits.expand(20000, 6).clone()
    choice = (module.gate() @ module.candidates.T).argmax(1)
    frequencies = choice.bincount(minlength=6) / 20000
    assert torch.allclose(frequencies, logits.softmax(0), atol=5 * 0.5 / math.sqrt(20000))


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5)])
def test_the_prior_shifts_the_logits_by_overlap(pattern: str, sparsity: float) -> None:
    plain = linear()
    without = candidate_mask(LearnedMask(pattern=pattern, sparsity=sparsity, prior=None), plain)
    module = candidate_mask(LearnedMask(pattern=pattern, sparsity=sparsity, prior_strength=3.0), plain)
    n, m = map(int, pattern.split(":"))
    assert len(module.candidates) == math.comb(m, n) and (module.candidates.sum(1) == n).all()
    largest = torch.zeros(128 // m, m).scatter_(1, plain.weight.abs().view(-1, m).topk(n).indices, 1.0)
    overlap = torch.tensor([[float((row * mask).sum()) for mask in module.candidates] for row in largest])
    shift = (module.logits - without.logits) / without.logits.std()
    assert torch.allclose(shift, 3 * (overlap - overlap.mean(1, keepdim=True)), atol=1e-4)
    agree = module.candidates[module.logits.argmax(1)] == largest
    assert agree.all(1).float().mean() > 0.9


@pytest.mark.parametrize("prior", ["magnitude", None])
def test_a_planted_mask_is_recovered(prior: Any) -> None:
    """The best mask keeps the two smallest weights of each group: the prior is as wrong as it can be."""
    generator = torch.Generator().manual_seed(0)
    plain = linear()
    plain.weight.data = plain.weight.data.sign() * (0.5 + torch.rand(8, 16, generator=generator))
    order = plain.weight.abs().view(-1, 4).argsort(1)
    best = torch.zeros(32, 4).scatter_(1, order[:, :2], 1.0).view(8, 16)
    x = torch.randn(256, 16, generator=generator)
    y = x @ (plain.weight.detach() * best).T
    method = LearnedMask(prior=prior)
    module = candidate_mask(method, plain)
    start = (module.result()[1] == best.bool()).all(1)
    optimizer = torch.optim.AdamW([module.logits], lr=2e-3)
    for step in range(150):
        (module(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(module, step + 1, 150)
    assert not start.any() and torch.equal(module.result()[1], best.bool())


def test_an_earlier_mask_can_be_a_prior_over_the_dense_weights() -> None:
    """As MaskLLM starts: the mask of another pruner, and the weights that it had not changed yet."""
    run = toy_run()
    dense = {path: dense_weight(module).clone() for path, module in Blocks(run.reference).linears()}
    run.apply(parse_step("sparsegpt(pattern='2:4')"))
    earlier = {path: kept(module) for path, module in linears(run).items()}
    run.apply(LearnedMask(weights="reference", prior_strength=100.0))
    start: dict[str, Tensor] = {}
    seen(run, lambda run, *_: start.update({m.path: m.result()[1] for m in masks(run)}) if not start else None)
    fit(run, steps=1, lr=1e-9)
    assert len(start) == len(dense) and all(torch.equal(start[path], earlier[path]) for path in dense)
    for path, module in linears(run).items():
        assert torch.equal(dense_weight(module), dense[path] * earlier[path])
    for module in Blocks(run.reference).linears():
        assert not any(parameter.requires_grad for parameter in module[1].parameters())
    assert all(parameter.requires_grad for module in linears(run).values() for parameter in module.parameters())
    run.apply(LearnedMask(weights="reference", lr=10.0, prior=None))
    fit(run, steps=1)
    back = [bool((kept(module) & ~earlier[path]).any()) for path, module in linears(run).items()]
    assert all(back)
    for path, module in linears(run).items():
        assert torch.equal(dense_weight(module), dense[path] * kept(module))


def test_masks_over_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Usage, match="L0 gates"):
        LearnedMask(pattern="unstructured", weights="reference")
    run = toy_run()
    run.apply(LearnedMask(weights="teacher"))
    with pytest.raises(Usage, match="no model is called 'teacher'"):
        fit(run)
    run = toy_run()
    run.apply(parse_step("neuron_pruning(sparsity=0.25)"))
    run.apply(LearnedMask(weights="reference"))
    with pytest.raises(Unsupported, match=r"mlp.*reference has no linear of this shape"):
        fit(run)
    assert all(type(module) is nn.Linear for module in linears(run).values())


def test_learning_a_mask_leaves_the_weights_alone() -> None:
    run = toy_run()
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    groups = watch_groups(run)
    logits: dict[str, Tensor] = {}
    run.apply(LearnedMask(lr=0.01))
    seen(
        run,
        lambda run, *_: logits.update({m.path: m.logits for m in run.model.modules() if isinstance(m, CandidateMask)}),
    )
    fit(run)
    assert len(groups) == 1 and len(groups[0]["params"]) == len(linears(run)) and groups[0]["lr"] == 0.01
    options = torch.tensor([[i in pair for i in range(4)] for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))])
    for path, module in linears(run).items():
        keep = options[logits[path].argmax(1)].view(module.kept().shape)  # type: ignore[operator]
        assert torch.equal(dense_weight(module), before.pop(f"{path}.weight") * keep)
    assert all(torch.equal(run.model.get_parameter(name), value) for name, value in before.items())


def test_the_kept_norm_is_rewarded_less_and_less() -> None:
    run = toy_run()
    method = LearnedMask(weight_reg=0.01)
    values: list[float] = []
    expected: list[float] = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        def loss(self, batch: Any, out: Any, run: Any) -> Any:
            masks = [m for m in run.model.modules() if isinstance(m, CandidateMask)]
            norm = sum(float((m.linear.weight * m.gate()).square().sum().detach()) for m in masks)
            expected.append(-0.01 * (1 - len(expected) / 4) * norm)
            values.append(float(method.loss(batch, out, run)["kept_norm"].detach()))
            return {}

    run.apply(method)
    run.apply(Watch())
    fit(run, steps=4)
    assert values == pytest.approx(expected, rel=1e-5) and values[0] < values[-1] < 0
