"""What peft's LoRA computes on one linear: outputs, gradients of both factors, the merged weight."""

from __future__ import annotations

import torch
from golden import write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

OUT, IN, RANK, ALPHA = 24, 40, 4, 6.0


class OneLinear(nn.Module):
    """A model of one linear, which peft finds by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def tensors(seed: int) -> dict[str, Tensor]:
    """Weight, bias, factors and inputs, and what comes of them; the loss is the mean square of the outputs."""
    torch.manual_seed(seed)
    plain = OneLinear()
    found = {"weight": plain.linear.weight.clone(), "bias": plain.linear.bias.clone(), "x": torch.randn(2, 5, IN)}
    model = get_peft_model(plain, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"]))
    layer = model.base_model.model.linear
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data.normal_(std=0.1)
    y = model(found["x"])
    y.square().mean().backward()
    found |= {"a": a, "b": b, "y": y, "a.grad": a.grad, "b.grad": b.grad}
    found["merged"] = model.merge_and_unload().linear.weight
    return {name: tensor.detach().clone() for name, tensor in found.items()}


if __name__ == "__main__":
    write("lora", __file__, ["peft"], tensors(0), rank=RANK, alpha=ALPHA)
