"""Layers, models and golden tensors that tests of quantizers share."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from effbench.core.run import RunLog
from effbench.core.views import Layer
from effbench.nn.calibration import Inputs, view_layer
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import MaskedLinear, dense_weight

GOLDEN = Path(__file__).parent / "golden"


NEEDS = {"norm", "hessian", "raw"}


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a golden file and where they come from."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def make_layer(
    out: int = 48, width: int = 128, seed: int = 0, bias: bool = False, pruned: float = 0.0, dead: int = 0
) -> Layer:
    """A linear with correlated inputs of uneven size; some weights pruned and some inputs dead if asked for."""
    generator = torch.Generator().manual_seed(seed)
    linear: nn.Module = nn.Linear(width, out, bias)
    weight = torch.randn(out, width, generator=generator) * 0.02
    linear.weight.data = weight
    if bias:
        linear.bias.data = torch.randn(out, generator=generator)
    if pruned:
        keep = torch.rand(out, width, generator=generator) >= pruned
        linear = MaskedLinear.of(weight, keep, linear.bias if bias else None)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(1024, width, generator=generator) @ mixing * (0.1 + torch.rand(width, generator=generator) * 2)
    x[:, :dead] = 0
    inputs = Inputs(NEEDS, len(x))
    inputs.add(x)
    inputs.grad2 = torch.rand(out, width, generator=generator) ** 4
    return view_layer("model.layers.0.mlp.up_proj", linear, inputs, seed=seed)


def proxy_loss(layer: Layer, weight: Tensor) -> float:
    """tr(D H D^T), the squared change of the layer's outputs."""
    delta = weight.double() - dense_weight(layer.module).double()
    return float(((delta @ layer.inputs.second_moment) * delta).sum())


def stub_run(model: nn.Module, length: int = 32) -> Any:
    """What streaming asks of a run."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(model.config.vocab_size, (length,), generator=generator) for _ in range(2)]
    return types.SimpleNamespace(
        model=model,
        seed=0,
        device=torch.device("cpu"),
        log=RunLog(),
        targeted=lambda path: True,
        linears=lambda: dict(Blocks(model).linears()),
        calibration=lambda: texts,
        progress=lambda unit, done, total: None,
    )


def tiny(kind: str = "llama", heads: int = 4, activation: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    common: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96)
    model: nn.Module
    if kind == "opt":
        more: dict[str, Any] = {} if activation is None else {"activation_function": activation}
        config = OPTConfig(**common, **more, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64)
        model = OPTForCausalLM(config)
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=128, num_key_value_heads=heads))
    for norm in (m for n, m in model.named_modules() if "norm" in n or ".ln_" in n):
        norm.weight.data = 0.2 + torch.rand_like(norm.weight) ** 4 * 8  # uneven channels, for something to scale
    return model.eval()


def rows(n: int, count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ascending values and heavy-tailed weights [count, n], float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, n, generator=generator, dtype=torch.float64).sort(1).values * 0.02
    return values, torch.randn(count, n, generator=generator, dtype=torch.float64).pow(4)
