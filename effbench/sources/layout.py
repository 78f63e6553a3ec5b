"""Which tensors a model of a known architecture must have, and their shapes, as its configuration says.

What only transformers knows is left to it: further tensors, and sizes that a configuration leaves to their defaults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from effbench.core.errors import Unsupported
from effbench.core.usage import list_some
from effbench.sources.headers import Header

Size = int | None  # None: the configuration does not say
Shapes = dict[str, tuple[Size, ...]]  # by name of a tensor
PREFIX = re.compile(r"^(?:(?:model|transformer|decoder|gpt_neox)\.)+")  # which checkpoints have or leave out


class Sizes:
    """The sizes that a configuration gives, by name."""

    def __init__(self, file: str, values: Mapping[str, Any]) -> None:
        self.file = file
        self._values = values

    def find(self, *names: str) -> Size:
        """The first of these that is given. Raises `Unsupported` for one that is no size."""
        name = next((name for name in names if self._values.get(name) is not None), None)
        if name is None:
            return None
        value = self._values[name]
        if type(value) is not int or value < 1:
            raise Unsupported(f"{self.file}: {name} is {value!r}, must be a whole number from 1 up")
        return value


class Layout(NamedTuple):
    """The tensors of a model, named without the prefix that checkpoints may leave out."""

    count: Size  # of the blocks
    counted: str  # what the configuration calls it
    blocks: str  # what the names of blocks begin with, before their number
    outer: Shapes
    block: Shapes


def _llama(sizes: Sizes) -> Layout:
    return _gated(sizes, sizes.find("head_dim") or _split(sizes))


def _qwen3(sizes: Sizes) -> Layout:
    return _gated(sizes, sizes.find("head_dim"))


def _gated(sizes: Sizes, head: Size) -> Layout:
    width, inner = sizes.find("hidden_size"), sizes.find("intermediate_size")
    queries = _times(head, sizes.find("num_attention_heads"))
    keys = _times(head, sizes.find("num_key_value_heads"))
    block: Shapes = {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    outer: Shapes = {"embed_tokens.weight": (sizes.find("vocab_size"), width), "norm.weight": (width,)}
    return Layout(sizes.find("num_hidden_layers"), "num_hidden_layers", "layers", outer, block)


def _opt(sizes: Sizes) -> Layout:
    width, inner = sizes.find("hidden_size"), sizes.find("ffn_dim")
    square = {f"self_attn.{name}.weight": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    block: Shapes = square | {"fc1.weight": (inner, width), "fc2.weight": (width, inner)}
    outer: Shapes = {"embed_tokens.weight": (sizes.find("vocab_size"), sizes.find("word_embed_proj_dim"))}
    return Layout(sizes.find("num_hidden_layers"), "num_hidden_layers", "layers", outer, block)


def _gpt2(sizes: Sizes) -> Layout:
    width = sizes.find("n_embd", "hidden_size")
    inner = sizes.find("n_inner") or _times(4, width)
    block: Shapes = {  # transposed, as its linears are
        "attn.c_attn.weight": (width, _times(3, width)),
        "attn.c_proj.weight": (width, width),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_proj.weight": (inner, width),
        "ln_1.weight": (width,),
        "ln_2.weight": (width,),
    }
    places = sizes.find("n_positions", "max_position_embeddings")
    outer: Shapes = {"wte.weight": (sizes.find("vocab_size"), width), "wpe.weight": (places, width)}
    return Layout(sizes.find("n_layer", "num_hidden_layers"), "n_layer", "h", outer, block)


def _gpt_neox(sizes: Sizes) -> Layout:
    width, inner = sizes.find("hidden_size"), sizes.find("intermediate_size")
    block: Shapes = {
        "attention.query_key_value.weight": (_times(3, width), width),
        "attention.dense.weight": (width, width),
        "mlp.dense_h_to_4h.weight": (inner, width),
        "mlp.dense_4h_to_h.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    outer: Shapes = {"embed_in.weight": (sizes.find("vocab_size"), width), "final_layer_norm.weight": (width,)}
    return Layout(sizes.find("num_hidden_layers"), "num_hidden_layers", "layers", outer, block)


LAYOUTS: dict[str, Callable[[Sizes], Layout]] = {  # by `model_type`
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _qwen3,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
GGUF_SIZES = {  # after the architecture, by what configurations call them
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_hidden_layers": "block_count",
    "vocab_size": "vocab_size",
}
GGUF_NAMES = {  # of the tensors of gated architectures
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def check_architecture(name: Any) -> None:
    """Raise `Unsupported` unless effbench knows where the parts of this architecture are."""
    if name not in list(LAYOUTS):  # a list: what is no name may have no hash
        raise Unsupported(f"architecture {name!r} is not one of {', '.join(LAYOUTS)}")


def check_tensors(config: Mapping[str, Any], file: str, headers: Mapping[str, Header]) -> None:
    """Raise `Unsupported` unless a checkpoint has the tensors that its configuration, of this file, asks for."""
    check_architecture(config.get("model_type"))
    layout = LAYOUTS[config["model_type"]](Sizes(file, config))
    _compare(layout, file, {PREFIX.sub("", name): (name, header.shape) for name, header in headers.items()})


def check_gguf_tensors(metadata: Mapping[str, Any], file: str, headers: Mapping[str, Header]) -> None:
    """Raise `Unsupported` unless a GGUF file has the tensors that its own metadata asks for."""
    architecture = metadata.get("general.architecture")
    check_architecture(architecture)
    given = {name: metadata.get(f"{architecture}.{key}") for name, key in GGUF_SIZES.items()}
    given["vocab_size"] = given["vocab_size"] or len(metadata.get("tokenizer.ggml.tokens", ())) or None
    if architecture in ("llama", "mistral"):
        given["head_dim"] = metadata.get(f"{architecture}.rope.dimension_count")
    layout = LAYOUTS[architecture](Sizes(file, given))
    if not set(layout.block) <= {f"{name}.weight" for name in GGUF_NAMES}:
        return
    renamed = layout._replace(
        counted=f"{architecture}.block_count",
        blocks=GGUF_NAMES[layout.blocks],
        outer={_rename(name): shape for name, shape in layout.outer.items()},
        block={_rename(name): shape for name, shape in layout.block.items()},
    )
    _compare(renamed, file, {name: (name, header.shape) for name, header in headers.items()})


def _rename(name: str) -> str:
    return f"{GGUF_NAMES[name.removesuffix('.weight')]}.weight"


def _compare(layout: Layout, file: str, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise `Unsupported` where the tensors that were found, by short name, are not those of the layout."""
    inside = re.compile(rf"{layout.blocks}\.(\d+)\.")
    numbers = {int(match[1]) for match in map(inside.match, found) if match is not None}
    count = len(numbers) if layout.count is None else layout.count
    if len(numbers) != count:
        raise Unsupported(f"{file}: {layout.counted} is {count}, and the tensors are of {len(numbers)} blocks")
    expected = layout.outer | {
        f"{layout.blocks}.{number}.{name}": shape for number in range(count) for name, shape in layout.block.items()
    }
    if lacking := [name for name in expected if name not in found]:
        raise Unsupported(f"the files lack the tensors {list_some(lacking)}, which {file} asks for")
    for name, shape in expected.items():
        full, there = found[name]
        if len(there) != len(shape) or any(size not in (None, own) for size, own in zip(shape, there, strict=True)):
            asked = ", ".join("?" if size is None else str(size) for size in shape)
            raise Unsupported(f"{full} is [{', '.join(map(str, there))}], {file} asks for [{asked}]")


def _times(factor: Size, size: Size) -> Size:
    return None if factor is None or size is None else factor * size


def _split(sizes: Sizes) -> Size:
    """The width of a head where the configuration does not give it."""
    width, heads = sizes.find("hidden_size"), sizes.find("num_attention_heads")
    return None if width is None or heads is None else width // heads
