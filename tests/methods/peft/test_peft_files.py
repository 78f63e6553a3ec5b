"""Adapters that peft has written compute here what they compute there, and go back as they came.

peft pads on the right only where something stands in front, and so do these rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.checks import toy_run
from effbench.core.errors import Unsupported
from effbench.core.recipe import parse_step
from effbench.nn.files.peft import load_peft, save_peft
from effbench.nn.model.feed import feed

with safe_open(Path(__file__).parent.parent.parent / "golden" / "peft.safetensors", "pt") as file:
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    FACTS = file.metadata()

KINDS = ["lora", "rslora", "dora", "vera", "adalora", "prompt", "prefix"]
# What a file says of the training behind it, where it came from, and where AdaLoRA's ranks lay, is not kept.
FORGOTTEN = {"target_modules", "rank_pattern", "total_step", "tinit", "tfinal"}


def below(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(name): value for key, value in GOLDEN.items() if key.startswith(name)}


def base(architecture: str) -> Any:
    config = AutoConfig.for_model(architecture, **json.loads(FACTS[f"{architecture}.shape"]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(below(f"{architecture}.base."), strict=False)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_peft_has_written_computes_the_same_and_goes_back(architecture: str, kind: str, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    written = below(f"{architecture}.{kind}.file.")
    save_file(written, theirs / "adapter_model.safetensors")
    (theirs / "adapter_config.json").write_text(FACTS[f"{architecture}.{kind}"])
    model = base(architecture)
    load_peft(model, theirs, "a")
    mask = torch.stack([(torch.arange(12) < size).long() for size in GOLDEN["sizes"].tolist()])
    with torch.no_grad():
        logits = feed(model, {"input_ids": GOLDEN["ids"], "attention_mask": mask}).logits
        plain = feed(base(architecture), {"input_ids": GOLDEN["ids"], "attention_mask": mask}).logits
    real = mask.bool()
    expected = GOLDEN[f"{architecture}.{kind}.logits"]
    assert torch.allclose(logits[real], expected[real], atol=2e-5)
    assert not torch.allclose(plain[real], expected[real], atol=5e-3)
    save_peft(model, ours, "a")
    tensors = load_file(ours / "adapter_model.safetensors")
    assert tensors.keys() == written.keys()
    assert all(torch.equal(tensors[name], written[name]) for name in written)
    mine = json.loads((ours / "adapter_config.json").read_text())
    their = json.loads(FACTS[f"{architecture}.{kind}"])
    for key in mine.keys() - FORGOTTEN:
        assert mine[key] == their[key], key
    if "target_modules" in mine:  # whole paths here, endings there
        assert {path.rpartition(".")[2] for path in mine["target_modules"]} == set(their["target_modules"])
    if kind == "adalora":
        ranks = [{path: sum(places) for path, places in told["rank_pattern"].items()} for told in (mine, their)]
        assert ranks[0] == ranks[1] and sum(ranks[0].values()) == 2 * len(ranks[0])


def written(folder: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """A LoRA file of PEFT with something that its kind may hold besides."""
    folder.mkdir()
    save_file(below("llama.lora.file.") | tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(json.loads(FACTS["llama.lora"]) | config))
    return folder


@pytest.mark.parametrize(
    ("config", "tensor"),
    [
        ({"trainable_token_indices": [1, 2]}, "embed_tokens.token_adapter.trainable_tokens_delta"),
        ({}, "embed_tokens.lora_embedding_A"),
        ({"lora_bias": True}, "layers.0.self_attn.q_proj.lora_B.bias"),
        ({}, "layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
        ({"rank_pattern": {"q_proj": 2}}, ""),
        ({"layer_replication": [[0, 1]]}, ""),
        ({"init_lora_weights": "pissa"}, ""),
        ({"bias": "all"}, ""),
        ({"of_a_later_version": 3}, ""),
    ],
    ids=str,
)
def test_what_is_not_read_is_not_dropped(config: dict[str, Any], tensor: str, tmp_path: Path) -> None:
    more = {f"base_model.model.model.{tensor}": torch.ones(2)} if tensor else {}
    model = base("llama")
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(Unsupported, match="not read here of PEFT: .*" + (tensor or next(iter(config)))):
        load_peft(model, written(tmp_path / "a", config, **more), "a")
    assert [name for name, _ in model.named_parameters()] == before
    load_peft(model, written(tmp_path / "b", {"revision": "main", "megatron_core": "megatron.core"}), "a")


def test_prefixes_of_a_model_whose_attention_slides_are_not_written(tmp_path: Path) -> None:
    run = toy_run("mistral", shape={"sliding_window": 16})
    run.apply(parse_step("p_tuning_v2(adapter='a')"))
    with pytest.raises(Unsupported, match="attention slides"):
        save_peft(run.model, tmp_path / "a", "a")
    assert not (tmp_path / "a").exists()
