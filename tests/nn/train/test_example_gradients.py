"""Gradients of single examples, beside those that autograd finds for each example alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from effbench.checks import DENSE, toy_run
from effbench.core.recipe import parse_step
from effbench.core.views import Example
from effbench.nn.model.beside import Beside
from effbench.nn.model.linear import dense_weight
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate
from effbench.nn.train.example_gradients import (
    Factor,
    Matrix,
    count_numbers,
    find_gradients,
    find_matrices,
    multiply_hessian,
    token_margins,
)
from effbench.nn.train.loss import cross_entropy

ROLES = ("q", "k", "v", "o", "up", "down")


def uneven(run: ModelRun) -> list[Example]:
    """Examples of unlike lengths, two of them with a prompt."""
    pairs = ((20, 5), (9, 0), (32, 30))
    return [Example(e.id, e.ids[:size], prompt) for e, (size, prompt) in zip(run.data.pool, pairs, strict=False)]


def alone(run: ModelRun, example: Example, weights: list[Tensor]) -> list[Tensor]:
    """The gradient of one example's loss in each weight."""
    batch = collate([example], run.pad, run.device)
    loss = cross_entropy(run.model(batch["input_ids"]).logits, batch["labels"])
    return list(torch.autograd.grad(loss, weights))


def by_hand(run: ModelRun, parts: list[Matrix], examples: list[Example]) -> Tensor:
    rows = []
    for example in examples:
        found = alone(run, example, [part.module.weight for part in parts])  # type: ignore[misc]
        turned = [g.T if isinstance(part.module, Conv1D) else g for part, g in zip(parts, found, strict=True)]
        cut = [g if part.rows is None else g[part.rows] for part, g in zip(parts, turned, strict=True)]
        rows.append(torch.cat([g.flatten() for g in cut]))
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", DENSE)
@pytest.mark.parametrize("roles", [("v",), ROLES])
def test_they_are_those_of_each_example_alone(architecture: str, roles: Any) -> None:
    run = toy_run(architecture)
    examples, parts = uneven(run), find_matrices(run, 2, roles)
    _, found = find_gradients(run.model, parts, collate(examples, run.pad, run.device))
    expected = by_hand(run, parts, examples)
    assert found.shape == (3, sum(count_numbers(parts)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) + 1e-8)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_rows_of_a_fused_projection_are_what_they_are_called(architecture: str) -> None:
    """Values count only through what attention makes of them: without values nothing else has a gradient."""
    run = toy_run(architecture)
    (values,) = find_matrices(run, 1, ("v",))
    module: Any = values.module
    with torch.no_grad():
        (module.weight.T if isinstance(module, Conv1D) else module.weight)[values.rows] = 0
        module.bias[values.rows] = 0
    batch = collate(uneven(run), run.pad, run.device)
    norms = [find_gradients(run.model, find_matrices(run, 1, (role,)), batch)[1].norm() for role in "qkv"]
    assert norms[0] < 1e-6 > norms[1] and norms[2] > 1e-3


def test_the_last_blocks_are_looked_at_and_what_is_skipped_is_not() -> None:
    run = toy_run(skip=("*layers.1.*v_proj",))
    assert [part.path for part in find_matrices(run, 2, ("v",))] == ["model.layers.0.self_attn.v_proj"]
    assert [part.path for part in find_matrices(toy_run(), 1, ("v", "up"))] == [
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_packed_weights_have_the_gradients_of_the_matrix_that_they_stand_for() -> None:
    run, plain = toy_run(), toy_run()
    run.apply(parse_step("nf4()"))
    for path, module in run.linears().items():
        plain.model.get_submodule(path).weight.data = dense_weight(module)
    batch = collate(uneven(run), run.pad, run.device)
    found, expected = (find_gradients(each.model, find_matrices(each, 1, ROLES), batch)[1] for each in (run, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("before", ["", "nf4()", "wanda()"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_factors_beside_linears(architecture: str, before: str) -> None:
    run = toy_run(architecture)
    for step in filter(None, (before, "lora(rank=2)")):
        run.apply(parse_step(step))
    factors = [
        Factor(path, module, name)
        for path, module in run.model.named_modules()
        if isinstance(module, Beside)
        for name in ("a", "b")
    ]
    for factor in factors:
        factor.module.get_parameter(factor.name).data.normal_(std=0.1)
    examples = uneven(run)
    _, found = find_gradients(run.model, factors, collate(examples, run.pad, run.device))
    weights = [factor.module.get_parameter(factor.name) for factor in factors]
    expected = torch.stack([torch.cat([g.flatten() for g in alone(run, e, weights)]) for e in examples])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_nothing_is_left_behind() -> None:
    run = toy_run()
    run.model.train()
    run.model.model.norm.requires_grad_(False)
    needed = [parameter.requires_grad for parameter in run.model.parameters()]
    with torch.no_grad():
        values, found = find_gradients(
            run.model, find_matrices(run, 1, ("v",)), collate(uneven(run), run.pad, run.device)
        )
    assert run.model.training and [p.requires_grad for p in run.model.parameters()] == needed
    assert all(p.grad is None for p in run.model.parameters()) and not (values.requires_grad or found.requires_grad)
    assert not any(module._forward_hooks for module in run.model.modules())


def test_an_example_of_which_nothing_is_learned_has_none() -> None:
    run = toy_run()
    examples = [run.data.pool[0], Example("empty", (5, 6, 7), 3)]
    values, found = find_gradients(run.model, find_matrices(run, 1, ("v",)), collate(examples, run.pad, run.device))
    assert values[1] == 0 and not found[1].any() and found[0].any()


def test_the_hessian_is_the_second_derivative() -> None:
    run = toy_run(shape={"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2})
    run.model.double()
    examples, parts = uneven(run), find_matrices(run, 1, ("v", "down"))
    weights: list[Any] = [part.module.weight for part in parts]
    alike = [collate([example], run.pad, run.device) for example in examples]
    with sdpa_kernel(SDPBackend.MATH):
        total = sum(cross_entropy(run.model(b["input_ids"]).logits, b["labels"]) for b in alike)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(total, weights, create_graph=True)])  # type: ignore
    expected = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(each, weights, retain_graph=True)]) for each in slope]
    )
    unit = torch.eye(len(slope), dtype=torch.float64)
    found = multiply_hessian(run.model, parts, collate(examples, run.pad, run.device), unit)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_the_hessian_of_some_rows_is_a_part_of_that_of_all(architecture: str) -> None:
    run = toy_run(architecture, shape={"hidden_size": 8, "num_attention_heads": 2})
    run.model.double()
    batch = collate(uneven(run), run.pad, run.device)
    (values,) = find_matrices(run, 1, ("v",))
    whole = Matrix(values.path, values.module)
    places = torch.arange(torch.Size(whole.shape).numel()).view(whole.shape)[values.rows].flatten()
    unit = torch.eye(torch.Size(whole.shape).numel(), dtype=torch.float64)
    expected = multiply_hessian(run.model, [whole], batch, unit)[places][:, places]
    found = multiply_hessian(run.model, [values], batch, torch.eye(len(places), dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_margin_is_the_logarithm_of_the_odds() -> None:
    logits = torch.randn(2, 6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = collate([Example("a", (1, 2, 3, 4, 5, 6), 2), Example("b", (7, 8, 9))], 0, torch.device("cpu"))
    learned = [(0, 1, 3), (0, 2, 4), (0, 3, 5), (0, 4, 6), (1, 0, 8), (1, 1, 9)]
    p = torch.stack([logits[row, at].softmax(-1)[token] for row, at, token in learned])
    torch.testing.assert_close(token_margins(logits, batch), (p / (1 - p)).log())


def test_modules_are_watched_once() -> None:
    run = toy_run("gpt2")
    calls: list[nn.Module] = []
    parts = find_matrices(run, 1, ("q", "k", "v"))
    handle = parts[0].module.register_forward_hook(lambda module, *_: calls.append(module))
    find_gradients(run.model, parts, collate(uneven(run), run.pad, run.device))
    handle.remove()
    assert len(parts) == 3 and len(calls) == 1
