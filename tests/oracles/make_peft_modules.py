"""What peft computes, logits and gradients, with IA3, prefixes and LLaMA-Adapter on small random models."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from golden import write
from peft import AdaptionPromptConfig, IA3Config, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 24}
SHAPE |= {"max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 24, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 24, "num_key_value_heads": 2},  # biases on queries, keys and values
    "gpt2": {"n_positions": 32, "n_inner": 24},
}
LINEARS = {name: ["k_proj", "v_proj", "down_proj"] for name in MODELS} | {"gpt2": ["c_attn", "mlp.c_proj"]}
IDS = torch.arange(20).view(2, 10) * 7 % 23 + 1


def configurations(architecture: str) -> dict[str, Any]:
    """An adapter of each kind that peft has for the architecture."""
    linears = LINEARS[architecture]
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=linears, feedforward_modules=linears[-1:])
    found: dict[str, Any] = {"ia3": ia3}
    if architecture != "qwen2":
        found["prefix"] = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if architecture == "llama":  # to GPT-2 peft adds the prompts' part behind the output projection, not before it
        found["llama_adapter"] = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    return found


def tensors(architecture: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights of the base, each adapter's file and its gradients, and logits; beside them the configurations."""
    config = AutoConfig.for_model(architecture, **(SHAPE | MODELS[architecture]))
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in base.named_parameters():
        if name.endswith("bias") or parameter.ndim > 1:  # far from the start, where gradients are next to nothing
            parameter.data.normal_(std=0.3)
    found = {f"base.{name}": parameter.detach().clone() for name, parameter in base.named_parameters()}
    told: dict[str, str] = {"shape": json.dumps(SHAPE | MODELS[architecture])}
    for kind, settings in configurations(architecture).items():
        torch.manual_seed(2)
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(base.state_dict())
        model = get_peft_model(fresh, settings).eval()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for parameter in trained.values():
            parameter.data += 0.3 * torch.randn(parameter.shape)
        for name, parameter in trained.items():
            if "c_attn.ia3" in name:  # the paper rescales keys and values, peft in GPT-2 queries, too
                parameter.data[: SHAPE["hidden_size"]] = 1.0
        logits = model(input_ids=IDS).logits
        logits.square().mean().backward()
        found[f"{kind}.logits"] = logits.detach().clone()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = load_file(Path(folder) / "adapter_model.safetensors")
            told[kind] = (Path(folder) / "adapter_config.json").read_text()
            for parameter in trained.values():  # gradients under the names that the file has
                parameter.data = parameter.grad
            model.save_pretrained(folder)
            graded = load_file(Path(folder) / "adapter_model.safetensors")
        found |= {f"{kind}.file.{name}": tensor for name, tensor in saved.items()}
        found |= {f"{kind}.grad.{name}": tensor for name, tensor in graded.items()}
    return {f"{architecture}.{name}": tensor for name, tensor in found.items()}, {
        f"{architecture}.{name}": text for name, text in told.items()
    }


if __name__ == "__main__":
    every: dict[str, Tensor] = {"ids": IDS}
    facts: dict[str, str] = {}
    for architecture in MODELS:
        some, texts = tensors(architecture)
        every |= some
        facts |= texts
    write("peft_modules", __file__, ["peft", "transformers"], every, **facts)
