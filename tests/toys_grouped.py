"""Toys whose heads of keys and values are written by hand, for tests of heads that are shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effbench.checks import TOYS, toy_run
from effbench.nn.run import ModelRun

FIELD = ("llama", "mistral", "qwen2", "qwen3", "mixtral")  # whose configuration can say how many keys there are
NO_FIELD = ("opt", "gpt2", "gpt_neox")
ALL = (*FIELD, *NO_FIELD)
SIZE = 16  # of a head


def make(architecture: str, heads: int, groups: int | None = None, seed: int = 5, **more: Any) -> ModelRun:
    """A toy run with so many heads of queries, of keys and of values, all its biases and norms drawn at random."""
    shape: dict[str, Any] = {"hidden_size": SIZE * heads, "num_attention_heads": heads} | more
    if architecture in FIELD:
        shape["num_key_value_heads"] = groups or heads
    if "head_dim" in TOYS[architecture]:
        shape["head_dim"] = SIZE
    if architecture == "opt":
        shape["word_embed_proj_dim"] = SIZE * heads
    run = toy_run(architecture, shape=shape)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif any(part in name for part in ("k_proj", "v_proj", "c_attn", "query_key_value", "q_proj")):
                parameter.mul_(6)  # attention that tells tokens apart
    return run


def change_heads(model: Any, change: Callable[[Tensor], None]) -> None:
    """Have `change` write heads of keys and of values, [heads, size, in], of every projection, and their biases."""

    def write(tensor: Tensor) -> None:  # rows are outputs
        change(tensor.view(tensor.shape[0] // SIZE, SIZE, -1))

    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        tensors = [module.weight.data, *([] if module.bias is None else [module.bias.data])] if last in PARTS else []
        for tensor in tensors:
            if last == "c_attn":  # [in, out], all q, all k, all v
                rows = tensor.T.contiguous()
                for part in rows.chunk(3)[1:]:
                    write(part)
                tensor.copy_(rows.T)
            elif last == "query_key_value":  # q, k, v of one head after those of another
                by_head = tensor.view(-1, 3, SIZE, *tensor.shape[1:])
                for place in (1, 2):
                    part = by_head[:, place].clone()
                    write(part.flatten(0, 1))
                    by_head[:, place] = part
            else:
                write(tensor)


PARTS = ("k_proj", "v_proj", "c_attn", "query_key_value")


def repeat(groups: int, which: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    """Every head of a contiguous group becomes what `which` says of the group, [groups, each, size, in]."""

    def change(heads: Tensor) -> None:
        each = len(heads) // groups
        heads.copy_(which(heads.reshape(groups, each, *heads.shape[1:])).repeat_interleave(each, 0))

    return change


def mean(groups: Tensor) -> Tensor:
    return groups.mean(1)


def first(groups: Tensor) -> Tensor:
    return groups[:, 0].clone()
