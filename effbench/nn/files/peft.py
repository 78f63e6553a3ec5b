"""Adapters in the format of PEFT: written for what PEFT has, and read.

What stands beside linears: see `effbench.nn.files.peft_linears`. Prompt tuning: embeddings [L, H]. Prefix tuning: keys
and values of all layers in one matrix [L, layers * 2 * heads * width], without the MLP that made them. LLaMA-Adapter:
prompts [1, L, H] and one gate for each of the upper layers of Llama and Mistral (to GPT-2 PEFT adds the prompts' part
behind the output projection). PEFT names the model by `base_model_name_or_path`; how it is quantized stands in the
metadata of the tensors, which PEFT leaves alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from effbench.core.errors import Unsupported, first_line
from effbench.core.usage import SOME
from effbench.nn.files.adapters import check_new, make_folder
from effbench.nn.files.artifact import build_class
from effbench.nn.files.base import Base, check_base, describe_base
from effbench.nn.files.peft_linears import (
    BEFORE,
    fill,
    find_unread,
    format_named,
    format_of,
    read_linears,
    write_linears,
)
from effbench.nn.files.peft_linears import READ as READ_OF_TYPE
from effbench.nn.model.adapters import add_part, choose_adapter, find_parts
from effbench.nn.model.attention import list_attention
from effbench.nn.model.blocks import Blocks, count_heads
from effbench.nn.model.feed import SOFT, SoftPrompt

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EMBEDDINGS = "prompt_embeddings"
QUANTIZED = "effbench.quantized"  # in the metadata of the tensors
# Of a configuration, what is read, and what is about making an adapter or finding its model. Anything else that is set
# changes what the adapter computes in a way that is not known here.
READ = (
    "adapter_layers adapter_len auto_mapping base_model_name_or_path encoder_hidden_size eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_weights layers_pattern layers_to_transform lora_alpha "
    "lora_dropout megatron_core num_attention_heads num_layers num_transformer_submodules num_virtual_tokens "
    "peft_type peft_version prefix_projection prompt_tuning_init prompt_tuning_init_text qalora_group_size r "
    "revision target_modules task_type token_dim tokenizer_kwargs tokenizer_name_or_path use_rslora"
)
FROM_NOISE = (True, False, None, "gaussian", "eva", "orthogonal")  # starts that leave the model's weights as they are
PREFIX, GATED = "effbench.methods.peft._prefix:Prefix", "effbench.methods.peft.llama_adapter:GatedPrompts"
ADAPTION = {"adaption_prompt": "prompts", "adaption_gate": "gate"}  # our names by PEFT's, behind the path of the layer
ADAPTED = ("llama", "mistral")


def save_peft(model: Any, folder: Path, name: str) -> None:
    """Write the adapter of that name as PEFT does. Raises `Unsupported` for what PEFT has no format for,
    `FileExistsError` if the folder holds anything."""
    parts = dict(find_parts(model, name))
    kinds = {type(part) for part in parts.values()}
    if len(kinds) != 1:
        raise Unsupported(f"the adapter {name!r} has modules of {len(kinds)} kinds, and PEFT's files hold one")
    (kind,) = kinds
    form, base = format_of(kind), describe_base(model)
    if form is not None:
        tensors, config = write_linears(form, parts)
    elif kind is SoftPrompt:
        (soft,) = parts.values()
        tensors, config = {EMBEDDINGS: soft.rows}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": soft.length}
    elif kind is build_class(PREFIX):
        if getattr(model.config, "sliding_window", None) is not None:
            raise Unsupported("attention slides: in PEFT it would leave prefixes behind, which stay in sight here")
        tensors, config = _write_prefix(list(parts.values()))
    elif kind is build_class(GATED):
        tensors, config = _write_gated(model, list(parts.values()))
    else:
        raise Unsupported(f"PEFT has no format for {kind.__name__}")
    make_folder(folder)
    whole = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base.name or None, "inference_mode": True} | config
    if kind in (SoftPrompt, build_class(PREFIX)):
        view = Blocks(model)
        heads, width = model.config.num_attention_heads, model.config.hidden_size
        if kind is not SoftPrompt:  # prefixes are as wide as keys
            heads, each = count_heads(list_attention(model)[0])
            width = heads * each
        whole |= {
            "token_dim": width,
            "num_layers": len(view),
            "num_attention_heads": heads,
            "num_transformer_submodules": 1,
        }
    stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(stored, folder / WEIGHTS, {"format": "pt", QUANTIZED: json.dumps(base.quantized)})
    (folder / CONFIG).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def load_peft(model: Any, folder: Path, name: str) -> None:
    """Put an adapter that PEFT has written on the model under a name, frozen, and choose it.

    Raises `Unsupported` for what is not read here, as a whole or in part, `Refused` where it was trained on another
    model or on one quantized otherwise, `Usage` for a name that another has.
    """
    check_new(model, name)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            quantized = (file.metadata() or {}).get(QUANTIZED)
        base = Base(config.get("base_model_name_or_path") or "")
        base.quantized = describe_base(model).quantized if quantized is None else msgspec.json.decode(quantized)
    except (OSError, ValueError, SafetensorError) as error:
        raise Unsupported(f"{folder.name}: is no adapter of PEFT ({first_line(error)})") from None
    kind, form = config.get("peft_type"), format_named(config)
    soft = {"PROMPT_TUNING": _read_prompt, "PREFIX_TUNING": _read_prefix, "ADAPTION_PROMPT": _read_gated}
    if form is None and kind not in soft:
        known = ", ".join([*READ_OF_TYPE, *soft])
        raise Unsupported(f"{folder.name}: peft_type {kind!r} is not one of {known}")
    plain = {"bias": ("none",), "init_lora_weights": FROM_NOISE}  # values under which these say no more
    read = {*READ.split(), *READ_OF_TYPE.get(kind, "").split()}
    told = [
        f"{key}={value!r}"
        for key, value in sorted(config.items())
        if (value not in plain[key] if key in plain else value and key not in read)
    ]
    if form is not None:
        unread = find_unread(form, tensors)
    else:
        own = r".+\.(" + "|".join(ADAPTION) + ")" if kind == "ADAPTION_PROMPT" else EMBEDDINGS
        unread = sorted(key for key in tensors if not re.fullmatch(own, key))
    told += unread[:SOME]
    if told:
        raise Unsupported(f"{folder.name}: not read here of PEFT: {', '.join(told)}")
    check_base(model, base, folder.name)
    if form is not None:
        read_linears(form, model, config, tensors, folder, name)
    else:
        soft[kind](model, tensors, folder, name)
    choose_adapter(model, name)


def _read_prompt(model: Any, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    rows = tensors[EMBEDDINGS]
    length, width = rows.shape
    part = SoftPrompt(length, width, adapter=name)
    fill({part.rows: rows}, EMBEDDINGS, folder)
    add_part(model, SOFT, part.to(rows.device))


def _write_prefix(prefixes: list[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    heads, length, width = prefixes[0].keys.shape
    both = [tensor for prefix in prefixes for tensor in (prefix.keys, prefix.values)]  # [heads, L, width] each
    matrix = torch.stack(both).permute(2, 0, 1, 3).reshape(length, len(both) * heads * width)
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, "prefix_projection": False}
    return {EMBEDDINGS: matrix}, config


def _read_prefix(model: Any, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    matrix = tensors[EMBEDDINGS]
    attention = list_attention(model)
    heads, width = count_heads(attention[0])
    if matrix.shape[1] != 2 * len(attention) * heads * width:
        raise Unsupported(
            f"{folder.name}: {matrix.shape[1]} columns do not fit {len(attention)} layers of {heads} heads"
        )
    parts = matrix.view(len(matrix), 2 * len(attention), heads, width).permute(1, 2, 0, 3)
    for number, module in enumerate(attention):
        prefix: Any = build_class(PREFIX)(len(matrix), heads, width, name)
        fill({prefix.keys: parts[2 * number], prefix.values: parts[2 * number + 1]}, EMBEDDINGS, folder)
        add_part(module, "prefix", prefix)


def _attention_paths(model: Any) -> list[str]:
    """The attention modules of all blocks. Raises `Unsupported` where PEFT has no LLaMA-Adapter."""
    if model.config.model_type not in ADAPTED:
        raise Unsupported(f"PEFT has LLaMA-Adapter for {' and '.join(ADAPTED)}, not for {model.config.model_type}")
    view = Blocks(model)
    return [view.path(block, view.names.attention) for block in range(len(view))]


def _write_gated(model: Any, parts: list[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    paths = _attention_paths(model)[-len(parts) :]
    if parts[0].heads:
        raise Unsupported("PEFT has one gate for all heads, without tanh: llama_adapter(gate='scalar')")
    own = {f"{BEFORE}{path}.": part for path, part in zip(paths, parts, strict=True)}
    tensors = {f"{path}adaption_gate": part.gate for path, part in own.items()}
    tensors |= {f"{path}adaption_prompt": part.prompts[None] for path, part in own.items()}
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": len(parts[0].prompts), "adapter_layers": len(parts)}
    return tensors, config | {"target_modules": paths[0].rpartition(".")[2]}


def _read_gated(model: Any, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    paths = _attention_paths(model)
    upper = paths[-(len(tensors) // len(ADAPTION)) :]
    if tensors.keys() != {f"{BEFORE}{path}.{theirs}" for path in upper for theirs in ADAPTION}:
        raise Unsupported(f"{folder.name}: its layers are not the {len(upper)} upper ones of {len(paths)}")
    for path in upper:
        own = {ours: tensors[f"{BEFORE}{path}.{theirs}"] for theirs, ours in ADAPTION.items()}
        _, length, hidden = own["prompts"].shape
        part: Any = build_class(GATED)(length, hidden, 0, name)
        fill({part.prompts: own["prompts"][0], part.gate: own["gate"]}, path, folder)
        add_part(model.get_submodule(path), "llama_adapter", part.to(own["gate"].device))
