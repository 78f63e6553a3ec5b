"""Adapters in the format of PEFT: written for what PEFT has, and read.

LoRA: A [r, in] and B [out, r] by the path of the linear. Prompt tuning: embeddings [L, H]. Prefix tuning: keys and
values of all layers in one matrix [L, layers * 2 * heads * width], without the MLP that made them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effbench.core.errors import Unsupported, first_line
from effbench.core.usage import SOME
from effbench.nn.files.adapters import check_new, make_folder, place_part
from effbench.nn.files.artifact import build_class
from effbench.nn.model.adapters import add_part, choose_adapter, find_parts
from effbench.nn.model.attention import list_attention
from effbench.nn.model.blocks import Blocks, count_heads
from effbench.nn.model.feed import SOFT, SoftPrompt
from effbench.nn.model.linear import matrix_shape

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BEFORE = "base_model.model."  # the paths in PEFT's files
EMBEDDINGS = "prompt_embeddings"
TENSORS = {"LORA": r".*\.lora_[AB]\.weight", "PROMPT_TUNING": EMBEDDINGS, "PREFIX_TUNING": EMBEDDINGS}
# Of a configuration, what is read, and what is about making an adapter or finding its model. Anything else that is set
# changes what the adapter computes in a way that is not known here.
READ = (
    "auto_mapping base_model_name_or_path encoder_hidden_size eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core num_attention_heads "
    "num_layers num_transformer_submodules num_virtual_tokens peft_type peft_version prefix_projection "
    "prompt_tuning_init prompt_tuning_init_text qalora_group_size r revision target_modules task_type token_dim "
    "tokenizer_kwargs tokenizer_name_or_path use_rslora"
)
FROM_NOISE = (True, False, None, "gaussian", "eva", "orthogonal")  # starts that leave the model's weights as they are
LORA, PREFIX = "effbench.methods.peft.lora:LoRALinear", "effbench.methods.peft.prefix_tuning:Prefix"


def save_peft(model: Any, folder: Path, name: str) -> None:
    """Write the adapter of that name as PEFT does. Raises `Unsupported` for what PEFT has no format for,
    `FileExistsError` if the folder holds anything."""
    parts = dict(find_parts(model, name))
    kinds = {type(part) for part in parts.values()}
    if len(kinds) != 1:
        raise Unsupported(f"the adapter {name!r} has modules of {len(kinds)} kinds, and PEFT's files hold one")
    (kind,) = kinds
    if kind is build_class(LORA):
        tensors, config = _write_lora(parts)
    elif kind is SoftPrompt:
        (soft,) = parts.values()
        tensors, config = {EMBEDDINGS: soft.rows}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": soft.length}
    elif kind is build_class(PREFIX):
        tensors, config = _write_prefix(list(parts.values()))
    else:
        raise Unsupported(f"PEFT has no format for {kind.__name__}")
    make_folder(folder)
    whole = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True} | config
    if config["peft_type"] != "LORA":
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
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def load_peft(model: Any, folder: Path, name: str) -> None:
    """Put an adapter that PEFT has written on the model under a name, frozen, and choose it.

    Raises `Unsupported` for what is not read here, as a whole or in part, `Usage` for a name that another has.
    """
    check_new(model, name)
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise Unsupported(f"{folder.name}: is no adapter of PEFT ({first_line(error)})") from None
    read = {"LORA": _read_lora, "PROMPT_TUNING": _read_prompt, "PREFIX_TUNING": _read_prefix}
    kind = config.get("peft_type")
    if kind not in read:
        raise Unsupported(f"{folder.name}: peft_type {kind!r} is not one of {', '.join(read)}")
    plain = {"bias": ("none",), "init_lora_weights": FROM_NOISE}  # values under which these say no more
    told = [
        f"{key}={value!r}"
        for key, value in sorted(config.items())
        if (value not in plain[key] if key in plain else value and key not in READ.split())
    ]
    told += sorted(key for key in tensors if not re.fullmatch(TENSORS[kind], key))[:SOME]
    if told:
        raise Unsupported(f"{folder.name}: not read here of PEFT: {', '.join(told)}")
    read[kind](model, config, tensors, folder, name)
    choose_adapter(model, name)


def _write_lora(parts: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of LoRA; all its linears have one rank and scale."""
    settings = {(len(part.a), part.scaling, part.dropout) for part in parts.values()}
    if len(settings) != 1:
        raise Unsupported("the linears of the adapter have unlike ranks or scales")
    ((rank, scaling, dropout),) = settings
    tensors: dict[str, Tensor] = {}
    for path, part in parts.items():
        inside = f"{BEFORE}{path.replace('.base', '')}"
        tensors |= {f"{inside}.lora_A.weight": part.a, f"{inside}.lora_B.weight": part.b}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": sorted(path.replace(".base", "") for path in parts),
    }
    return tensors, config


def _read_lora(model: Any, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    rank = int(config["r"])
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    for key in sorted(tensors):
        path, _, which = key.removeprefix(BEFORE).rpartition(".lora_")
        if which != "A.weight":
            continue
        try:
            out, width = matrix_shape(model.get_submodule(path))
        except AttributeError:
            raise Unsupported(f"{folder.name}: the model has no {path}") from None
        settings = {"rank": rank, "scaling": scaling, "dropout": config.get("lora_dropout", 0.0), "masked": False}
        sizes = {"in_features": width, "out_features": out, "bias": False}
        part = place_part(model, path, build_class(LORA), settings | sizes, name, folder)
        _fill({part.a: tensors[key], part.b: tensors[key.replace("lora_A", "lora_B")]}, path, folder)


def _read_prompt(model: Any, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    rows = tensors[EMBEDDINGS]
    length, width = rows.shape
    part = SoftPrompt(length, width, adapter=name)
    _fill({part.rows: rows}, EMBEDDINGS, folder)
    add_part(model, SOFT, part.to(rows.device))


def _write_prefix(prefixes: list[Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    heads, length, width = prefixes[0].keys.shape
    both = [tensor for prefix in prefixes for tensor in (prefix.keys, prefix.values)]  # [heads, L, width] each
    matrix = torch.stack(both).permute(2, 0, 1, 3).reshape(length, len(both) * heads * width)
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": length, "prefix_projection": False}
    return {EMBEDDINGS: matrix}, config


def _read_prefix(model: Any, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, name: str) -> None:
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
        _fill({prefix.keys: parts[2 * number], prefix.values: parts[2 * number + 1]}, EMBEDDINGS, folder)
        add_part(module, "prefix", prefix)


@torch.no_grad()
def _fill(values: dict[nn.Parameter, Tensor], path: str, folder: Path) -> None:
    """Copy values into parameters, which are frozen. Raises `Unsupported` for another shape."""
    for parameter, value in values.items():
        if parameter.shape != value.shape:
            raise Unsupported(f"{folder.name}: {path} holds {list(value.shape)}, expected {list(parameter.shape)}")
        parameter.copy_(value)
        parameter.requires_grad_(False)
