"""Memory: what the artifact occupies, and what scoring and generating need beyond the resident model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effbench.machine.peak import SCOPES, PeakMemory
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.held import count_bytes
from effbench.nn.model.linear import Replaced, Storage, stored_as, stored_bytes, top_linears
from effbench.nn.model.sparsity import measure_sparsity
from effbench.probes import Reading
from effbench.probes.inputs import random_ids, score_block, slow
from effbench.records.metric import Finding

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun


SEES = {"weights", "cache", "attention", "prompt", "decoder"}

BATCH, CONTEXT, NEW_TOKENS = 4, 256, 16  # where the settings do not say


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """Stored bytes by kind, bits per weight, shares of zeros, resident bytes, and peaks over what was resident."""
    reading = Reading()
    stored = stored_bytes(run.model, run.storage)
    kept_in = f"as saved, dense tensors in {str(run.storage).replace('torch.', '')}, tied tensors once"
    total, original = sum(stored), run.original.stored_bytes
    reading.add("weight_bytes", stored.weights, kept_in)
    reading.add("metadata_bytes", stored.metadata, f"scales, zero-points, indices, masks; {kept_in}")
    reading.add("stored_bytes", total, kept_in)
    reading.add("reference_bytes", original, f"the unchanged model {kept_in}")
    reading.add("compression", original / total, "reference_bytes / stored_bytes")
    over = "of the compressed linears, or of all but the head where none is"
    bits, findings = bits_per_weight(run.model, run.storage)
    reading.add("bits_per_weight", bits, f"weights and metadata {over}, without biases", findings)
    reading.add(
        "model_bits_per_weight", 8 * total / run.original.parameters, "all stored bytes over the reference's parameters"
    )
    sparsity = measure_sparsity(run.model)
    reading.add("sparsity", sparsity.linears, "exact zeros of the matrices of all linears but the head")
    reading.add(
        "model_sparsity", sparsity.model, "exact zeros of all parameters, linears by their matrices, tied ones once"
    )
    if run.log.sparsity_asked is not None:
        reading.add("sparsity_asked", run.log.sparsity_asked, "the largest that a step of the recipe was asked for")
    reading.add("resident_bytes", resident_bytes(run.model), "all tensors of the model as held for computing")
    _peaks(run, settings, reading)
    return reading


def bits_per_weight(model: nn.Module, storage: torch.dtype | Storage) -> tuple[float, dict[str, Finding]]:
    """Stored bits per weight of the replaced linears (where none is, of all but the head); and how many they are."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [module for _, module in top_linears(model) if module is not head]
    replaced = [module for module in linears if isinstance(module, Replaced)]
    chosen = replaced or linears
    size = sum(sum(stored_bytes(module, storage)) - _bias_bytes(module, storage) for module in chosen)
    bits = 8 * size / sum(elements(module) for module in chosen)
    return bits, {"linears": len(chosen), "compressed": bool(replaced)}


def elements(linear: nn.Module) -> int:
    """Entries of the matrix that a linear, replaced or not, multiplies by."""
    if isinstance(linear, Replaced):
        return linear.in_features * linear.out_features
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.numel()


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all distinct tensors of a model as they lie in memory."""
    return count_bytes(tensors(model))


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, the ones that are not saved among them."""
    yield from model.parameters()
    yield from model.buffers()


def _bias_bytes(module: nn.Module, storage: torch.dtype | Storage) -> int:
    bias = getattr(module, "bias", None)
    return bias.numel() * stored_as("bias", bias, storage).itemsize if isinstance(bias, Tensor) else 0


def _peaks(run: ModelRun, settings: Mapping[str, Any], reading: Reading) -> None:
    engine = open_engine(run)
    batch = settings.get("memory_batch") or (1 if slow(run) else BATCH)
    new = min(settings.get("memory_new_tokens") or (2 if slow(run) else NEW_TOKENS), engine.max_length // 2)
    context = min(settings.get("memory_context") or CONTEXT, engine.max_length - new)
    prompts = random_ids(run, batch, context).tolist()
    block, spelled = score_block(run, settings)
    first = 1 if block is None else context // 2
    with torch.inference_mode():
        engine.score(
            [(prompts[0][:1], prompts[0][1:])], block=block
        )  # pages in what is mapped and compiles what is lazy
        with PeakMemory(run.device) as scoring:
            engine.score([(prompt[:first], prompt[first:]) for prompt in prompts], block, batch * context)
        with PeakMemory(run.device) as generating:
            engine.generate(prompts, new, set())
    shape = f"batch {batch}, context {context}, random tokens; high-water mark minus start, models resident"
    for verb, peak, what in (
        ("score", scoring, f"one batch scored, {spelled} after {first}, {shape}"),
        ("generate", generating, f"{new} tokens generated, {shape}"),
    ):
        for kind, value in peak.bytes.items():
            reading.add(f"{verb}_peak_{kind}_bytes", value, f"{what}; {SCOPES[kind]}")
