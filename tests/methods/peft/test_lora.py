"""LoRA against peft, and what its merge leaves of the zeros and codes that stood there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from effbench.checks import fit_two_steps, probe, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.core.views import Site
from effbench.formats.codebook import LutLinear
from effbench.formats.csr import BitmaskLinear
from effbench.formats.sparse import PrunedLinear
from effbench.methods.peft.lora import LoRA, LoRALinear
from effbench.nn.files import artifact
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, kept, stored_bytes
from effbench.probes.memory import bits_per_weight

with safe_open(Path(__file__).parent.parent.parent / "golden" / "lora.safetensors", "pt") as file:
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    FACTS = file.metadata()


SITE = Site(path="q_proj", kind="linear", role="q", block=0, seed=0)


def ready(steps: str, architecture: str = "llama"):
    """A toy run after the steps, `fit` shortened to two of its own."""
    run = toy_run(architecture)
    for step in parse(steps).steps:
        if step.key == "fit":
            fit_two_steps(run)
        else:
            run.apply(step)
    return run


def adapters(run) -> list[LoRALinear]:
    return [module for module in run.model.modules() if isinstance(module, LoRALinear)]


def stirred(run):
    """The run, its products no longer zero."""
    torch.manual_seed(0)
    for module in adapters(run):
        module.b.data.normal_(std=0.02)
    return run


def settled(run):
    """The run with its adapters merged as after a fit."""
    for entry in run._swapped:
        entry.trained = True
    run.settle()
    return run


def linears(run) -> list[nn.Module]:
    return [module for _, module in Blocks(run.model).linears()]


def test_outputs_gradients_and_merged_weight_are_those_of_peft() -> None:
    plain = nn.Linear(40, 24)
    plain.weight.data, plain.bias.data = GOLDEN["weight"].clone(), GOLDEN["bias"].clone()
    method = LoRA(rank=int(FACTS["rank"]), alpha=float(FACTS["alpha"]))
    module = method.replace(plain, SITE)
    module.a.data, module.b.data = GOLDEN["a"].clone(), GOLDEN["b"].clone()
    y = module(GOLDEN["x"])
    y.square().mean().backward()
    merged = method.settle(module)
    for name, found in (("y", y), ("a.grad", module.a.grad), ("b.grad", module.b.grad), ("merged", merged.weight)):
        torch.testing.assert_close(found, GOLDEN[name], rtol=0, atol=1e-6, msg=name)
    assert torch.equal(merged.bias, GOLDEN["bias"])


def test_it_starts_as_the_model_it_adapts_with_the_published_distribution() -> None:
    run = toy_run()
    before = probe(run)
    run.apply(LoRA(rank=4))
    assert torch.equal(probe(run), before)
    for module in adapters(run):
        bound = module.in_features**-0.5  # Kaiming's with a = sqrt(5)
        assert not module.b.any() and 0.9 * bound < float(module.a.detach().abs().max()) <= bound


def test_only_the_factors_are_trained() -> None:
    run = toy_run()
    shapes = [dense_weight(module).shape for module in linears(run)]
    run.apply(LoRA(rank=4))
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trained) == sum(4 * (rows + columns) for rows, columns in shapes)
    frozen = {n: p.clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    fit_two_steps(run)
    assert all(torch.equal(p, frozen[n]) for n, p in run.model.named_parameters() if n in frozen)
    assert all(module.b.any() for module in adapters(run))


def test_its_chance_is_that_of_the_seed() -> None:
    def first(seed: int, drawn: int) -> torch.Tensor:
        run = toy_run(seed=seed)
        torch.rand(drawn)
        run.apply(LoRA())
        return adapters(run)[0].a

    assert torch.equal(first(1, 0), first(1, 7)) and not torch.equal(first(1, 0), first(2, 0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_a_merge_into_dense_weights_keeps_the_function(architecture: str) -> None:
    run = stirred(ready("lora(rank=4)", architecture))
    before = probe(run)
    assert torch.allclose(probe(settled(run)), before, atol=1e-4)
    assert not adapters(run) and not run.log.densified


@pytest.mark.parametrize("pruner", ["wanda(sparsity=0.6)", "magnitude(pattern='2:4')", "block_sparse(sparsity=0.3)"])
def test_a_masked_merge_keeps_zeros_and_function(pruner: str) -> None:
    run = ready(pruner)
    holes = [~module.kept() for module in linears(run)]
    run.apply(parse_step("lora(rank=4)"))
    before = probe(stirred(run))
    assert torch.allclose(probe(settled(run)), before, atol=1e-4), "what was trained is not what was merged"
    for module, hole in zip(linears(run), holes, strict=True):
        assert isinstance(module, PrunedLinear) and torch.equal(~module.kept(), hole)
    assert not run.log.densified


@pytest.mark.parametrize(("steps", "size"), [("", 1e-3), ("", 1e-1), ("nf4(), ", 1e-1), ("wanda(), ", 1e-3)])
def test_the_record_says_what_a_merge_lost(steps: str, size: float) -> None:
    """By hand in float64: weights and products of 16 bits, or codes, against their exact sums."""
    run = ready(f"{steps}lora(rank=4)")
    run.storage = torch.bfloat16
    torch.manual_seed(0)
    sums, products = [], []
    for module in adapters(run):
        module.base.to(torch.float32)
        module.b.data.normal_(std=size)
        product = module.scaling * (module.b.double() @ module.a.double())
        product = product if kept(module) is None else product * kept(module)
        products.append(product)
        sums.append(dense_weight(module.base).double() + product)
    settled(run)
    run.finish()
    lost = [(dense_weight(m).double() - s).square().sum() for m, s in zip(linears(run), sums, strict=True)]
    share = float((sum(lost) / sum(p.square().sum() for p in products)).detach().sqrt())
    assert run.log.merge_lost == {"lora(rank=4)": pytest.approx(share, rel=1e-4)}
    assert share > {1e-3: 0.01, 1e-1: 0.001}[size]


def test_a_dense_merge_says_that_it_densified() -> None:
    run = stirred(ready("wanda(sparsity=0.6), lora(rank=4, merge='dense')"))
    before = probe(run)
    assert torch.allclose(probe(settled(run)), before, atol=1e-4)
    assert all(type(module) is nn.Linear for module in linears(run))
    assert len(run.log.densified) == 14 and run.log.densified[0] == "model.layers.0.self_attn.q_proj"


def test_a_separate_product_stays_and_the_sparse_matrix_stays_sparse(tmp_path: Path) -> None:
    run = stirred(ready("wanda(sparsity=0.6), lora(rank=4, merge='separate')"))
    settled(run).finish()
    assert len(adapters(run)) == 14 and all(isinstance(module.base, BitmaskLinear) for module in adapters(run))
    assert not run.log.densified
    written = artifact.save(run.model, tmp_path / "model", run.storage)
    loaded = artifact.load(tmp_path / "model")
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, run.model(ids).logits)
    assert sum(stored_bytes(run.model, run.storage)) == written
    module = adapters(run)[0]
    bare, whole = stored_bytes(module.base, run.storage), stored_bytes(module, run.storage)
    assert whole.metadata == bare.metadata > 0
    assert whole.weights - bare.weights == 2 * 4 * (module.in_features + module.out_features)


def test_over_four_bits_a_merge_rounds_again_goes_dense_or_stays_apart() -> None:
    runs = {merge: stirred(ready(f"nf4(), lora(rank=4, merge='{merge}')")) for merge in ("masked", "dense", "separate")}
    before = probe(runs["dense"])
    for run in runs.values():
        settled(run)
    assert all(isinstance(module, LutLinear) for module in linears(runs["masked"]))
    assert all(type(module) is nn.Linear for module in linears(runs["dense"]))
    assert torch.allclose(probe(runs["dense"]), before, atol=1e-4)
    assert torch.allclose(probe(runs["separate"]), before, atol=1e-4)
    bits = {merge: bits_per_weight(run.model, torch.bfloat16)[0] for merge, run in runs.items()}
    plain = bits_per_weight(ready("nf4()").model, torch.bfloat16)[0]
    assert bits["masked"] == plain and bits["dense"] == 16 and plain + 0.5 < bits["separate"] < plain + 2


def test_a_bias_is_kept_and_counted_as_one() -> None:
    run = stirred(ready("lora(rank=4)", "qwen2"))
    plain = toy_run("qwen2").model.model.layers[0].self_attn.q_proj
    module = run.model.model.layers[0].self_attn.q_proj
    assert torch.equal(module.bias, plain.bias) and module.base.bias is None
    settled(run)
    assert torch.equal(run.model.model.layers[0].self_attn.q_proj.bias, plain.bias)
    assert kept(run.model.model.layers[0].self_attn.q_proj) is None


def test_targets_are_names_and_may_have_wildcards() -> None:
    run = ready("lora(targets=('q_proj', 'g*'))")
    assert {path.rpartition(".")[2] for path, m in Blocks(run.model).linears() if isinstance(m, LoRALinear)} == {
        "q_proj",
        "gate_proj",
    }
    with pytest.raises(Unsupported, match="none of the modules is a target; they are called down_proj, gate_proj"):
        ready("lora(targets=('query',))")


def test_dropout_acts_in_training_alone() -> None:
    module = LoRA(rank=2, dropout=0.5).replace(nn.Linear(64, 8), SITE)
    module.b.data.normal_()
    x = torch.randn(3, 64)
    module.train()
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_later_step_finds_merged_weights() -> None:
    run = ready("wanda(sparsity=0.6), lora(), fit(), gptq()")
    assert not adapters(run)
    for module, pruned in zip(linears(run), linears(ready("wanda(sparsity=0.6)")), strict=True):
        assert torch.equal(module.kept(), pruned.kept()) and not dense_weight(module)[~pruned.kept()].any()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("lora(rank=0)", "rank must be at least 1"),
        ("lora(alpha=0)", "alpha must be above 0"),
        ("lora(dropout=1)", "dropout must be in"),
        ("lora(merge='merged')", "must be one of 'masked', 'dense', 'separate'"),
        ("lora(targets='q_proj')", r"targets='q_proj': must be 'all' or a tuple of text, not str"),
    ],
)
def test_wrong_usage(step: str, message: str) -> None:
    with pytest.raises(Usage, match=message):
        parse_step(step)
