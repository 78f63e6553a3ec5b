"""Pruning before and during training, against closed forms, plain loops and the published schedules."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench import checks
from effbench.checks import fit_two_steps, toy, toy_run
from effbench.core.errors import Diverged, Unsupported, Usage
from effbench.core.kinds import Train
from effbench.core.recipe import parse_step
from effbench.core.run import FitReport
from effbench.formats.sparse import PrunedLinear
from effbench.methods.prune import lottery_ticket
from effbench.methods.prune._l0 import BETA, HIGH, LOW, HardConcreteMask, close, density
from effbench.methods.prune._training import TrainedMask
from effbench.methods.prune.gmp import GMP, MagnitudeMask
from effbench.methods.prune.learned_mask import CandidateMask, LearnedMask, interpolate
from effbench.methods.prune.lottery_ticket import LotteryTicket, copy_parameters
from effbench.methods.prune.movement import Movement, ScoredMask
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, kept, replace
from effbench.nn.run import ModelRun
from effbench.nn.train import fit as library
from effbench.nn.train.fit import FitSettings, Shuffled, rate

METHODS = ["gmp()", "movement()", "learned_mask()", "learned_mask(pattern='unstructured')"]


@pytest.fixture(autouse=True)
def _alone() -> Any:
    """One thread: several only get in each other's way on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fit(run: ModelRun, start: int = 0, **changes: Any) -> FitReport:
    settings = FitSettings(steps=5, lr=1e-3, batch_size=4, schedule="constant", warmup=0.0, clip=None, max_length=32)
    return library.fit(run, dataclasses.replace(settings, **changes), start)


def linears(run: ModelRun) -> dict[str, nn.Module]:
    return dict(Blocks(run.model).linears())


def seen(run: ModelRun, hook: Any) -> None:
    """Have `hook(run, step, total)` called after each step of the next fit, after the hooks there are by now."""

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        def on_step(self, run: Any, step: int, total: int) -> None:
            hook(run, step, total)

    run.apply(Watch())


def linear(out: int = 8, width: int = 16, seed: int = 0, bias: bool = False) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(width, out, bias)
    module.weight.data = torch.randn(out, width, generator=generator)
    return module


# What all share


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
    [("gmp()", architecture) for architecture in checks.TOYS]
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


@pytest.mark.parametrize("step", ["gmp(pattern='2:5', sparsity=0.6)", "learned_mask(pattern='2:5', sparsity=0.6)"])
def test_a_width_that_the_pattern_does_not_divide_is_refused_before_training(step: str) -> None:
    run = toy_run()
    run.apply(parse_step(step))
    with pytest.raises(Unsupported, match=r"q_proj: width 128 is not a multiple of 5"):
        fit_two_steps(run)


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


def test_a_fit_can_go_on_where_another_stopped() -> None:
    """Data order and learning rate after `start` are those of the steps that were left out."""
    rates: list[float] = []
    batches: list[Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        def batch(self, batch: Any, run: Any) -> Any:
            batches.append(batch["input_ids"])
            return batch

        def optimizer(self, groups: Any, run: Any) -> Any:
            return torch.optim.SGD(groups, lr=0.0)

    run = toy_run()
    run.train.chain("optimizer_wrap").append(lambda optimizer: Recorded(optimizer, rates))
    run.apply(Watch())
    report = fit(run, steps=7, start=4, schedule="cosine", warmup=0.3)
    assert report["steps"] == 3
    assert rates == [1e-3 * rate(step, 7, 0.3, "cosine") for step in (4, 5, 6)]
    sampler, examples = Shuffled(64, 0), run.data.train
    drawn = [sampler.draw(step, 4) for step in range(7)][4:]
    expected = [torch.tensor([examples[i].ids for i in indices]) for indices in drawn]
    assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


class Recorded:
    """An optimizer that writes down its learning rate at every step."""

    def __init__(self, inner: Any, rates: list[float]) -> None:
        self.inner = inner
        self.rates = rates

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self) -> None:
        self.rates.append(self.inner.param_groups[0]["lr"])
        self.inner.step()


# GMP


def test_gmp_schedule_is_the_published_cubic() -> None:
    method = GMP(sparsity=0.8, initial=0.2, every=10, begin=0.2, end=0.7)  # t0 = 20, n = 5, t0 + n dt = 70
    found = {done: method.update(done, 100) for done in range(1, 101)}
    updates = {done: value for done, value in found.items() if value is not None}
    assert list(updates) == [20, 30, 40, 50, 60, 70]
    for done, value in updates.items():
        assert value == pytest.approx(0.8 + (0.2 - 0.8) * (1 - (done - 20) / 50) ** 3)
    assert updates[70] == 0.8


@pytest.mark.parametrize("total", [1, 2, 3, 9, 10, 11, 57, 200])
@pytest.mark.parametrize(("begin", "end"), [(0.0, 0.0), (0.0, 1.0), (0.1, 0.8), (1.0, 1.0)])
def test_gmp_reaches_its_sparsity_in_fits_of_any_length(total: int, begin: float, end: float) -> None:
    method = GMP(sparsity=0.7, begin=begin, end=end)
    updates = [value for done in range(1, total + 1) if (value := method.update(done, total)) is not None]
    assert updates == sorted(updates) and updates[-1] == 0.7
    assert len(updates) <= 1 + total // 10 or total < 10


def test_gmp_weights_may_return() -> None:
    plain = nn.Linear(4, 1, bias=False)
    plain.weight.data = torch.tensor([[0.3, -0.4, 0.5, -0.6]])
    module = MagnitudeMask(plain, "x", 0, "unstructured")
    module.mask = module.choose(0.5)
    assert module.mask.tolist() == [[False, False, True, True]]
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(40):  # pull the third weight towards 0.1
        (module(torch.eye(4))[2] - 0.1).square().sum().backward()
        assert plain.weight.grad is not None and not plain.weight.grad[~module.mask].any()
        optimizer.step()
        optimizer.zero_grad()
    assert plain.weight[0, :2].tolist() == pytest.approx([0.3, -0.4])
    module.mask = module.choose(0.5)
    assert module.mask.tolist() == [[False, True, False, True]]


def test_gmp_equals_a_plain_loop() -> None:
    run = toy_run()
    method = GMP(sparsity=0.6, every=2, begin=0.0, end=0.8)
    run.apply(method)
    fit(run, steps=6)

    model = toy().train()
    names = [path + ".weight" for path, _ in Blocks(model).linears()]
    parameters = dict(model.named_parameters())
    masks = {name: torch.ones_like(parameters[name]) for name in names}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    sampler, examples = Shuffled(64, 0), run.data.train
    for step in range(6):
        ids = torch.tensor([examples[i].ids for i in sampler.draw(step, 4)])
        used = {name: parameter * masks.get(name, 1) for name, parameter in parameters.items()}
        logits = torch.func.functional_call(model, used, (ids,), {"use_cache": False}).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (1, 3, 5):  # t0 = 1, dt = 2, n = 2
            level = 0.6 - 0.6 * (1 - step / 4) ** 3
            for name in names:
                size = parameters[name].abs().flatten().sort().values
                pruned = int(len(size) * level + 1e-9)
                masks[name] = (parameters[name].abs() > (size[pruned - 1] if pruned else -1)).float()
    for path, module in linears(run).items():
        mine, mask = dense_weight(module), kept(module)
        assert mask is not None and torch.equal(mask, masks[path + ".weight"].bool())
        assert torch.allclose(mine, parameters[path + ".weight"] * mask, atol=1e-6)


def test_gmp_prunes_blocks_and_n_of_m() -> None:
    for pattern in ("2:4", "block:16x16"):
        run = toy_run()
        run.apply(GMP(pattern=pattern))
        fit_two_steps(run)
        for module in linears(run).values():
            mask = kept(module)
            assert mask is not None
            if pattern == "2:4":
                assert (mask.view(-1, 4).sum(1) == 2).all()
            else:
                blocks = mask.view(mask.shape[0] // 16, 16, -1, 16).float().mean((1, 3))
                assert ((blocks == 0) | (blocks == 1)).all() and blocks.mean() == 0.5


# Movement


def test_movement_schedule_is_the_published_one() -> None:
    """In terms of the fraction kept, with warm-up and cool-down in multiples of some steps."""
    total, unit, final = 100, 10, 0.15
    for done in range(total + 1):
        if done <= unit:
            threshold = 1.0
        elif done > total - 2 * unit:
            threshold = final
        else:
            threshold = final + (1 - final) * (1 - (done - unit) / (total - 3 * unit)) ** 3
        assert 1 - Movement(sparsity=0.85).at(done, total) == pytest.approx(threshold)
    assert Movement(begin=0.0, end=1.0).at(3, 3) == 0.5 == Movement(begin=1.0, end=1.0).at(3, 3)


def test_movement_scores_are_the_closed_form() -> None:
    """S = -lr * sum over steps of W * dL/dW', with dL/dW' the gradient at the masked weights."""
    generator = torch.Generator().manual_seed(1)
    plain, x, y = linear(), torch.randn(32, 16, generator=generator), torch.randn(32, 8, generator=generator)
    module = ScoredMask(plain, "x", 0, "unstructured")
    optimizer = torch.optim.SGD([{"params": [module.score], "lr": 0.5}, {"params": [plain.weight], "lr": 0.05}])
    expected = torch.zeros(8, 16)
    weight = plain.weight.detach().clone()
    for step in range(6):
        masked = weight * module.mask
        gradient = 2 * (x @ masked.T - y).T @ x / y.numel()
        expected -= 0.5 * weight * gradient
        weight = weight - 0.05 * gradient * module.mask  # masked weights stand still, their scores do not
        (module(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        module.mask = module.choose(0.1 * (step + 1))
    assert torch.allclose(module.score, expected, atol=1e-5)
    assert torch.allclose(plain.weight, weight, atol=1e-5)
    assert int((~module.mask).sum()) == int(0.6 * 128)
    assert module.score[module.mask].min() >= module.score[~module.mask].max()


def test_movement_keeps_what_moves_away_from_zero() -> None:
    """Small growing weights win over large shrinking ones: the opposite of magnitude."""
    plain = nn.Linear(4, 1, bias=False)
    plain.weight.data = torch.tensor([[1.0, -1.0, 0.1, -0.1]])
    target = torch.tensor([[0.8, -0.8, 0.3, -0.3]])
    module = ScoredMask(plain, "x", 0, "unstructured")
    (module(torch.eye(4)) - target.T).square().sum().backward()
    assert module.score.grad is not None
    module.score.data -= module.score.grad
    assert module.choose(0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("freeze", [True, False])
def test_movement_has_its_own_learning_rate_and_still_embeddings(freeze: bool) -> None:
    run = toy_run("gpt2")
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    scores: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []

    def watch(run: Any, step: int, total: int) -> None:
        scores.update({m.path: m.score.detach().clone() for m in run.model.modules() if isinstance(m, ScoredMask)})

    run.train.chain("optimizer_wrap").append(lambda optimizer: groups.extend(optimizer.param_groups) or optimizer)
    run.apply(Movement(freeze_embeddings=freeze))
    seen(run, watch)
    fit(run, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (1e-2, 0.0)]
    assert len(groups[1]["params"]) == len(scores) == len(linears(run))
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        after = run.model.get_parameter(name)
        assert after.requires_grad and torch.equal(after, before[name]) == freeze
    assert not torch.equal(run.model.get_parameter("transformer.ln_f.weight"), before["transformer.ln_f.weight"])
    for path, module in linears(run).items():
        keep = kept(module)
        assert keep is not None and scores[path][keep].min() >= scores[path][~keep].max()


# Learned masks


def candidate_mask(method: LearnedMask, plain: nn.Module | None = None, seed: int = 0) -> CandidateMask:
    return CandidateMask(plain or linear(), "x", seed, method)


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
    module.advance(step, 10)
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
        module.advance(1, 1000)
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
        module.advance(step + 1, 150)
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


def masks(run: Any) -> list[CandidateMask]:
    return [module for module in run.model.modules() if isinstance(module, CandidateMask)]


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
    groups: list[dict[str, Any]] = []
    logits: dict[str, Tensor] = {}
    run.train.chain("optimizer_wrap").append(lambda optimizer: groups.extend(optimizer.param_groups) or optimizer)
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


# L0 gates


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 2.0])
def test_hard_concrete_gates_have_their_closed_forms(log_alpha: float) -> None:
    module = HardConcreteMask(nn.Linear(500, 400, bias=False), "x", 0)
    module.log_alpha.data.fill_(log_alpha)
    gate = module.gate().detach()
    samples = gate.numel()

    def above(value: float) -> float:
        """P(z > value) for 0 <= value < 1: the logistic noise must carry the stretched gate over it."""
        s = (value - LOW) / (HIGH - LOW)
        return 1 / (1 + math.exp(-(log_alpha - BETA * math.log(s / (1 - s)))))

    error = 5 * 0.5 / math.sqrt(samples)
    assert float((gate > 0).float().mean()) == pytest.approx(above(0.0), abs=error)
    assert float(module.open().detach().mean()) == pytest.approx(above(0.0), abs=1e-5)
    assert float((gate == 1).float().mean()) == pytest.approx(above(1.0 - 1e-9), abs=error)
    mean = sum(above((i + 0.5) / 2000) for i in range(2000)) / 2000  # the mean of z is the integral of P(z > t)
    assert float(gate.mean()) == pytest.approx(mean, abs=error)


def test_gates_are_pressed_to_the_sparsity_and_no_further() -> None:
    masks = [HardConcreteMask(linear(seed=i), str(i), 0) for i in range(2)]
    method = LearnedMask(pattern="unstructured", sparsity=0.7)
    run: Any = type("Stub", (), {"model": nn.ModuleList(masks)})
    optimizer = torch.optim.Adam([mask.log_alpha for mask in masks], lr=0.1)
    slopes = []
    for _ in range(200):
        optimizer.zero_grad()
        method.loss({}, None, run)["density"].backward()
        probability = masks[0].open().detach()
        gradient = masks[0].log_alpha.grad
        assert gradient is not None
        slopes.append(float((gradient / (probability * (1 - probability))).mean()) * 256)
        optimizer.step()
    assert float(density(masks).detach()) == pytest.approx(0.3, abs=0.02)
    assert slopes[0] == pytest.approx(125.0, rel=1e-3) and min(slopes) == pytest.approx(-125.0, rel=1e-3)


def test_closed_gates_are_the_least_of_all_linears_together() -> None:
    masks = [HardConcreteMask(linear(seed=i), str(i), 0) for i in range(2)]
    masks[0].log_alpha.data += torch.linspace(-1, 3, 128).view(8, 16)
    close(masks, 0.25)
    alphas = torch.cat([mask.log_alpha.detach().flatten() for mask in masks])
    keep = torch.cat([mask.result()[1].flatten() for mask in masks])
    assert int((~keep).sum()) == 64 and alphas[keep].min() > alphas[~keep].max()
    weight, keep = masks[0].result()
    gate = (torch.sigmoid(masks[0].log_alpha) * 1.2 - 0.1).clamp(0, 1)
    pruned = masks[0].finish("unstructured")
    assert torch.allclose(dense_weight(pruned), masks[0].linear.weight * gate * keep)
    assert (gate[keep] < 1).any() and weight.shape == (8, 16)
    masks[0].chosen.fill_(True)
    whole = masks[0].finish("unstructured")  # nothing is pruned, but the gates count
    assert type(whole) is nn.Linear and torch.allclose(whole.weight, masks[0].linear.weight * gate)


def test_gates_and_weights_train_together() -> None:
    run = toy_run()
    before = dense_weight(linears(run)["model.layers.0.mlp.up_proj"]).clone()
    alphas: list[Tensor] = []
    run.apply(LearnedMask(pattern="unstructured"))
    seen(
        run,
        lambda run, *_: alphas.append(
            next(m for m in run.model.modules() if isinstance(m, HardConcreteMask)).log_alpha
        ),
    )
    fit(run, steps=3)
    after = linears(run)["model.layers.0.mlp.up_proj"]
    mask = kept(after)
    assert mask is not None and not torch.allclose(dense_weight(after)[mask], before[mask], atol=1e-4)
    assert float(alphas[-1].detach().mean()) == pytest.approx(
        math.log(9) - 0.3, abs=0.05
    )  # three steps of Adam at 0.1, down


# Lottery tickets


def entries(
    run: ModelRun, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[dict[str, Tensor], dict[str, Tensor | None], Any]]:
    """Parameters, masks and the step counted from at the beginning of every fit."""
    found: list[Any] = []

    def fit(run: ModelRun, settings: FitSettings, start: int = 0) -> FitReport:
        masks = {path: kept(module) for path, module in linears(run).items()}
        found.append((copy_parameters(run.model, list(linears(run))), masks, start))
        return library.fit(run, settings, start)

    monkeypatch.setattr(lottery_ticket, "fit", fit)
    return found


SMALL = {"steps": 4, "batch_size": 4, "max_length": 32, "lr": 1e-3}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("rewind", [0, 2])
def test_rounds_start_from_the_rewound_weights_bit_for_bit(
    rewind: int, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy_run(architecture)
    if architecture == "gpt2":
        run.model.config.attn_pdrop = run.model.config.resid_pdrop = run.model.config.embd_pdrop = 0.0
        for module in run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.0
    paths = list(linears(run))
    states = [copy_parameters(run.model, paths)]
    seen(run, lambda run, *_: states.append(copy_parameters(run.model, paths)))  # of the first fit, step by step
    found = entries(run, monkeypatch)
    run.apply(LotteryTicket(sparsity=0.6, rounds=3, rewind=rewind, **SMALL))
    assert len(found) == 4 and len(states) == 5
    assert [start for *_, start in found] == [0, rewind, rewind, rewind]
    point = states[rewind]
    masks_before: dict[str, Tensor] = {path: torch.ones_like(point[f"{path}.weight"]).bool() for path in paths}
    for number, (at_start, masks, _) in enumerate(found[1:], 1):
        for path in paths:
            mask = masks[path]
            assert mask is not None
            pruned = int(mask.numel() * (1 - 0.4 ** (number / 3)) + 1e-9)
            assert int((~mask).sum()) == pruned, (number, path)
            assert not (mask & ~masks_before[path]).any()
            assert torch.equal(at_start.pop(f"{path}.weight"), point[f"{path}.weight"] * mask)
            masks_before[path] = mask
        assert at_start and all(torch.equal(value, point[name]) for name, value in at_start.items())
    for path, module in linears(run).items():  # the first round prunes the smallest weights of the dense fit
        first, trained = found[1][1][path], states[4][f"{path}.weight"].abs()
        assert first is not None and trained[first].min() >= trained[~first].max()
        assert isinstance(module, PrunedLinear) and torch.equal(module.kept(), masks_before[path])
        assert not torch.equal(module.dense_weight(), point[f"{path}.weight"] * module.kept())  # trained
    assert not run.model.training


def test_the_control_differs_in_its_initial_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for control in ("none", "reinit"):
        run = toy_run()
        found[control] = entries(run, monkeypatch)
        rng = torch.get_rng_state()
        run.apply(LotteryTicket(rounds=2, control=control, **SMALL))  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), rng)
    for number, (ours, theirs) in enumerate(zip(found["none"], found["reinit"], strict=True)):
        assert ours[2] == theirs[2]
        for path, mask in ours[1].items():
            other = theirs[1][path]
            assert mask is other is None or (mask is not None and other is not None and torch.equal(mask, other))
        same = [torch.equal(ours[0][name], theirs[0][name]) for name in ours[0] if ours[0][name].std() > 0]
        assert all(same) if number < 2 else not any(same)
    values, masks, _ = found["reinit"][2]
    name = "model.layers.1.mlp.down_proj"
    mask = masks[name]
    assert mask is not None and float(values[f"{name}.weight"][mask].std()) == pytest.approx(0.02, rel=0.05)


def test_the_control_refuses_what_its_architecture_does_not_initialise() -> None:
    run = toy_run()
    run.model.config.intermediate_size = 64
    with pytest.raises(Unsupported, match="control='reinit'"):
        run.apply(LotteryTicket(rounds=1, control="reinit", **SMALL))


def test_only_the_first_fit_has_what_stands_before() -> None:
    entered = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        @contextlib.contextmanager
        def context(self, run: Any) -> Any:
            entered.append([module for module in run.model.modules() if isinstance(module, PrunedLinear)])
            yield

    run = toy_run()
    run.apply(Watch())
    run.apply(LotteryTicket(rounds=2, **SMALL))
    assert entered == [[]] and len(run.log.fits) == 3
    assert not [module for module in run.model.modules() if isinstance(module, TrainedMask)]
