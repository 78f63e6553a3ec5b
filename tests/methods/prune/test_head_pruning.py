"""Head pruning: importance, ranking and grouped queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys_structured import logits, loss, make_run, parts, without, zero_inputs
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Unsupported
from effbench.methods.prune.head_pruning import HeadPruning, importance
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight
from effbench.nn.model.structure import heads
from effbench.nn.run import ModelRun

GROUPED = ["mistral", "qwen2", "qwen3"]  # two key-value heads of two query heads each


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt2", "gpt_neox"])
def test_importance_is_the_loss_gradient_of_the_gates(architecture: str) -> None:
    run = make_run(architecture, double=True, sequences=3)
    view = Blocks(run.model)
    found = importance(run, view, "sequence")
    epsilon = 1e-5
    for index, block in enumerate(view.blocks):
        division = heads(view, index)
        weight = block.get_submodule(view.names.out).weight.data
        columns = weight.T if not isinstance(block.get_submodule(view.names.out), Conv1D) else weight
        for head in range(division.queries):
            at = slice(head * division.size, (head + 1) * division.size)
            kept = columns[at].clone()
            columns[at] = kept * (1 + epsilon)  # the gate, moved into the output projection
            above = loss(run)
            columns[at] = kept * (1 - epsilon)
            slope = (above - loss(run)) / (2 * epsilon)
            columns[at] = kept
            assert float(found[index][head]) == pytest.approx(float(slope.abs().mean()), rel=1e-5)
            assert float(slope.abs().mean()) >= abs(float(slope.mean()))


def test_importance_by_token_is_the_dot_product_of_outputs_and_their_gradients() -> None:
    run = make_run(double=True, sequences=3)
    view = Blocks(run.model)
    found = importance(run, view, "token")
    expected = torch.zeros(2, 4, dtype=torch.float64)
    taken: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        taken.append(args[0])

    for out in (block.get_submodule(view.names.out) for block in view.blocks):
        out.register_forward_pre_hook(take)
    for ids in run.calibration():
        taken.clear()
        run.model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for index, x in enumerate(taken):
            assert x.grad is not None
            expected[index] += (x * x.grad).detach().unflatten(-1, (4, -1)).sum(-1)[0].abs().mean(0) / 3
    assert torch.allclose(torch.stack(found), expected)


def removed_heads(run: ModelRun) -> dict[int, list[int]]:
    entry = run.log.removed[-1]["key_value_heads"]
    return {int(path.split("layers.")[-1].split("h.")[-1].split(".")[0]): gone for path, gone in entry.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_head_without_effect_goes_first(architecture: str) -> None:
    run = make_run(architecture)
    names = Blocks(run.model).names
    (out,) = parts(run, 1, names.out)
    zero_inputs(out, torch.arange(64, 96))  # head 2
    before = logits(run.model)
    run.apply(HeadPruning(sparsity=0.125))
    assert list(removed_heads(run).values()) == [[2]] and heads(Blocks(run.model), 1).queries == 3
    assert torch.allclose(logits(run.model), before, atol=1e-5)


def test_blocks_are_normalised_before_they_are_compared() -> None:
    """A block whose heads all matter little keeps most of them, unless importances are compared as they are."""

    def faint() -> ModelRun:
        run = make_run()
        (out,) = parts(run, 0, "self_attn.o_proj")
        out.weight.data *= 1e-3
        return run

    raw, normal = faint(), faint()
    scores = importance(raw, Blocks(raw.model))
    raw.apply(HeadPruning(sparsity=0.4, normalize=False))
    assert removed_heads(raw).keys() == {0} and len(removed_heads(raw)[0]) == 3
    normal.apply(HeadPruning(sparsity=0.4))
    ranking = sorted(
        (float(score[head] / score.norm()), index, head)
        for index, score in enumerate(scores)
        for head in range(4)
        if head != int(score.argmax())
    )
    expected = {(index, head) for _, index, head in ranking[:3]}
    assert {(index, head) for index, gone in removed_heads(normal).items() for head in gone} == expected


@pytest.mark.parametrize("architecture", GROUPED)
def test_grouped_queries_go_with_their_key_value_head(architecture: str) -> None:
    run = make_run(architecture)
    scores = [score / score.norm() for score in importance(run, Blocks(run.model))]
    groups = torch.stack([score.view(2, 2).sum(1) for score in scores])
    index, group = divmod(int(groups.flatten().argmin()), 2)
    queries, keys, out = parts(run, index, "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")
    expected = dense_weight(queries)[64 * (1 - group) : 64 * (2 - group)].clone()
    run.apply(HeadPruning(sparsity=0.25))
    assert removed_heads(run) == {index: [group]}
    assert torch.equal(queries.weight, expected) and keys.weight.shape == (32, 128) and out.weight.shape == (128, 64)


def test_rounds_rank_again_and_say_which_of_the_first_heads_went() -> None:
    run, original = make_run(), make_run()
    run.apply(HeadPruning(sparsity=0.6, rounds=4))
    gone = removed_heads(run)
    assert sum(map(len, gone.values())) == 4
    for index, gone_here in gone.items():
        stay = without(4, gone_here)
        (now,) = parts(run, index, "self_attn.v_proj")
        (then,) = parts(original, index, "self_attn.v_proj")
        assert torch.equal(now.weight, then.weight.view(4, 32, 128)[stay].flatten(0, 1))


def test_every_block_keeps_its_most_important_head() -> None:
    run = make_run()
    best = [int(score.argmax()) for score in importance(run, Blocks(run.model))]
    run.apply(HeadPruning(sparsity=0.75))
    assert removed_heads(run) == {index: without(4, [head]).tolist() for index, head in enumerate(best)}
    with pytest.raises(Unsupported, match="7 of 8 key-value heads would leave a block with none"):
        make_run().apply(HeadPruning(sparsity=0.9))
    with pytest.raises(Unsupported, match="less than one of 8"):
        make_run().apply(HeadPruning(sparsity=0.1))
