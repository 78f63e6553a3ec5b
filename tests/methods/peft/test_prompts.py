"""LLaMA-Adapter's own softmax and gates in closed form, and how deep prompts start and count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_training import fit
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from effbench.checks import TOYS, probe, probe_model, toy_run
from effbench.core.errors import Usage
from effbench.core.recipe import parse_step
from effbench.methods.peft._prefix import Prefix, Reparametrized
from effbench.methods.peft.llama_adapter import GatedPrompts, LLaMAAdapter
from effbench.methods.peft.p_tuning_v2 import PTuningV2
from effbench.methods.peft.prefix_tuning import PrefixTuning
from effbench.nn.files import artifact
from effbench.nn.model.attention import attending, list_attention
from effbench.nn.model.blocks import Blocks, count_heads, project_keys

SHAPES = {  # heads of keys and values, and their width
    "llama": (4, 32),
    "mistral": (2, 32),
    "qwen2": (2, 32),
    "qwen3": (2, 32),
    "mixtral": (2, 32),
    "opt": (4, 32),
    "gpt2": (4, 32),
    "gpt_neox": (4, 32),
}


def parts(run: Any, kind: type) -> list[Any]:
    return [module for module in run.model.modules() if isinstance(module, kind)]


def attend_by_hand(part: Any, x: Tensor, rotary: Any, joint: bool) -> Tensor:
    """The first layer of a toy Mistral in float64: softmax over the tokens plus gate times softmax over the prompts, or
    with `joint` the seed's gate times one softmax over both."""
    attention = part.double()
    shape = (1, x.shape[1], -1, 32)
    query, key, value = (getattr(attention, f"{name}_proj")(x).view(shape).transpose(1, 2) for name in "qkv")
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    own = attention.llama_adapter
    more_keys, more_values = (
        getattr(attention, f"{name}_proj")(own.prompts).view(1, -1, 2, 32).transpose(1, 2) for name in "kv"
    )
    key, value, more_keys, more_values = (each.repeat_interleave(2, 1) for each in (key, value, more_keys, more_values))
    far = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    scores = (query @ key.transpose(2, 3) / 32**0.5).masked_fill(far, float("-inf"))
    front = query @ more_keys.transpose(2, 3) / 32**0.5
    gate = torch.stack([number.tanh() for number in own.gate]).view(1, 4, 1, 1)
    tokens = scores.softmax(-1) @ value
    prompts = gate * (front.softmax(-1) @ more_values)
    if joint:
        prompts = gate * (torch.cat([front, scores], -1).softmax(-1) @ torch.cat([more_values, value], 2))
    return attention.o_proj((tokens + prompts).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_prompts_have_a_softmax_of_their_own_and_a_gate_for_each_head() -> None:
    run = toy_run("mistral")
    run.apply(LLaMAAdapter(length=5))
    attention = list_attention(run.model)[0]
    attention.llama_adapter.gate.data = torch.tensor([0.5, -1.0, 2.0, 0.0])
    x = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(0))
    rotary = run.model.model.rotary_emb(x, torch.arange(9)[None])
    with attending(run.model):
        found = attention(x, position_embeddings=rotary, attention_mask=None)[0]
    cos_sin = tuple(part.double() for part in rotary)
    expected, seeds = (attend_by_hand(attention, x.double(), cos_sin, joint) for joint in (False, True))
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    assert float((found - seeds).norm() / found.norm()) > 0.05


@pytest.mark.parametrize("gate", ["head", "scalar"])
@pytest.mark.parametrize("architecture", TOYS)
def test_with_the_gate_at_zero_the_model_is_what_it_was(architecture: str, gate: str) -> None:
    run = toy_run(architecture)
    before = probe(run)
    run.apply(LLaMAAdapter(gate=gate))
    found = parts(run, GatedPrompts)
    assert torch.allclose(probe(run), before, rtol=0, atol=1e-6)  # the attention is effbench's, nothing is added
    assert all(
        not part.gate.any() and float(part.prompts.detach().std()) == pytest.approx(1, rel=0.1) for part in found
    )
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert trained == 2 * (10 * 128 + (4 if gate == "head" else 1))
    report = fit(run, steps=3, lr=0.1)
    assert all(part.gate.all() for part in found) and report["loss_last"] != report["loss_first"]


def test_prompts_are_of_the_top_layers() -> None:
    run = toy_run(shape={"layers": 4})
    run.apply(LLaMAAdapter(layers=3))
    assert [any(isinstance(c, GatedPrompts) for c in module.children()) for module in list_attention(run.model)] == [
        False,
        True,
        True,
        True,
    ]


@torch.no_grad()
@pytest.mark.parametrize("architecture", TOYS)
def test_what_a_layer_makes_of_prompts_is_what_it_makes_of_tokens_at_the_first_place(architecture: str) -> None:
    """At position 0 nothing is turned, so that keys and values in the cache are those that prompts get."""
    run = toy_run(architecture)
    torch.manual_seed(0)
    for name, parameter in run.model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
    seen: list[Tensor] = []
    view = Blocks(run.model)
    hook = view.blocks[0].get_submodule(view.names.norms[0]).register_forward_hook(lambda *call: seen.append(call[2]))
    cache = run.model(input_ids=torch.tensor([[5]]), use_cache=True).past_key_values
    hook.remove()
    keys, values = project_keys(list_attention(run.model)[0], seen[0][0])
    torch.testing.assert_close(keys, cache.layers[0].keys[0])
    torch.testing.assert_close(values, cache.layers[0].values[0])


@pytest.mark.parametrize("architecture", TOYS)
def test_deep_prompts_are_counted_by_heads_of_keys(architecture: str) -> None:
    run = toy_run(architecture)
    assert count_heads(list_attention(run.model)[0]) == SHAPES[architecture]
    run.apply(PTuningV2(length=7))
    heads, width = SHAPES[architecture]
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 2 * 2 * 7 * heads * width
    assert all(float(p.std()) == pytest.approx(1, rel=0.15) for p in trained)
    run.finish(recipe_is_empty=True)
    prefix = toy_run(architecture)
    prefix.apply(PrefixTuning(length=7, hidden=8))
    fit(prefix, steps=1)
    prefix.finish()
    assert sum(p.numel() for part in parts(prefix, Prefix) for p in part.parameters()) == 2 * 2 * 7 * heads * width


def test_an_mlp_makes_deep_prompts_where_that_is_asked() -> None:
    run = toy_run()
    run.apply(PTuningV2(length=3, reparametrize=True, hidden=8))
    assert len(parts(run, Reparametrized)) == 2
    other = toy_run()
    other.apply(PrefixTuning(length=3, hidden=8))
    assert torch.equal(probe(run), probe(other))  # the same mechanics
    fit(run, steps=1)
    run.finish()
    assert len(parts(run, Prefix)) == 2 and not parts(run, Reparametrized)


def test_an_artifact_that_names_the_prefix_where_it_once_was_is_read(tmp_path: Path) -> None:
    run = toy_run()
    run.apply(PTuningV2(length=3))
    run.finish()
    artifact.save(run.model, tmp_path / "a", run.storage)
    manifest = tmp_path / "a" / "effbench.json"
    text = manifest.read_text()
    assert "peft._prefix:Prefix" in text
    manifest.write_text(text.replace("peft._prefix:Prefix", "peft.prefix_tuning:Prefix"))
    assert json.loads(manifest.read_text()) and torch.equal(probe_model(artifact.load(tmp_path / "a")), probe(run))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("llama_adapter(length=0)", "length and layers must be at least 1"),
        ("llama_adapter(layers=0)", "length and layers must be at least 1"),
        ("llama_adapter(gate='tanh')", "must be one of 'head', 'scalar'"),
        ("p_tuning_v2(length=0)", "length and hidden must be at least 1"),
    ],
)
def test_wrong_usage(step: str, message: str) -> None:
    with pytest.raises(Usage, match=message):
        parse_step(step)
