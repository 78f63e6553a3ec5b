"""Mixtures of experts: which modules hold them, what a token uses of them, and how they compute.

The weights of all experts of a block lie in two tensors, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]. They are
no linears: what works linear by linear ends as `Unsupported` on such a model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.core.errors import Unsupported
from effbench.nn.model.blocks import Blocks

TENSORS = ("gate_up_proj", "down_proj")
EAGER = "eager"  # one expert after the other, through linears: takes any type, and autocast acts on it
COPIED = (  # entries of a Llama's configuration that mean the same of a mixture
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def list_experts(model: nn.Module) -> list[Any]:
    """The module of each block that holds its experts; none where MLPs are dense."""
    view = Blocks(model)
    return [block.get_submodule(view.names.experts) for block in view.blocks] if view.names.experts else []


def count_used(model: Any) -> int:
    """Entries of matrices of experts and routers that one token is multiplied by; 0 where MLPs are dense."""
    used = 0
    for experts in list_experts(model):
        used += (experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()) * model.config.num_experts_per_tok
        used += experts.num_experts * experts.hidden_dim
    return used


def count_idle_bytes(model: Any) -> int:
    """Bytes of experts, as resident, that a pass over one token leaves alone; 0 where MLPs are dense."""
    idle = 0
    for experts in list_experts(model):
        chosen = int(model.config.num_experts_per_tok)
        idle += (experts.gate_up_proj[0].nbytes + experts.down_proj[0].nbytes) * (experts.num_experts - chosen)
    return idle


def compute_expert(experts: Any, states: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What one expert, of these matrices [2I, H] and [H, I], makes of states [N, H]."""
    gate, up = nn.functional.linear(states, gate_up).chunk(2, dim=-1)
    return nn.functional.linear(experts.act_fn(gate) * up, down)


@contextlib.contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Have experts compute one after the other inside: the fused form takes no float64 and evades autocast."""
    if not list_experts(model):
        yield
        return
    before = model.config._experts_implementation
    model.set_experts_implementation(EAGER)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def mixture_config(config: Any, experts: int, chosen: int) -> Any:
    """The configuration of a Llama as a mixture of so many experts, of which a token is sent to `chosen`.

    Raises `Unsupported` for any other architecture.
    """
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise Unsupported(f"a {config.model_type} cannot become a mixture of experts: only a Llama without biases can")
    shape = {name: getattr(config, name) for name in COPIED}
    shape |= {"num_local_experts": experts, "num_experts_per_tok": chosen, "sliding_window": None}
    return AutoConfig.for_model("mixtral", **shape)


@torch.no_grad()
def upcycle(dense: Any, config: Any) -> Any:
    """A mixture by `mixture_config` that computes what a Llama does: each MLP is copied into every expert of its block.

    The weights of the experts that a token is sent to are normed to a sum of 1, and all say the same (sparse upcycling,
    arXiv:2212.05055, with Mixtral's router, arXiv:2401.04088). Routers are drawn, the same each time.
    """
    mixture: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dense.dtype)
    state = dict(dense.state_dict())
    generator = torch.Generator().manual_seed(0)
    for name, tensor in mixture.state_dict().items():
        tensor.copy_(_grow(name, tensor, state, generator, config.initializer_range))
    mixture.tie_weights()
    mixture.generation_config = dense.generation_config
    return mixture.eval()


def _grow(name: str, tensor: Tensor, state: dict[str, Tensor], generator: torch.Generator, spread: float) -> Tensor:
    """What a tensor of the mixture holds, given those of the dense model."""
    block, _, part = name.partition(".mlp.")
    if part == "experts.gate_up_proj":
        parts = [state[f"{block}.mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
        return torch.cat(parts).expand_as(tensor)
    if part == "experts.down_proj":
        return state[f"{block}.mlp.down_proj.weight"].expand_as(tensor)
    if part == "gate.weight":
        return torch.randn(tensor.shape, generator=generator) * spread
    return state[name]
