"""What peft writes and computes: adapters of the kinds read here, on small random models, as files and logits."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from golden import write
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
SHAPE |= {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": {"n_positions": 64, "resid_pdrop": 0.0},
}
LINEARS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
IDS = torch.arange(24).view(2, 12) * 7 % 39 + 1
SIZES = (12, 8)  # real tokens in each row: the second is padded on the right


def configurations(architecture: str) -> dict[str, Any]:
    """An adapter of each kind that peft and effbench both have."""
    linears = LINEARS[architecture]
    return {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=linears),
        "rslora": LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=linears, use_rslora=True),
        "dora": LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=linears, use_dora=True),
        "vera": VeraConfig(task_type="CAUSAL_LM", r=5, target_modules=linears, projection_prng_key=11),
        "adalora": AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=3, target_r=2, lora_alpha=5, target_modules=linears, total_step=4, tfinal=2
        ),
        "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }


def tensors(architecture: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights of the base, tensors of each adapter's file, and logits; beside them the configurations of the files."""
    config = AutoConfig.for_model(architecture, **(SHAPE | MODELS[architecture]))
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = {f"base.{name}": parameter.detach().clone() for name, parameter in base.named_parameters()}
    told: dict[str, str] = {"shape": json.dumps(SHAPE | MODELS[architecture])}
    mask = torch.stack([(torch.arange(12) < size).long() for size in SIZES])
    for kind, settings in configurations(architecture).items():
        torch.manual_seed(2)
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        fresh.load_state_dict(base.state_dict())
        model = get_peft_model(fresh, settings).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.3)
        if kind == "adalora":
            for step in (1, 2):  # the second is the last at which ranks move
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
                model.base_model.update_and_allocate(step)
        with torch.no_grad():
            logits = model(input_ids=IDS, attention_mask=mask).logits
        found[f"{kind}.logits"] = logits[:, -IDS.shape[1] :].clone()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = load_file(Path(folder) / "adapter_model.safetensors")
            told[kind] = (Path(folder) / "adapter_config.json").read_text()
        found |= {f"{kind}.file.{name}": tensor for name, tensor in saved.items()}
    return {f"{architecture}.{name}": tensor for name, tensor in found.items()}, {
        f"{architecture}.{name}": text for name, text in told.items()
    }


if __name__ == "__main__":
    every: dict[str, Tensor] = {"ids": IDS, "sizes": torch.tensor(SIZES)}
    facts: dict[str, str] = {}
    for architecture in MODELS:
        some, texts = tensors(architecture)
        every |= some
        facts |= texts
    write("peft", __file__, ["peft", "transformers"], every, **facts)
