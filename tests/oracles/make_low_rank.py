"""What peft's rsLoRA, DoRA, VeRA and AdaLoRA compute on one linear, how AdaLoRA's ranks move, and LoRA+'s groups."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from golden import write
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

OUT, IN, RANK, ALPHA = 24, 40, 4, 6.0
TARGETS = ["linear"]
STEPS, WARMUP, FINAL, INTERVAL = 14, 3, 5, 2
SIZES = [(5, 7), (7, 5), (6, 6)]  # [out, in] of the linears among which AdaLoRA's ranks move
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


class OneLinear(nn.Module):
    """A model of one linear, which peft finds by its name; the loss is the mean square of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return SimpleNamespace(y=y, loss=y.square().mean())


class Several(nn.Module):
    """Linears side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, out) for out, width in SIZES)

    def forward(self, x: Tensor) -> Any:
        loss = sum(linear(x[:, : linear.in_features]).tanh().square().mean() for linear in self.linears)
        return SimpleNamespace(loss=loss)


def adalora(**changes: Any) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=RANK, target_r=2, lora_alpha=ALPHA, target_modules=TARGETS, total_step=9, **changes)


def one(kind: str) -> dict[str, Tensor]:
    """Trained tensors, outputs, gradients and the merged weight; dropout draws after the seed 7."""
    configurations: dict[str, Any] = {
        "rslora": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_rslora=True),
        "dora": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_dora=True),
        "dora_dropout": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, use_dora=True, lora_dropout=0.4),
        "vera": VeraConfig(r=RANK, target_modules=TARGETS, projection_prng_key=3),
        "adalora": adalora(),
    }
    torch.manual_seed(0)
    model = get_peft_model(OneLinear(), configurations[kind])
    x = torch.randn(2, 5, IN)
    layer = model.base_model.model.linear
    found = {"weight": layer.base_layer.weight.clone(), "bias": layer.base_layer.bias, "x": x}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    started = {f"start.{_short(name)}": parameter.detach().clone() for name, parameter in trained.items()}
    for name, parameter in trained.items():
        parameter.data += 0.1 * torch.randn_like(parameter)
        found[_short(name)] = parameter
    torch.manual_seed(7)
    out = model.base_model(x)  # where AdaLoRA adds its term
    out.loss.backward()
    found |= {"y": out.y, "loss": out.loss} | started
    found |= {f"{_short(name)}.grad": parameter.grad for name, parameter in trained.items()}
    if kind == "vera":
        found |= {"vera_A": layer.vera_A["default"], "vera_B": layer.vera_B["default"]}
    found["merged"] = model.merge_and_unload().linear.weight
    return {f"{kind}.{name}": tensor.detach().clone() for name, tensor in found.items()}


def _short(name: str) -> str:
    return next(part for part in name.split(".") if part.startswith(("lora_", "vera_")))


def _place(name: str) -> str:
    """The number of the linear that a tensor belongs to."""
    return name.partition("linears.")[2].partition(".")[0]


def ranks() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and gradients of each step as the allocator meets them, and what it makes of them."""
    torch.manual_seed(1)
    settings = {"init_r": 4, "target_r": 2, "tinit": WARMUP, "tfinal": FINAL, "deltaT": INTERVAL, "total_step": STEPS}
    model = get_peft_model(Several(), AdaLoraConfig(target_modules=r"linears\.\d", lora_alpha=ALPHA, **settings))
    allocator = model.base_model.rankallocator
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05)
    found: dict[str, Tensor] = {}
    for step in range(1, STEPS + 1):
        model(torch.randn(6, 7)).loss.backward()
        optimizer.step()
        for name, parameter in trained.items():
            place = f"ranks.{step}.{_place(name)}.{_short(name)}"
            found |= {place: parameter.detach().clone(), f"{place}.grad": parameter.grad.clone()}
        model.base_model.update_and_allocate(step)
        for name, parameter in trained.items():
            place = f"ranks.{step}.{_place(name)}.{_short(name)}"
            if "lora_E" in name:
                found[f"{place}.after"] = parameter.detach().clone()
            if step == STEPS - FINAL - 1:  # the last of which the averages are kept
                inner = name.removeprefix("base_model.model.")
                found[f"{place}.sensitivity"] = allocator.exp_avg_ipt[inner].clone()
                found[f"{place}.uncertainty"] = allocator.exp_avg_unc[inner].clone()
        optimizer.zero_grad()
    return found, {"budgets": json.dumps([allocator.budget_schedule(step)[0] for step in range(1, STEPS + 1)])}


def groups() -> str:
    """Learning rate of every trained tensor under LoRA+, with magnitudes and a table of embeddings, as JSON."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE))
    targets = ["q_proj", "down_proj", "embed_tokens"]
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, use_dora=True))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return json.dumps({names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}, indent=0)


if __name__ == "__main__":
    every: dict[str, Tensor] = {}
    for kind in ("rslora", "dora", "dora_dropout", "vera", "adalora"):
        every |= one(kind)
    trajectory, facts = ranks()
    facts |= {"rank": RANK, "alpha": ALPHA, "steps": STEPS, "warmup": WARMUP, "final": FINAL, "interval": INTERVAL}
    facts |= {"sizes": json.dumps(SIZES), "shape": json.dumps(SHAPE), "groups": groups()}
    write("low_rank", __file__, ["peft", "transformers"], every | trajectory, **facts)
