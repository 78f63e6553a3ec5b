"""What a recipe would leave on a model and hold while it trains, in bytes, found without the model's weights.

The recipe runs as it is, on a model that has shapes and no values (`effbench.nn.hollow`): what it replaces, freezes and
trains is replaced, frozen and trained there, fits take two steps on a full batch, and the meter of fits counts as ever.
No method is known by name, and a new one is foreseen without another line. Engines of parallel training run as they
are, too, in a process that stands for one of several (`effbench.nn.stand_in`).

Compressing linears takes values. It runs beside it on a small model of the same make with random weights: same
architecture, a few heads, two blocks. What that leaves in the place of a linear, its class and its configuration, is
put in the place of the linear of that role in the hollow model, at that one's size. Numbers in a configuration that
differ between linears of the small model are counts (of weights that are stored one by one) and grow with the matrix.

All blocks of a model are alike, so that a few stand for all: bytes found with two and with three blocks are carried on
to the depth of the model if they foretell those found with five, and else the whole depth is gone through. Engines that
deal out blocks say by how many more blocks each process has as many more: numbers of blocks then differ by that.
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
from effbench.nn.stand_in import stand_for
from effbench.nn.train.groups import limit_to
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.slots import Parallel

if TYPE_CHECKING:
    from effbench.core.run import FitReport
    from effbench.sources import Source

STEPS = 2  # of each fit: the first makes the optimizer's states, the second is looked into
LEAST = 2  # blocks that stand for all
MORE = (0, 1, 3)  # periods of blocks by which there are more of them
SMALL = {"hidden_size": 512, "num_attention_heads": 8, "vocab_size": 512, "width": 1024}  # of the small model, at most
BESIDE = ("Select", "Prompt")  # kinds that change neither weights nor caches
AFTER = ("resident", "stored", "stored_constants", "cache")  # what there is after training, under any engine


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
    batch: Batch  # what a step of its fits reads, over all processes
    cached: Batch  # what is in the cache when it generates
    skip: tuple[str, ...] = ()  # patterns of linears that methods leave alone


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one process by what holds them."""

    opened: int = 0  # the model before the recipe
    weights: int = 0  # of the model in training, the last fit's, with what decodes packed ones
    constants: int = 0  # of these what only decodes: scales, zero-points, indices, masks
    gathered: int = 0  # weights in parts that are whole here at a time of a forward pass, at most
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
        parts = self.weights + self.gathered + self.gradients + self.optimizer
        return parts + self.activations + self.teachers

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
    skip: tuple[str, ...] = (),
) -> Case:
    """The rehearsal of a recipe's steps on a model, computing in `dtype`, by default as stored.

    Raises as `open_run`, and `Unsupported` for a model that is packed already, or has fewer positions than there are to
    be tokens. What a fit reads by itself ends where these end, and so does what is in the cache.
    """
    from effbench.nn.files import artifact
    from effbench.nn.files.load import describe_model

    config, _, storage = describe_model(source)
    if source.path is not None and (source.path / artifact.CONFIG).is_file():
        raise Unsupported("the model is packed already: name what it was made of, and the recipe")
    positions = int(config.max_position_embeddings)
    if batch.context is not None and batch.context > positions:
        raise Unsupported(f"a context of {batch.context} tokens is longer than the {positions} positions of the model")
    fit = next((step for step in reversed(steps) if isinstance(step, FitSettings)), None)
    cached = Batch(
        batch.batch or (1 if fit is None else fit.batch_size),
        batch.context or min(positions, 512 if fit is None else fit.max_length),
    )
    return Case(source, config, storage, matrix_dtype(storage) if dtype is None else dtype, steps, batch, cached, skip)


def rehearse(case: Case, process: int | None = None) -> Held:
    """Bytes that the steps hold in one process: that one, or that which holds most. Raises as a run would."""
    return Rehearsals(case).take(process=process)


class Rehearsals:
    """Those of a case under one engine and another; what is alike under all of them is found once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.sampled = _sample(case)
        self._after: dict[str, int] | None = None

    def take(self, engine: Method | None = None, process: int | None = None) -> Held:
        """Bytes that the steps hold in one process: that one, or that which holds most. Raises as a run would.

        engine  that stands before each fit, of steps that name none
        """
        first, fullest = self._go_on(engine, process or 0)
        others = fullest - {0} if process is None else ()
        return max([first, *(self._go_on(engine, other)[0] for other in others)], key=lambda held: held.training)

    def _go_on(self, engine: Method | None, process: int) -> tuple[Held, set[int]]:
        """What a process holds with all blocks, and the processes of which one holds most."""
        depth, period = int(self.case.config.num_hidden_layers), math.lcm(*map(_period, self._steps(engine)))
        least = max(LEAST, period)
        few = [least + (depth - least) % period + period * more for more in MORE]
        found, fullest = None, {0}
        if depth > few[-1]:
            with contextlib.suppress(Unsupported):  # of a step that names more blocks than these
                held = [self._find(engine, process, blocks) for blocks in few]
                fullest = held[-1][1]
                found = _carry_on([dataclasses.astuple(one) for one, _ in held], (depth - few[0]) / period)
        if found is None:
            found, fullest = self._find(engine, process, depth)
        if self._after is None:
            self._after = {name: getattr(found, name) for name in AFTER}
        return dataclasses.replace(found, **self._after), fullest

    def _steps(self, engine: Method | None) -> list[Method]:
        """Those of the case, with the engine before each that trains."""
        before = [] if engine is None else [engine]
        return [one for step in self.case.steps for one in (*(before if step.consumes else ()), step)]

    def _find(self, engine: Method | None, process: int, depth: int) -> tuple[Held, set[int]]:
        """As `_go_on`, with so many blocks; without what there is after training if that is known."""
        case, processes = self.case, max((step.ranks for step in self._steps(engine)), default=1)
        steps = list(zip(case.steps, self.sampled, strict=False))
        if self._after is not None:
            steps = steps[: 1 + max((place for place, (step, _) in enumerate(steps) if step.consumes), default=-1)]
        with stand_for(process, processes), hollow():
            run = _open(Rehearsal, case, _deepen(case.config, depth), case.batch)
            assert isinstance(run, Rehearsal)
            found, fullest = Held(opened=_hold(run.model), parameters=run.original.parameters), {0}
            try:
                for step, run.sampled in steps:
                    if step.consumes and engine is not None:
                        run.apply(engine)
                    if kind_of(type(step)) in BESIDE:
                        continue
                    whole = _count_trained(run, step)
                    run.apply(_shorten(step, case.batch))
                    if step.consumes and run.log.fits:
                        report = run.log.fits[-1]
                        fullest = set(report["cost"].get("fullest", fullest))
                        found = dataclasses.replace(found, **_measure_fit(run, report))
                        if whole is not None:
                            found = dataclasses.replace(found, trained=whole)
                if self._after is not None:
                    return found, fullest
                found = dataclasses.replace(found, **_measure_end(run, self.sampled))
                view = Blocks(run.model)
                shapes = [count_heads(block.get_submodule(view.names.attention)) for block in view.blocks]
                plan, run.infer = run.infer, type(run.infer)()  # which outlives the rehearsal
                kept = run.model.dtype
            finally:
                run.close()
        return dataclasses.replace(found, cache=_fill_cache(plan, shapes, case.cached, kept)), fullest


def _period(step: Method) -> int:
    """By how many blocks models of alike blocks have to differ for a step to give each process as many more."""
    engine = step.slot_values().get("parallel", step) if "train.parallel" in step.slots() else None
    return engine.period if isinstance(engine, Parallel) else 1


def _carry_on(held: Sequence[tuple[float, ...]], periods: float) -> Held | None:
    """What is held with so many periods more than in the first of three, if they lie on a line; else None."""
    first, second, third = held
    for one, two, three in zip(first, second, third, strict=True):
        if not math.isclose(three - two, (MORE[2] - MORE[1]) * (two - one)):
            return None
    return Held(*(round(one + periods * (two - one)) for one, two in zip(first, second, strict=True)))


def _count_trained(run: Rehearsal, step: Method) -> int | None:
    """Numbers that a fit is to train, where only other processes know how many they do; they are not there."""
    engine: Parallel = run.train.slot("parallel", Parallel())
    if type(engine).describe is Parallel.describe or not isinstance(step, FitSettings):
        return None
    with limit_to(run.model, step.train):
        return sum(int(parameter.numel()) for parameter in run.model.parameters() if parameter.requires_grad)


def _measure_fit(run: Rehearsal, report: FitReport) -> dict[str, Any]:
    """What this process has held in a fit."""
    cost = report["cost"]
    return {
        "weights": cost["parameter_bytes"] + cost["buffer_bytes"],
        "constants": stored_bytes(run.model, run.storage).metadata,
        "gathered": cost.get("gathered_bytes", 0),
        "gradients": cost["gradient_bytes"],
        "optimizer": cost["optimizer_bytes"],
        "activations": cost.get("activation_bytes", 0),
        "teachers": sum(map(_hold, run.teachers())),
        "trained": sum(group["parameters"] for group in report["groups"]),
    }


def _measure_end(run: Rehearsal, sampled: Sequence[dict[str, nn.Module]]) -> dict[str, Any]:
    """What there is of the model after the recipe."""
    run.sampled = sampled[-1] if sampled else {}
    run.settle()
    view = Blocks(run.model)
    packed = {path: module for path, module in view.linears() if isinstance(module, Replaced)}
    run.take_over({p: m for p, m in packed.items() if type(m) is not type(run.sampled.get(view.role(p)))})
    run.finish(recipe_is_empty=True)
    stored = stored_bytes(run.model, run.storage)
    return {"resident": _hold(run.model), "stored": sum(stored), "stored_constants": stored.metadata}


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
                if kind_of(type(step)) not in BESIDE and "train.parallel" not in step.slots():
                    run.apply(_shorten(step, batch))
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
    fits = [_shorten(step, batch) for step in case.steps if isinstance(step, FitSettings)]
    number = max((STEPS * fit.batch_size for fit in fits), default=2)
    length = min(int(config.max_position_embeddings), max((fit.max_length for fit in fits), default=64))
    rows = Rows(number, length)
    return kind(case.source, build(), build, None, rows, device=device, storage=case.storage, length=64, skip=case.skip)


def _shorten(step: Any, batch: Batch) -> Any:
    """A step that fits, as far as it takes to see what it holds."""
    if not isinstance(step, FitSettings):
        return step
    return step.shorten(STEPS, batch.batch or step.batch_size, batch.context or step.max_length)


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
