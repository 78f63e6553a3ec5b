"""What a recipe would leave on a model and hold while it trains, in bytes, found without the model's weights.

The recipe runs as it is, on a model that has shapes and no values (`effbench.nn.hollow`): what it replaces, freezes and
trains is replaced, frozen and trained there, fits take two steps on a full batch, and the meter of fits counts as ever.
No method is known by name, and a new one is foreseen without another line.

Compressing linears takes values. It runs beside it on a small model of the same make with random weights: same
architecture, a few heads, two blocks. What that leaves in the place of a linear, its class and its configuration, is
put in the place of the linear of that role in the hollow model, at that one's size. Numbers in a configuration that
differ between linears of the small model are counts (of weights that are stored one by one) and grow with the matrix.

All blocks of a model are alike, so that a few stand for all: bytes found with two and with three blocks are carried on
to the depth of the model if they foretell those found with five, and else the whole depth is gone through.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.core.kinds import kind_of
from effbench.core.method import Method
from effbench.core.views import Example
from effbench.nn.data import Data
from effbench.nn.hollow import hollow
from effbench.nn.infer.cache import SlotCache
from effbench.nn.model.blocks import Blocks, count_heads
from effbench.nn.model.held import count_bytes
from effbench.nn.model.linear import Replaced, Storage, matrix_dtype, matrix_shape, replace, stored_bytes
from effbench.nn.run import ModelRun
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.slots import Parallel, Shares

if TYPE_CHECKING:
    from effbench.core.run import FitReport
    from effbench.sources import Source

STEPS = 2  # of each fit: the first makes the optimizer's states, the second is looked into
DEPTHS = (2, 3, 5)  # blocks that stand for all
SMALL = {"hidden_size": 512, "num_attention_heads": 8, "vocab_size": 512, "width": 1024}  # of the small model, at most
BESIDE = ("Select", "Prompt")  # kinds that change neither weights nor caches


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a fit reads in one step; None: as its step in the recipe says."""

    batch: int | None = None  # examples, over all ranks
    context: int | None = None  # tokens of each


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe's steps on a model of a configuration, which computes in `dtype`."""

    source: Source
    config: Any
    storage: torch.dtype | Storage  # in which an artifact keeps dense parameters
    dtype: torch.dtype
    steps: Sequence[Method]
    batch: Batch  # what a step of its fits reads, dealt out to the processes of the engine
    cached: Batch  # what is in the cache when it generates
    engine: Parallel
    skip: tuple[str, ...] = ()  # patterns of linears that methods leave alone


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one process by what holds them."""

    opened: int = 0  # the model before the recipe
    weights: int = 0  # of the model in training, the last fit's, with what decodes packed ones
    constants: int = 0  # of these what only decodes: scales, zero-points, indices, masks
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0  # that one forward pass saves
    teachers: int = 0  # other models that are there in training
    resident: int = 0  # the model after the recipe, as it computes
    stored: int = 0  # in an artifact
    stored_constants: int = 0  # of these what only decodes
    cache: int = 0  # keys and values at batch and context
    trained: int = 0  # numbers that the fit trains
    parameters: int = 0  # numbers of the model before the recipe

    @property
    def training(self) -> int:
        """All that is held at the end of a forward pass in training."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.teachers

    @property
    def generating(self) -> int:
        """All that is held while it generates."""
        return self.resident + self.cache


class Rows(Data):
    """As many rows of as many tokens as are asked for, which mean nothing."""

    def __init__(self, number: int, length: int) -> None:
        super().__init__("rows of one token", {}, None, made=True)
        self.pool = [Example(str(i), (1,) * length) for i in range(number)]
        self.validation = list(self.pool)

    def calibration(self, sequences: int, length: int, seed: int) -> Tensor:
        return torch.ones(min(sequences, 4), min(length, 64), dtype=torch.int64)


class Rehearsal(ModelRun):
    """A run on a hollow model."""

    hollow = True
    sampled: dict[str, nn.Module]  # what the small model has where linears stood, by role

    def serve(self, method: Method) -> None:
        if kind_of(type(method)) == "Weights":
            self.settle()
            self.take_over(self.linears())
        else:
            super().serve(method)

    def take_over(self, linears: dict[str, nn.Module]) -> None:
        """Put in the place of linears what the small model has there, at their size."""
        view = Blocks(self.model)
        for path, module in linears.items():
            sample = self.sampled.get(view.role(path))
            if isinstance(sample, Replaced):
                replace(self.model, path, inflate(sample, matrix_shape(module), self.sampled.values()))

    def teachers(self) -> list[nn.Module]:
        """The other models that are there."""
        return [*([self.reference] if "reference" in vars(self) else []), *(model for model, _ in self._shelf.values())]


def inflate(sample: Replaced, shape: tuple[int, int], others: Any) -> nn.Module:
    """A hollow module like `sample`, a real one, for a matrix of this shape [out, in]."""
    config, growth = sample.config(), shape[0] * shape[1] / (sample.in_features * sample.out_features)
    alike = [other.config() for other in others if type(other) is type(sample)]
    for key, value in config.items():
        if type(value) is int and any(other.get(key) != value for other in alike):
            config[key] = round(value * growth)
    module = type(sample)(**config | {"out_features": shape[0], "in_features": shape[1]})
    pairs: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        (sample._parameters, module._parameters),
        (sample._buffers, module._buffers),
    )
    for kept, made in pairs:
        for name, tensor in kept.items():
            if tensor is not None and tensor.dtype is not made[name].dtype:
                made[name] = made[name].to(tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made[name] = nn.Parameter(made[name].detach(), tensor.requires_grad)
    return module


def make_case(
    source: Source,
    steps: Sequence[Method],
    dtype: torch.dtype | None = None,
    batch: Batch = Batch(),
    engine: Method | None = None,
    skip: tuple[str, ...] = (),
) -> Case:
    """The rehearsal of a recipe's steps on a model, computing in `dtype`, by default as stored.

    engine  that processes divide the model by, instead of that of the steps
    Raises as `open_run`, and `Unsupported` for a model that is packed already.
    """
    from effbench.nn.files import artifact
    from effbench.nn.files.load import describe_model

    config, _, storage = describe_model(source)
    if source.path is not None and (source.path / artifact.CONFIG).is_file():
        raise Unsupported("the model is packed already: name what it was made of, and the recipe")
    engine = (
        next((step for step in reversed(steps) if "train.parallel" in step.slots()), None) if engine is None else engine
    )
    parallel = None if engine is None else engine.slot_values().get("parallel", engine)
    fit = next((step for step in reversed(steps) if isinstance(step, FitSettings)), None)
    cached = Batch(
        batch.batch or (1 if fit is None else fit.batch_size), batch.context or (512 if fit is None else fit.max_length)
    )
    return Case(
        source,
        config,
        storage,
        matrix_dtype(storage) if dtype is None else dtype,
        steps,
        batch,
        cached,
        parallel if isinstance(parallel, Parallel) else Parallel(),
        skip,
    )


def rehearse(case: Case) -> Held:
    """Bytes that the steps hold. Raises as a run of the recipe would."""
    find = functools.partial(_find, case, _sample(case))
    depth = int(case.config.num_hidden_layers)
    if depth > max(DEPTHS):
        with contextlib.suppress(Unsupported):  # of a step that names more blocks than these
            two, three, five = (dataclasses.astuple(find(blocks)) for blocks in DEPTHS)
            if all(
                math.isclose(f - t, (DEPTHS[2] - DEPTHS[1]) * (t - s)) for s, t, f in zip(two, three, five, strict=True)
            ):
                return Held(*(round(s + (depth - DEPTHS[0]) * (t - s)) for s, t in zip(two, three, strict=True)))
    return Held(*map(round, dataclasses.astuple(find(depth))))


def _find(case: Case, sampled: Sequence[dict[str, nn.Module]], depth: int) -> Held:
    """As `rehearse`, with so many blocks; bytes that are divided may be fractions."""
    with hollow():
        run = _open(Rehearsal, case, _deepen(case.config, depth), case.batch)
        assert isinstance(run, Rehearsal)
        found = Held(opened=_hold(run.model), parameters=run.original.parameters)
        case.engine.check_run(run)
        examples = _divide(case.engine, run.model).examples
        try:
            for step, samples in zip(case.steps, sampled, strict=False):
                run.sampled = samples
                if step.consumes:
                    case.engine.check_run(run)
                if _counts(step):
                    run.apply(_shorten(step, case.batch, examples))
                if step.consumes and run.log.fits:
                    found = dataclasses.replace(found, **_measure_fit(run, run.log.fits[-1], case.engine))
            run.sampled = sampled[-1] if sampled else {}
            run.settle()
            view = Blocks(run.model)
            packed = {p: m for p, m in view.linears() if isinstance(m, Replaced)}
            run.take_over({p: m for p, m in packed.items() if type(m) is not type(run.sampled.get(view.role(p)))})
            run.finish(recipe_is_empty=True)
            stored = stored_bytes(run.model, case.storage)
            found = dataclasses.replace(
                found, resident=_hold(run.model), stored=sum(stored), stored_constants=stored.metadata
            )
            shapes = [count_heads(block.get_submodule(view.names.attention)) for block in view.blocks]
            plan, run.infer = run.infer, type(run.infer)()  # which outlives the rehearsal
            kept = run.model.dtype
        finally:
            run.close()
    return dataclasses.replace(found, cache=_fill_cache(plan, shapes, case.cached, kept))


def _divide(engine: Parallel, model: nn.Module) -> Shares:
    shares = engine.shares(model)
    if shares is None:
        raise Unsupported(f"how {engine} divides a model is not foreseen")
    return shares


def _measure_fit(run: Rehearsal, report: FitReport, engine: Parallel) -> dict[str, Any]:
    """What one process holds in a fit; engines divide parameters, and no buffers."""
    cost, shares = report["cost"], _divide(engine, run.model)
    return {
        "weights": cost["buffer_bytes"] + cost["parameter_bytes"] / shares.parameters,
        "constants": stored_bytes(run.model, run.storage).metadata,
        "gradients": cost["gradient_bytes"] / shares.gradients,
        "optimizer": cost["optimizer_bytes"] / shares.optimizer,
        "activations": cost.get("activation_bytes", 0) / shares.activations,
        "teachers": sum(map(_hold, run.teachers())),
        "trained": sum(group["parameters"] for group in report["groups"]),
    }


def _sample(case: Case) -> list[dict[str, nn.Module]]:
    """What a small model has in the place of its linears after each step and at the end, by role."""
    if not any(kind_of(type(step)) == "Weights" for step in case.steps):
        return [{} for _ in range(len(case.steps) + 1)]
    batch = Batch(2, 16)
    run = _open(ModelRun, case, _shrink(case.config), batch)
    found = []
    try:
        for step in case.steps:
            # What cannot be done to a model as small as this one, with fewer heads and blocks, may well be done to the
            # model itself: that is found out there.
            with contextlib.suppress(Unsupported) if kind_of(type(step)) == "apply" else contextlib.nullcontext():
                if _counts(step):
                    run.apply(_shorten(step, batch, 1))
            found.append(_list_roles(run.model))
        run.finish(recipe_is_empty=True)
        found.append(_list_roles(run.model))
    finally:
        run.close()
    return found


def _list_roles(model: nn.Module) -> dict[str, nn.Module]:
    view = Blocks(model)
    return {view.role(path): copy.deepcopy(module) for path, module in view.linears() if isinstance(module, Replaced)}


def _open(kind: type[ModelRun], case: Case, config: Any, batch: Batch) -> ModelRun:
    """A run on random weights, hollow or not."""
    from effbench.nn.files.load import build_random

    device = torch.device("cpu")
    build = functools.partial(build_random, config, device, case.dtype)
    fits = [_shorten(step, batch, 1) for step in case.steps if isinstance(step, FitSettings)]
    number = max((STEPS * fit.batch_size for fit in fits), default=2)
    length = min(int(config.max_position_embeddings), max((fit.max_length for fit in fits), default=64))
    rows = Rows(number, length)
    return kind(case.source, build(), build, None, rows, device=device, storage=case.storage, length=64, skip=case.skip)


def _shorten(step: Any, batch: Batch, examples: int) -> Any:
    """A step that fits, as far as it takes to see what it holds: on what one of so many processes reads."""
    if not isinstance(step, FitSettings):
        return step
    size = -(-(batch.batch or step.batch_size) // examples)
    return dataclasses.replace(
        step,
        steps=STEPS,
        lr=step.rates[0],
        batch_size=size,
        accumulate=min(step.accumulate, size),
        max_length=batch.context or step.max_length,
        validate=None,
    )


def _counts(step: Method) -> bool:
    """Whether a step bears on what is held by one process; engines say themselves how they divide it."""
    return kind_of(type(step)) not in BESIDE and "train.parallel" not in step.slots()


def _deepen(config: Any, depth: int) -> Any:
    """The configuration with so many blocks."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    return config


def _shrink(config: Any) -> Any:
    """The configuration of a small model of the same make."""
    config = _deepen(config, min(2, int(config.num_hidden_layers)))
    heads, groups = int(config.num_attention_heads), getattr(config, "num_key_value_heads", None)
    if int(config.hidden_size) > SMALL["hidden_size"]:
        few = SMALL["num_attention_heads"]
        config.hidden_size = SMALL["hidden_size"]
        config.num_attention_heads = few
        if groups is not None:
            config.num_key_value_heads = max(1, few * groups // heads)
        if getattr(config, "head_dim", None):
            config.head_dim = config.hidden_size // few
        if hasattr(config, "word_embed_proj_dim"):
            config.word_embed_proj_dim = config.hidden_size
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if type(getattr(config, name, None)) is int:
            setattr(config, name, min(getattr(config, name), SMALL["width"]))
    config.vocab_size = min(int(config.vocab_size), SMALL["vocab_size"])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # rows of the embedding, of which there are fewer
        if type(getattr(config, name, None)) is int:
            setattr(config, name, min(getattr(config, name), config.vocab_size - 1))
    return config


def _hold(model: nn.Module) -> int:
    return count_bytes([*model.parameters(), *model.buffers()])


@torch.no_grad()
def _fill_cache(plan: Any, shapes: Sequence[tuple[int, int]], cached: Batch, dtype: torch.dtype) -> int:
    """Bytes of the caches of all blocks, of `shapes` (heads, width), under a plan that is then closed.

    One row of one block holds random keys and values; rows are independent, and so are blocks of equal shape.
    """
    rows, tokens = cached.batch or 1, cached.context or 1
    generator = torch.Generator().manual_seed(0)
    each: dict[tuple[int, int], int] = {}
    for heads, width in dict.fromkeys(shapes):
        cache = SlotCache(1, plan)
        layer: Any = cache.slot_layers[0]
        for count in (tokens - 1, 1) if tokens > 1 else (1,):
            states = torch.randn(1, heads, count, width, generator=generator).to(dtype)
            layer.update(states, states)
            if layer.observing:
                layer.observe(torch.rand(1, heads, 1, 1, layer.places().shape[-1], generator=generator))
            layer.remember(states, 1.0)
            cache.settle(ends_prompt=True)
        each[heads, width] = int(cache.nbytes()[0])
    return rows * sum(each[shape] for shape in shapes)
