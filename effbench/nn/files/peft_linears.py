"""PEFT's formats of what stands beside linears: LoRA, rsLoRA, DoRA, VeRA, AdaLoRA and IA3.

Tensors are named by the path of their linear. Settings are those of the whole adapter, so that all its linears have the
same, but for the ranks that AdaLoRA has left them.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.nn.files.adapters import place_part, plain_path
from effbench.nn.files.artifact import build_class
from effbench.nn.model.linear import matrix_shape

BEFORE = "base_model.model."  # the paths in PEFT's files
PAIR = ("base_model.vera_A", "base_model.vera_B")  # what VeRA's linears share
LORA = {"lora_A.weight": "a", "lora_B.weight": "b"}


class Format(NamedTuple):
    """What PEFT calls a class of ours and its tensors."""

    kind: str  # the class
    type: str  # `peft_type`
    tensors: dict[str, str]  # our names by PEFT's, behind the path of the linear
    mark: str = ""  # the setting that tells it from others of its type


FORMATS = (  # of one type, the first whose mark is set
    Format("effbench.methods.peft.dora:DoRALinear", "LORA", LORA | {"lora_magnitude_vector": "m"}, "use_dora"),
    Format("effbench.methods.peft.rslora:RsLoRALinear", "LORA", LORA, "use_rslora"),
    Format("effbench.methods.peft._lowrank:LoRALinear", "LORA", LORA),
    Format("effbench.methods.peft.vera:VeRALinear", "VERA", {"vera_lambda_b": "b", "vera_lambda_d": "d"}),
    Format("effbench.methods.peft.adalora:SVDLinear", "ADALORA", {"lora_A": "q", "lora_E": "singular", "lora_B": "p"}),
    Format("effbench.methods.peft.ia3:IA3Linear", "IA3", {"ia3_l": "l"}),
)
READ = {  # settings that one type has and others have not
    "LORA": "use_dora",
    "VERA": "d_initial projection_prng_key save_projection vera_dropout",
    "IA3": "feedforward_modules init_ia3_weights",
    "ADALORA": "beta1 beta2 deltaT init_r orth_reg_weight rank_pattern target_r tfinal tinit total_step",
}


def format_of(kind: type[nn.Module]) -> Format | None:
    """The format of a class; None where PEFT has none."""
    return next((form for form in FORMATS if build_class(form.kind) is kind), None)


def format_named(config: dict[str, Any]) -> Format | None:
    """The format of a file by its configuration; None where it is none of these."""
    alike = (form for form in FORMATS if form.type == config.get("peft_type"))
    return next((form for form in alike if not form.mark or config.get(form.mark)), None)


def find_unread(form: Format, tensors: dict[str, Tensor]) -> list[str]:
    """Names of tensors that a format has not."""
    own = "|".join(map(re.escape, form.tensors))
    shared = "|".join(map(re.escape, PAIR)) if form.type == "VERA" else "(?!)"
    return sorted(key for key in tensors if not re.fullmatch(rf"{re.escape(BEFORE)}.+\.({own})|{shared}", key))


def write_linears(form: Format, parts: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of modules by path. Raises `Unsupported` for settings that are not alike."""
    linears = {plain_path(path): part for path, part in parts.items()}
    settings = [_tell(form, part) for part in linears.values()]
    if any(told != settings[0] for told in settings):
        raise Unsupported("the linears of the adapter have unlike ranks or scales")
    tensors = {
        f"{BEFORE}{path}.{theirs}": getattr(part, ours)
        for path, part in linears.items()
        for theirs, ours in form.tensors.items()
    }
    config = settings[0] | {"peft_type": form.type, "target_modules": sorted(linears)}
    if form.type == "IA3":  # vectors of outputs stand upright; those of a fused projection have queries in them
        inner = sorted(path for path, part in linears.items() if part.scales == "in")
        shapes = {path: (1, -1) if path in inner else (-1, 1) for path in linears}
        tensors = {f"{BEFORE}{path}.ia3_l": part.factor().view(shapes[path]) for path, part in linears.items()}
        return tensors, config | {"feedforward_modules": inner}
    config["bias"] = "none"
    if form.mark:
        config[form.mark] = True
    first = next(iter(linears.values()))
    if form.type == "VERA":
        tensors |= {key: matrix.clone() for key, matrix in zip(PAIR, (first.shared_a, first.shared_b), strict=True)}
    if form.type == "ADALORA":
        ranks = {f"{path}.lora_E": len(part.q) for path, part in linears.items()}
        config["target_r"] = round(sum(ranks.values()) / len(ranks))
        if set(ranks.values()) != {first.initial_rank}:
            config["rank_pattern"] = {
                path: [place < rank for place in range(first.initial_rank)] for path, rank in ranks.items()
            }
    return tensors, config


def read_linears(
    form: Format, model: Any, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path, name: str
) -> None:
    """Put what a file holds beside the linears that it names, frozen. Raises `Unsupported` where it does not fit."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        theirs = next((theirs for theirs in form.tensors if key.endswith(f".{theirs}")), None)
        if theirs is not None:
            path = key.removeprefix(BEFORE).removesuffix(f".{theirs}")
            found.setdefault(path, {})[form.tensors[theirs]] = tensor
    shapes = {}
    for path, own in found.items():
        lacking = sorted(set(form.tensors.values()) - own.keys())
        if lacking:
            theirs = next(theirs for theirs, ours in form.tensors.items() if ours == lacking[0])
            raise Unsupported(f"{folder.name}: {path} has no {theirs}")
        try:
            shapes[path] = matrix_shape(model.get_submodule(path))
        except AttributeError:
            raise Unsupported(f"{folder.name}: the model has no {path}") from None
    if form.type == "VERA":
        a, b = (tensors.get(key) for key in PAIR)
        height, width = (max(sizes) for sizes in zip(*shapes.values(), strict=True))
        config = config | {"width": width if a is None else a.shape[1], "height": height if b is None else len(b)}
    for path in sorted(found):
        out, width = shapes[path]
        settings = _settings(form, config, found[path]) | {"masked": False, "bias": False}
        sizes = {"in_features": width, "out_features": out}
        part = place_part(model, path, build_class(form.kind), settings | sizes, name, folder)
        if form.type == "IA3":
            found[path] = {"l": found[path]["l"].flatten()}
        fill({getattr(part, ours): tensor for ours, tensor in found[path].items()}, path, folder)
        for key, matrix in zip(PAIR, (part.shared_a, part.shared_b) if form.type == "VERA" else (), strict=False):
            if key in tensors and not torch.equal(tensors[key].to(matrix), matrix):
                raise Unsupported(
                    f"{folder.name}: {key} is not what projection_prng_key={config['projection_prng_key']} draws"
                )


def _tell(form: Format, part: Any) -> dict[str, Any]:
    """The settings of a module in PEFT's words."""
    if form.type == "VERA":
        seed, rank, _, _ = part.pair
        return {"r": rank, "projection_prng_key": seed, "save_projection": True, "vera_dropout": part.dropout}
    if form.type == "ADALORA":
        # The schedule is over: the shortest that PEFT takes, for none is read where nothing is trained.
        ranks = {"init_r": part.initial_rank, "lora_alpha": part.alpha, "lora_dropout": part.dropout}
        return ranks | {"total_step": 1, "tinit": 0, "tfinal": 0}
    if form.type == "IA3":
        return {}
    rank = len(part.a)
    alpha = part.scaling * (math.sqrt(rank) if form.mark == "use_rslora" else rank)
    return {"r": rank, "lora_alpha": round(alpha, 9), "lora_dropout": part.dropout}


def _settings(form: Format, config: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Any]:
    """What builds the module of a linear with these tensors."""
    if form.type == "VERA":
        numbers = {"seed": config["projection_prng_key"], "width": config["width"], "height": config["height"]}
        return numbers | {"rank": int(config["r"]), "dropout": config.get("vera_dropout", 0.0)}
    if form.type == "IA3":
        return {"scales": "in" if len(own["l"]) == 1 else "out"}
    dropout = config.get("lora_dropout", 0.0)
    if form.type == "ADALORA":
        ranks = {"rank": len(own["q"]), "initial_rank": int(config["init_r"])}
        return ranks | {"alpha": config["lora_alpha"], "dropout": dropout}
    rank = int(config["r"])
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return {"rank": rank, "scaling": scaling, "dropout": dropout}


@torch.no_grad()
def fill(values: dict[nn.Parameter, Tensor], path: str, folder: Path) -> None:
    """Copy values into parameters, which are frozen. Raises `Unsupported` for another shape."""
    for parameter, value in values.items():
        if parameter.shape != value.shape:
            raise Unsupported(f"{folder.name}: {path} holds {list(value.shape)}, expected {list(parameter.shape)}")
        parameter.copy_(value)
        parameter.requires_grad_(False)
