"""What a fit trains: every tensor in one group, decay for matrices alone, float32 while it is trained, clipping."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit, linears, seen, watch_groups

from effbench.checks import TOYS, toy_run
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.kinds import Train
from effbench.core.recipe import parse_step
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import MaskedLinear, replace
from effbench.nn.run import ModelRun
from effbench.nn.train.groups import find_undecayed, group_parameters
from effbench.nn.train.slots import Precision

# Weight decay


@pytest.mark.parametrize("architecture", TOYS)
def test_decay_leaves_vectors_and_embeddings_alone(architecture: str) -> None:
    run = toy_run(architecture)
    matrices = {id(module.weight) for module in linears(run).values()}
    tables = {id(p) for module in run.model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    decayed, still = group_parameters(run, 1e-3, 0.1)
    assert (decayed["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    ids = {id(parameter) for parameter in decayed["params"]}
    assert matrices <= ids and not ids & tables and all(p.ndim >= 2 for p in decayed["params"])
    assert len(decayed["params"]) + len(still["params"]) == len(list(run.model.parameters()))


def test_decay_leaves_alone_what_stands_for_vectors() -> None:
    class Prompt(nn.Module):
        undecayed = ("soft",)

        def __init__(self) -> None:
            super().__init__()
            self.soft = nn.Parameter(torch.ones(4, 8))
            self.matrix = nn.Parameter(torch.ones(4, 8))
            self.magnitude = nn.Parameter(torch.ones(8, 1))  # as in DoRA
            self.gate = nn.Parameter(torch.ones(()))
            self.scale = nn.Parameter(torch.ones(1, 1, 8))

    model = nn.ModuleDict({"prompt": Prompt(), "norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)})
    model["tied"] = nn.Linear(8, 8, bias=False)
    model["table"] = nn.Embedding(8, 8)
    model["table"].weight = model["tied"].weight  # type: ignore[assignment]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[parameter] for parameter in names.keys() - find_undecayed(model)} == {"prompt.matrix", "up.weight"}


def test_decay_moves_matrices_alone() -> None:
    run = toy_run("opt")

    @dataclasses.dataclass(frozen=True)
    class Nothing(Train):
        """No gradient: what moves is moved by decay."""

        claims: ClassVar = ("train.loss",)

        def loss(self, batch: Any, out: Any, run: Any) -> Any:
            return {"zero": out.logits.float().sum() * 0.0}

    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    matrices = {f"{path}.weight" for path in linears(run)}
    run.apply(Nothing())
    report = fit(run, weight_decay=0.1)
    moved = {name for name, value in before.items() if not torch.equal(run.model.get_parameter(name), value)}
    assert moved == matrices
    counts = [(group["lr"], group["weight_decay"], group["tensors"]) for group in report["groups"]]
    assert counts == [(1e-3, 0.1, len(matrices)), (1e-3, 0.0, len(before) - len(matrices))]
    assert sum(group["parameters"] for group in report["groups"]) == sum(value.numel() for value in before.values())


# Every tensor in one group


def arranging(arrange: Any) -> Train:
    @dataclasses.dataclass(frozen=True)
    class Arranging(Train):
        def param_groups(self, groups: list[dict[str, Any]], run: Any) -> list[dict[str, Any]]:
            return arrange(groups, run)  # type: ignore[no-any-return]

    return Arranging()


FAULTS = {
    "leaves out model.embed_tokens.weight": lambda groups, run: groups[:1],
    "leaves out model.embed_tokens.weight, and 20 more": lambda groups, run: [],
    "names model.layers.0.self_attn.q_proj.weight twice": lambda groups, run: [*groups, groups[0]],
    "names lm_head.weight twice": lambda groups, run: [*groups, {"params": run.model.lm_head.weight}],
    "names a tensor that is not trainable": lambda groups, run: [
        *groups, {"params": [nn.Parameter(torch.ones(2), requires_grad=False)]}
    ],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hook_that_loses_or_doubles_a_tensor_is_named(fault: str) -> None:
    run = toy_run()
    run.apply(arranging(FAULTS[fault]))
    with pytest.raises(Refused, match=rf"\(\): param_groups {fault}"):
        fit(run)


def test_empty_groups_are_dropped_and_what_a_group_leaves_open_is_the_fits() -> None:
    run = toy_run()
    own = nn.Parameter(torch.ones(2))
    groups = watch_groups(run)
    run.apply(
        arranging(
            lambda groups, run: [
                {"params": []},
                {"params": (p for group in groups for p in group["params"])},
                {"params": own, "lr": 0.5},
            ]
        )
    )
    report = fit(run, weight_decay=0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.1), (0.5, 0.1)]
    assert [group["tensors"] for group in report["groups"]] == [len(list(run.model.parameters())), 1]


# Clipping


@pytest.mark.parametrize("step", ["magnitude(sparsity=0.7)", "wanda(pattern='2:4')"])
def test_clipping_counts_only_weights_that_can_move(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run()
    run.apply(parse_step(step))
    norms: list[float] = []
    expected: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def watch(parameters: Any, most: float) -> Tensor:
        squares = 0.0
        held = {
            id(module.weight): module.kept() for module in linears(run).values() if isinstance(module, MaskedLinear)
        }
        for parameter in parameters:
            mask = held.get(id(parameter))
            squares += float((parameter.grad if mask is None else parameter.grad[mask]).square().sum())
        expected.append(math.sqrt(squares))
        norms.append(float(clip(parameters, most)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", watch)
    fit(run, clip=1.0)
    assert norms == pytest.approx(expected, rel=1e-5) and len(norms) == 5
    assert all(not module.weight[~module.kept()].any() for module in linears(run).values())  # type: ignore[operator]


# Sixteen bits


def narrow_run(dtype: torch.dtype) -> ModelRun:
    run = toy_run()
    for parameter in run.model.parameters():
        parameter.data = parameter.data.to(dtype)
    return run


class Plain(Train):
    """Computes in the type of the parameters."""

    claims: ClassVar = ("train.precision",)

    def slot_values(self) -> dict[str, Any]:
        return {"precision": Precision()}


PLAIN = dataclasses.dataclass(frozen=True)(Plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_move_at_usual_rates_and_end_as_narrow_as_before(dtype: torch.dtype) -> None:
    run = narrow_run(dtype)
    before = {name: parameter.detach().float() for name, parameter in run.model.named_parameters()}
    after: dict[str, Tensor] = {}
    seen(run, lambda run, *_: after.update({n: p.detach().clone() for n, p in run.model.named_parameters()}))
    fit(run, steps=2, lr=1e-4)
    used = {name for name in before if "embed" not in name}  # rows of tokens that were not seen stand still
    moved = sum(int((after[name] != before[name]).sum()) for name in used) / sum(before[name].numel() for name in used)
    assert moved > 0.99
    assert all(parameter.dtype == dtype and parameter.grad is None for parameter in run.model.parameters())
    assert all(torch.equal(run.model.get_parameter(name), value.to(dtype)) for name, value in after.items())


def test_a_narrow_fit_is_a_float32_fit_rounded() -> None:
    wide, narrow = toy_run(), narrow_run(torch.bfloat16)
    narrow.apply(PLAIN())
    fit(wide, steps=4)
    fit(narrow, steps=4)
    for name, parameter in wide.model.named_parameters():
        assert torch.equal(narrow.model.get_parameter(name), parameter.bfloat16()), name


def test_by_default_a_narrow_model_computes_in_sixteen_bits() -> None:
    wide, narrow = toy_run(), narrow_run(torch.bfloat16)
    types: list[torch.dtype] = []
    narrow.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, x, y: types.append(y.dtype))
    a, b = fit(wide, steps=4), fit(narrow, steps=4)
    assert set(types) == {torch.bfloat16} and b["loss_last"] == pytest.approx(a["loss_last"], rel=1e-2)


@pytest.mark.parametrize("step", ["gmp()", "movement()", "learned_mask()", "lora()", "magnitude()"])
def test_methods_train_narrow_models(step: str) -> None:
    run = narrow_run(torch.bfloat16)
    run.apply(parse_step(step))
    report = fit(run)
    assert math.isfinite(report["loss_last"])
    assert all(p.dtype == torch.bfloat16 for p in run.model.parameters() if "lora" not in step)


def test_a_fit_that_fails_leaves_narrow_parameters_narrow() -> None:
    run = narrow_run(torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    seen(run, fail)
    with pytest.raises(RuntimeError):
        fit(run, lr=1e-30)
    assert all(torch.equal(run.model.get_parameter(name), value) for name, value in before.items())


def test_masked_linears_stay_masked_in_sixteen_bits() -> None:
    run = narrow_run(torch.bfloat16)
    path, module = next(iter(linears(run).items()))
    keep = module.weight.float().abs() > 0.01  # type: ignore[operator]
    replace(run.model, path, MaskedLinear.of(module.weight.detach(), keep))
    fit(run)
    assert not run.model.get_parameter(f"{path}.weight")[~keep].any()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_fit_of_the_last_blocks_moves_nothing_else(architecture: str) -> None:
    run = toy_run(architecture)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    report = fit(run, train="last:1")
    inside = {id(parameter) for parameter in Blocks(run.model).blocks[-1].parameters()}
    moved = {id(p) for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= inside
    assert sum(group["parameters"] for group in report["groups"]) == sum(
        p.numel() for p in Blocks(run.model).blocks[-1].parameters()
    )
    assert all(parameter.requires_grad for parameter in run.model.parameters())


def test_blocks_that_are_not_there_and_slips_in_their_number() -> None:
    with pytest.raises(Unsupported, match="train='last:9': the model has 2 blocks"):
        fit(toy_run(), train="last:9")
    for slip in ("last", "last:0", "first:2", "last:2.5", ""):
        with pytest.raises(Usage, match="train must be all, or last:N"):
            parse_step(f"fit(train={slip!r})")
