"""GMP: its schedule and its masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys_training import fit, linears

from effbench.checks import fit_two_steps, toy, toy_run
from effbench.methods.prune.gmp import GMP, MagnitudeMask
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, kept
from effbench.nn.train.samplers import Shuffled


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
