"""One view over the decoder architectures of transformers: Llama family, Mixtral, OPT, GPT-2 and GPT-NeoX.

Whatever is not in the table below ends as `Unsupported`, never as a wrong number.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Unsupported
from effbench.core.views import SharedInput
from effbench.nn.model.linear import MaskedLinear, matrix_shape, top_linears

if TYPE_CHECKING:
    from effbench.core.run import Run


@dataclasses.dataclass(frozen=True)
class Names:
    """Where an architecture keeps its parts; paths inside a block unless said otherwise."""

    embedding: str  # path in the model
    blocks: str  # path in the model
    norm: str  # last norm, path in the model
    attention: str
    qkv: tuple[str, ...]  # three projections, or one fused
    out: str
    mlp: str
    up: tuple[str, ...]  # (gate, up), or the one first projection; none where MLPs are mixtures of experts
    down: str  # empty likewise
    norms: tuple[str, str]  # before attention, before the MLP
    activation: str | None = None  # path of what acts on the one of `up`; None: of two, the last is a factor
    width: str = "intermediate_size"  # where the configuration keeps the inner width of the MLPs
    interleaved: bool = False  # a fused projection holds q, k, v head by head, not all q, all k, all v
    positions: str = ""  # what is added to embeddings, path in the model; empty: nothing is
    before: tuple[str, ...] = ()  # what else stands between embeddings and blocks, paths in the model
    after: str = ""  # what stands behind the last norm, path in the model
    experts: str = ""  # the module that holds the weights of all experts; empty: MLPs are dense


_LLAMA = Names(
    embedding="model.embed_tokens",
    blocks="model.layers",
    norm="model.norm",
    attention="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.o_proj",
    mlp="mlp",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    norms=("input_layernorm", "post_attention_layernorm"),
)
_MIXTRAL = dataclasses.replace(_LLAMA, up=(), down="", experts="mlp.experts")
_OPT = Names(
    embedding="model.decoder.embed_tokens",
    blocks="model.decoder.layers",
    norm="model.decoder.final_layer_norm",
    attention="self_attn",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    mlp="",
    up=("fc1",),
    down="fc2",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    activation="activation_fn",
    width="ffn_dim",
    positions="model.decoder.embed_positions",
    before=("model.decoder.project_in",),
    after="model.decoder.project_out",
)
_GPT2 = Names(
    embedding="transformer.wte",
    blocks="transformer.h",
    norm="transformer.ln_f",
    attention="attn",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    mlp="mlp",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    norms=("ln_1", "ln_2"),
    activation="mlp.act",
    width="n_inner",
    positions="transformer.wpe",
    before=("transformer.drop",),
)
_NEOX = Names(
    embedding="gpt_neox.embed_in",
    blocks="gpt_neox.layers",
    norm="gpt_neox.final_layer_norm",
    attention="attention",
    qkv=("attention.query_key_value",),
    out="attention.dense",
    mlp="mlp",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    norms=("input_layernorm", "post_attention_layernorm"),
    activation="mlp.act",
    interleaved=True,
    before=("gpt_neox.emb_dropout",),
)
ARCHITECTURES: dict[str, Names] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mixtral": _MIXTRAL,
    "opt": _OPT,
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
}


def check_architecture(name: Any) -> None:
    """Raise `Unsupported` for a `model_type` that is not known here."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise Unsupported(f"architecture {name!r} is not one of {', '.join(ARCHITECTURES)}")


class Blocks:
    """The parts of a causal language model by their role. Raises `Unsupported` for an unknown architecture."""

    def __init__(self, model: nn.Module) -> None:
        kind = str(model.config.model_type)  # type: ignore[union-attr]
        check_architecture(kind)
        self.model = model
        self.names = ARCHITECTURES[kind]
        self.embedding = model.get_submodule(self.names.embedding)
        self.blocks: nn.ModuleList = model.get_submodule(self.names.blocks)  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def head(self) -> nn.Module:
        """The output embedding, hidden to vocabulary."""
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        return head

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """Top-most linears of all blocks, with their paths in the model."""
        for index, block in enumerate(self.blocks):
            yield from top_linears(block, f"{self.names.blocks}.{index}")

    def path(self, block: int, name: str) -> str:
        """Path in the model of a module inside a block."""
        return f"{self.names.blocks}.{block}.{name}"

    def number(self, path: str) -> int | None:
        """The block that the module at `path` is in, if it is in one."""
        inside = path.removeprefix(f"{self.names.blocks}.")
        return None if inside == path else int(inside.partition(".")[0])

    def role(self, path: str) -> str:
        """What the linear at `path` does in its block: q, k, v or qkv, o, gate, up, down."""
        names = self.names
        roles = dict(zip(names.qkv, ("qkv",) if len(names.qkv) == 1 else ("q", "k", "v"), strict=True))
        roles |= dict(zip(names.up, ("up",) if len(names.up) == 1 else ("gate", "up"), strict=False))
        roles |= {names.out: "o", names.down: "down"}
        return roles[path.removeprefix(f"{names.blocks}.").partition(".")[2]]

    def check_dense(self) -> None:
        """Raise `Unsupported` where weights of MLPs are no linears, and would be left out."""
        if self.names.experts:
            raise Unsupported(
                f"{self.path(0, self.names.experts)}: experts hold their weights in one tensor, and this step works "
                "linear by linear"
            )

    def shared_inputs(self, block: nn.Module) -> list[SharedInput]:
        """The block's linears in order of use, those that read one input together.

        Raises `Unsupported` for a mixture of experts.
        """
        self.check_dense()
        names = self.names
        before_attention, before_mlp = (block.get_submodule(name) for name in names.norms)
        config = self.model.config
        if not getattr(config, "do_layer_norm_before", True):  # OPT-350m norms the sum, so nothing absorbs a scale
            before_attention = before_mlp = None  # type: ignore[assignment]
        value = _if_matrix(block.get_submodule(names.qkv[-1])) if len(names.qkv) == 3 else None
        out = block.get_submodule(names.out)
        whole = not names.mlp or len(names.up) == 1
        up = _if_matrix(block.get_submodule(names.up[-1]))
        if names.activation is not None and not passes_scales(operator.attrgetter(names.activation)(block)):
            up = None
        return [
            SharedInput(names.qkv, _if_scalable(before_attention), block.get_submodule(names.attention)),
            SharedInput(
                (names.out,),
                value if value is not None and matrix_shape(value)[0] == matrix_shape(out)[1] else None,
                out,
            ),
            SharedInput(names.up, _if_scalable(before_mlp), block.get_submodule(names.up[0] if whole else names.mlp)),
            SharedInput((names.down,), up, block.get_submodule(names.down)),
        ]

    def renumber(self) -> None:
        """Make `layer_idx` and the configuration follow from the order of the blocks."""
        for index, block in enumerate(self.blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index  # type: ignore[assignment]
        config = self.model.config
        for name in ("num_hidden_layers", "n_layer"):
            if name in config.to_dict():  # type: ignore[union-attr, operator]
                setattr(config, name, len(self.blocks))


def count_heads(attention: nn.Module) -> tuple[int, int]:
    """Heads of keys and values of an attention module, and the width of each."""
    width = int(next(getattr(attention, name) for name in ("head_dim", "head_size") if hasattr(attention, name)))
    for name in ("k_proj", "v_proj"):
        if hasattr(attention, name):
            return matrix_shape(getattr(attention, name))[0] // width, width
    fused = next(getattr(attention, name) for name in ("c_attn", "query_key_value") if hasattr(attention, name))
    return matrix_shape(fused)[0] // ((getattr(attention, "num_key_value_groups", 1) + 2) * width), width


def project_keys(attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [heads, L, width] that an attention module makes of states [L, H], before it turns keys.

    Its linears are not called but asked: hooks on them see what the model reads.
    """
    heads, width = count_heads(attention)
    module: Any = attention
    if hasattr(attention, "k_proj"):
        keys, values = (proj.forward(hidden).view(-1, heads, width) for proj in (module.k_proj, module.v_proj))
        keys = module.k_norm(keys) if hasattr(attention, "k_norm") else keys
    elif hasattr(attention, "c_attn"):
        keys, values = module.c_attn.forward(hidden)[:, -2 * heads * width :].view(-1, 2, heads, width).unbind(1)
    else:
        by_head = module.query_key_value.forward(hidden).view(len(hidden), heads, -1, width)
        keys, values = by_head[:, :, -2:].unbind(2)
    return keys.transpose(0, 1), values.transpose(0, 1)


def dense_linears(run: Run) -> dict[str, nn.Module]:
    """The targeted linears by path. Raises `Unsupported` where one has no dense weights that could take a gradient."""
    linears = run.linears()
    for path, module in linears.items():
        if not isinstance(module, (nn.Linear, Conv1D, MaskedLinear)):
            raise Unsupported(f"{path}: gradients need dense weights; put this step first")
    return linears


@torch.no_grad()
def passes_scales(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether a positive factor of its inputs is one of its outputs, as that of ReLU is and that of GELU is not."""
    x = torch.linspace(-8, 8, 65)
    return all(torch.equal(activation(x * factor), activation(x) * factor) for factor in (2.0**-8, 2.0**8))


def _if_scalable(norm: nn.Module | None) -> nn.Module | None:
    """The norm if it has a weight that can absorb a scale per channel."""
    return norm if getattr(norm, "weight", None) is not None else None


def _if_matrix(module: nn.Module) -> nn.Module | None:
    """The module if its weight is a plain matrix that can be rescaled in place."""
    return module if isinstance(module, nn.Linear) else None


def count_positions(model: Any) -> int:
    """Positions that a model has, the most tokens that it can see."""
    return int(getattr(model.config, "max_position_embeddings", 2048))
