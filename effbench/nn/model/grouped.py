"""Attention in which several heads of queries share one of keys and values, in every architecture.

Llama's family has it by its configuration. The attention of OPT, GPT-2 and GPT-NeoX has as many heads of the one as of
the other; it becomes a class of ours, mixed into the original, of which it stays one. A fused projection keeps its
order: all queries, all keys, all values in GPT-2; in GPT-NeoX, group by group, the queries, their key and their value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.models.opt.modeling_opt import OPTAttention

from effbench.core.errors import Unsupported
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_bias, dense_weight, find_inner, put_matrix
from effbench.nn.model.structure import fused_rows, heads, require_dense, require_no_prefix


class Grouped(nn.Module):
    """Attention whose keys and values each serve `num_key_value_groups` consecutive heads of queries.

    The name is the one by which functions of transformers know how often a head is to be repeated.
    """

    num_key_value_groups: int
    config: Any
    layer_idx: Any
    scaling: float

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, Hq, D], keys and values [B, T, Hkv, D] of states [B, T, H]."""
        raise NotImplementedError

    def leave(self, attended: Tensor) -> Tensor:
        """[B, T, H] of what the heads give, [B, T, Hq x D]."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """Of a weight to be dropped in training."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (part.transpose(1, 2) for part in self.project(hidden_states))
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if layer_past is None else layer_past
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        chance = self.chance if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=chance, **kwargs)
        return self.leave(out.flatten(-2)), weights


class GroupedOPT(Grouped, OPTAttention):  # type: ignore[misc]
    """Attention of OPT."""

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = (linear(hidden).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = made
        return query, key, value

    def leave(self, attended: Tensor) -> Tensor:
        return cast(Tensor, self.out_proj(attended))

    @property
    def chance(self) -> float:
        return self.dropout


class GroupedGPT2(Grouped, GPT2Attention):  # type: ignore[misc]
    """Attention of GPT-2, not to an encoder."""

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = self.c_attn(hidden).unflatten(-1, (-1, self.head_dim))
        groups = fused.shape[-2] // (self.num_key_value_groups + 2)
        query, key, value = fused.split([groups * self.num_key_value_groups, groups, groups], -2)
        return query, key, value

    def leave(self, attended: Tensor) -> Tensor:
        return cast(Tensor, self.resid_dropout(self.c_proj(attended)))

    @property
    def chance(self) -> float:
        return float(self.attn_dropout.p)


class GroupedGPTNeoX(Grouped, GPTNeoXAttention):  # type: ignore[misc]
    """Attention of GPT-NeoX."""

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = self.query_key_value(hidden).unflatten(-1, (-1, self.num_key_value_groups + 2, self.head_size))
        return fused[..., :-2, :].flatten(-3, -2), fused[..., -2, :], fused[..., -1, :]

    def leave(self, attended: Tensor) -> Tensor:
        return cast(Tensor, self.dense(attended))

    @property
    def chance(self) -> float:
        return float(self.attention_dropout)


GROUPED: dict[type[nn.Module], type[Grouped]] = {
    OPTAttention: GroupedOPT,
    GPT2Attention: GroupedGPT2,
    GPTNeoXAttention: GroupedGPTNeoX,
}


def require_regroupable(view: Blocks, index: int) -> None:
    """Raise `Unsupported`, with the reason, unless keys and values of block `index` can become those of fewer heads."""
    require_dense(view, index, view.names.qkv[-2:])
    require_no_prefix(view, index)
    if getattr(view.model.config, "add_cross_attention", False):
        raise Unsupported(f"{view.names.blocks}: blocks that attend to an encoder keep their heads")


@torch.no_grad()
def regroup(view: Blocks, index: int, pool: Callable[[Tensor], Tensor]) -> None:
    """Leave block `index`, in place, the heads of keys and values that `pool` makes of those that it has.

    pool  of what projects to keys, or to values, [heads, D, in], and of its biases, [heads, D, 1], to fewer heads

    Raises `Unsupported` as `require_regroupable`; then nothing has changed.
    """
    require_regroupable(view, index)
    block, names, division = view.blocks[index], view.names, heads(view, index)

    def change(rows: Tensor) -> Tensor:
        """Rows [out, in] of keys or of values."""
        return pool(rows.unflatten(0, (division.groups, division.size))).flatten(0, 1)

    def change_fused(rows: Tensor) -> Tensor:
        """Rows [out, in] of a fused projection, in its order."""
        query, key, value = (rows[places] for places in fused_rows(view, index))
        key, value = change(key), change(value)
        if not names.interleaved:
            return torch.cat([query, key, value])
        key, value = (part.unflatten(0, (-1, division.size)) for part in (key, value))
        served = query.unflatten(0, (len(key), -1, division.size))
        return torch.cat([served, key[:, None], value[:, None]], 1).flatten(0, 2)

    turn = change_fused if len(names.qkv) == 1 else change
    made = []
    for name in names.qkv[-2:]:
        linear = block.get_submodule(name)
        bias = dense_bias(linear)
        made.append((linear, turn(dense_weight(linear)), None if bias is None else turn(bias[:, None])[:, 0]))
    for linear, weight, bias in made:
        put_matrix(linear, weight, bias)
    attention: Any = find_inner(block.get_submodule(names.attention))
    attention.__class__ = GROUPED.get(type(attention), type(attention))
    attention.num_key_value_groups = heads(view, index).share


def settle_groups(view: Blocks) -> None:
    """Have the configuration say how many heads of keys and values there are, if it can and all blocks are alike."""
    groups = {heads(view, index).groups for index in range(len(view))}
    config: Any = view.model.config
    if hasattr(config, "num_key_value_heads") and len(groups) == 1:
        config.num_key_value_heads = groups.pop()
