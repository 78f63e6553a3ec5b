"""A model in stages, each in a process of its own, which pass parts of a batch on by torch's pipelining."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from effbench.core.errors import Outcome, Unsupported
from effbench.core.run import GroupReport, Run
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.sliced import Sliced
from effbench.nn.train.batches import IGNORED, Batch
from effbench.nn.train.groups import Groups, describe_group
from effbench.nn.train.loss import sum_weights
from effbench.nn.train.outputs import Outputs
from effbench.nn.train.shards import check_alike
from effbench.nn.train.slots import Parallel, Shares, find_shares

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Pipeline(Parallel):
    """The stage of this process in one fit.

    name           what messages call the step that asked for it
    stages         processes, each of which holds one
    microbatches   parts that a batch is cut into, at most
    schedule       of `SCHEDULES`
    """

    def __init__(self, name: str, stages: int, microbatches: int, schedule: str) -> None:
        self.name = name
        self.stages = stages
        self.microbatches = microbatches
        self.schedule = schedule
        self.device = torch.device("cpu")
        self.width = 0  # of what stages pass on
        self.dtype = torch.float32
        self.owners: dict[Tensor, list[int]] = {}  # stages that hold a tensor
        self.groups: dict[tuple[int, ...], Any] = {}  # of stages that share one
        self.running = False  # whether stages pass on a micro-batch

    @property
    def stage(self) -> int:
        """The number of this one."""
        return distributed.get_rank()

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    # The fit.

    @contextlib.contextmanager
    def wrap(self, run: Run) -> Iterator[None]:
        self.check_run(run)
        view = Blocks(run.model)
        table = view.embedding.get_parameter("weight")
        self.device, self.width = run.device, int(run.model.config.hidden_size)
        self.dtype = torch.float32 if table.requires_grad and table.itemsize < 4 else table.dtype
        self.owners = self._divide(view)
        shared = sorted({tuple(stages) for stages in self.owners.values() if len(stages) > 1})
        self.groups = {stages: distributed.new_group(list(stages)) for stages in shared}
        elsewhere = [tensor for tensor, stages in self.owners.items() if self.stage not in stages]
        before = [(tensor, tensor.shape, tensor.requires_grad) for tensor in elsewhere]
        with self._passing_by(view):
            for tensor in elsewhere:
                tensor.requires_grad_(False)
                tensor.data = tensor.data.new_zeros(0)
            try:
                yield
                self._gather({tensor: shape for tensor, shape, _ in before})
            finally:
                for tensor, _, trained in before:
                    tensor.requires_grad_(trained)
        check_alike(run.model)

    def backward(
        self,
        batch: Batch,
        feed: Callable[[Batch], Outputs],
        lose: Callable[[Batch, Outputs], Tensor],
        saving: AbstractContextManager[Any],
    ) -> None:
        least = self.stages if self.schedule == "1f1b" else 1
        parts = cut(batch, self.microbatches, least)
        found: dict[int, Outputs] = {}
        # Draws of stages differ, as those of one process for one block after the other do.
        torch.default_generator.manual_seed(int(torch.randint(2**62, ())) + self.stage)

        def compute(states: Tensor, number: Tensor) -> Tensor:
            part = parts[int(number)]
            if self.stage:
                part = {name: value for name, value in part.items() if name != "input_ids"} | {"inputs_embeds": states}
            self.running = True
            try:
                found[int(number)] = feed(part)
            finally:
                self.running = False
            if self.is_last:
                return found[int(number)].logits
            passed = found.pop(int(number)).logits.to(self.dtype).contiguous()
            return passed if passed.requires_grad else passed.requires_grad_()

        def judge(_: Tensor, number: Tensor) -> Tensor:
            part, out = parts[int(number)], found.pop(int(number))
            return lose(part, out) if sum_weights(part) else 0 * out.logits.sum()

        numbers = torch.arange(len(parts), device=self.device)
        rows, tokens = parts[0]["labels"].shape
        states = torch.empty(rows, tokens, self.width, dtype=self.dtype, device="meta", requires_grad=True)
        stage = PipelineStage(
            _Stage(compute), self.stage, self.stages, self.device, states if self.stage else numbers[:1], states
        )
        schedule = SCHEDULES[self.schedule](stage, len(parts), judge, scale_grads=False)
        given = () if self.stage else (numbers,)
        try:
            with saving if self.device.type == "cpu" else contextlib.nullcontext():  # which is full of gradients there
                schedule.step(*given, number=numbers, target=numbers if self.is_last else None, return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, Outcome):
                raise error.__cause__ from None
            raise

    def told(self, values: Tensor) -> Tensor:
        distributed.broadcast(values, self.stages - 1)
        return values

    def merge(self, terms: dict[str, float]) -> dict[str, float]:
        box = [terms]
        distributed.broadcast_object_list(box, self.stages - 1)
        return box[0]

    def describe(self, model: nn.Module, groups: Groups) -> tuple[int, list[GroupReport]]:
        own = [group | {"params": [p for p in group["params"] if self._counts(p)]} for group in groups]
        mine = [describe_group(group) for group in own]
        number = sum(parameter.numel() for parameter in model.parameters() if self._counts(parameter))
        parts: list[list[GroupReport]] = [[] for _ in range(self.stages)]
        distributed.all_gather_object(parts, mine)
        merged: dict[tuple[float, float, int], GroupReport] = {}
        for stage in parts:
            seen: Counter[tuple[float, float]] = Counter()
            for part in stage:
                kind = part["lr"], part["weight_decay"]
                alike = merged.setdefault((*kind, seen[kind]), part | {"tensors": 0, "parameters": 0})
                alike["tensors"] += part["tensors"]
                alike["parameters"] += part["parameters"]
                seen[kind] += 1
        return int(self._sum(number)), list(merged.values())

    def flops_per_token(self, flops: float, tokens: int) -> float:
        return super().flops_per_token(float(self._sum(flops)), tokens)

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of what several stages share: embeddings that are the head, too."""
        for stages, group in self.groups.items():
            shared = [p for p in parameters if tuple(self.owners.get(p, ())) == stages]
            if not shared or self.stage not in stages:
                continue
            there = torch.tensor([float(p.grad is not None) for p in shared], device=self.device)
            distributed.all_reduce(there, group=group)
            for parameter, number in zip(shared, there.tolist(), strict=True):
                if number:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    distributed.all_reduce(parameter.grad, group=group)

    def agree(self, finite: bool) -> bool:
        return not self._sum(float(not finite))

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> None:
        """What stages share counts once, in the first of them."""
        own = [p.grad for p in parameters if p.grad is not None and self._counts(p)]
        squares = sum(float(torch.linalg.vector_norm(grad, dtype=torch.float64).square()) for grad in own)
        norm = self._sum(squares).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, most, norm)

    def shares(self, model: nn.Module) -> Shares | None:
        """Of the stage that holds most; None in a fit, where a process has its own stage alone."""
        if self.owners:
            return None
        owners = self._divide(Blocks(model))
        size = [sum(t.nbytes for t, stages in owners.items() if stage in stages) for stage in range(self.stages)]
        most = size.index(max(size))
        return find_shares(model, lambda p: float(most in owners[p]))

    @property
    def period(self) -> int:
        return self.stages

    def fullest(self, optimizer: Any) -> set[int]:
        return {0, self.stages - 1}  # the first has most blocks and micro-batches, the last one head and logits

    def _counts(self, parameter: nn.Parameter) -> bool:
        """Whether a tensor that stages share counts in this one."""
        return self.owners.get(parameter, [self.stage])[0] == self.stage

    def _sum(self, value: float) -> Tensor:
        """The sum over all stages, float64 []."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total

    # The division.

    def check_run(self, run: Run) -> None:
        """Raise `Unsupported` where a model has too few blocks, or a method sees what lies in other stages."""
        view, plan = Blocks(run.model), run.train
        if self.stages > len(view):
            raise Unsupported(f"{self.name}: {self.stages} stages are wanted, and the model has {len(view)} blocks")
        if any(isinstance(block, Sliced) for block in view.blocks):
            raise Unsupported(f"{self.name}: sliced blocks pass on states of other widths than the next stage takes")
        for method in [*plan.chain("context"), *plan.chain("on_step")]:
            raise Unsupported(f"{self.name}: {method} sees the whole model at work, and a stage holds a part of it")
        for method in plan.chain("loss"):
            if not method.reads or set(method.reads.get("model", ())) - {"logits"}:
                raise Unsupported(
                    f"{self.name}: the loss of {method} reads more of the model than logits, which are all that the "
                    "last stage has"
                )

    def _divide(self, view: Blocks) -> dict[Tensor, list[int]]:
        """The stages of every parameter, and of the buffers of blocks. Raises `Unsupported` for a stray one."""
        model, names, last = view.model, view.names, self.stages - 1
        modules = {path: module for path, module in model.named_modules() if path}  # some paths are empty
        first = [names.embedding, names.positions, *names.before]
        places = [(modules[path], 0) for path in first if path in modules]
        places += [(block, self._find_stage(index, len(view))) for index, block in enumerate(view.blocks)]
        places += [(modules[path], last) for path in (names.norm, names.after) if path in modules]
        owners: dict[Tensor, set[int]] = defaultdict(set)
        for module, stage in [*places, (view.head, last)]:
            for tensor in [*module.parameters(), *module.buffers()]:
                owners[tensor].add(stage)
        for name, parameter in model.named_parameters():
            if parameter not in owners:
                raise Unsupported(f"{self.name}: {name} belongs to no block, and stages pass on blocks' states alone")
        for stage in range(self.stages):
            if not any(stage in stages and tensor.requires_grad for tensor, stages in owners.items()):
                raise Unsupported(f"{self.name}: stage {stage + 1} of {self.stages} would have nothing to train")
        return {tensor: sorted(stages) for tensor, stages in owners.items()}

    def _find_stage(self, block: int, blocks: int) -> int:
        return block * self.stages // blocks

    @contextlib.contextmanager
    def _passing_by(self, view: Blocks) -> Iterator[None]:
        """Have the model, while stages pass on a micro-batch, do what this one does of it, and nothing otherwise."""
        model, names, changed = view.model, view.names, []
        modules = {path: module for path, module in model.named_modules() if path}  # some paths are empty

        def passed(states: Tensor, *_: Any, **__: Any) -> Tensor:
            self._check_running()
            return states

        def nothing(*_: Any, **__: Any) -> Tensor:
            self._check_running()
            return torch.zeros((), dtype=self.dtype, device=self.device)

        for index, block in enumerate(view.blocks):
            if self._find_stage(index, len(view)) != self.stage:
                changed.append((block, passed))
        if self.stage:
            changed += [(modules[path], passed) for path in names.before if path in modules]
            changed += [(modules[path], nothing) for path in (names.embedding, names.positions) if path in modules]
        if not self.is_last:
            changed += [(modules[path], passed) for path in (names.norm, names.after) if path in modules]
            changed.append((view.head, passed))
        before = [(module, vars(module).get("forward")) for module, _ in changed]
        for module, forward in changed:
            module.forward = forward
        try:
            yield
        finally:
            for module, own in before:
                vars(module).pop("forward", None)  # what came round it may have taken it away
                if own is not None:
                    module.forward = own

    def _check_running(self) -> None:
        if not self.running:
            raise Unsupported(
                f"{self.name}: something runs the model within the fit, which lies in stages: give no validate=, and "
                "no method that writes or measures texts"
            )

    @torch.no_grad()
    def _gather(self, shapes: dict[Tensor, torch.Size]) -> None:
        """Have every tensor whole in every process, as the first of its stages has left it.

        Raises `RuntimeError` in all of them where stages that share one have left it differently.
        """
        different = 0
        for tensor, stages in self.owners.items():
            if tensor in shapes:
                tensor.data = tensor.data.new_zeros(shapes[tensor])
            first = tensor.data.clone() if len(stages) > 1 else tensor.data.contiguous()
            distributed.broadcast(first, stages[0])
            different += self.stage in stages and not torch.equal(first, tensor.data)
            tensor.data = first
        if self._sum(different):
            raise RuntimeError("stages that share a tensor hold different ones after the fit")


class _Stage(nn.Module):
    """What a stage computes, as torch's engine calls it."""

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, states: Tensor, number: Tensor) -> Tensor:
        return self.compute(states, number)


def cut(batch: Batch, number: int, least: int) -> list[Batch]:
    """A batch in at most so many micro-batches of as many rows each, at least `least` of them.

    The rows that are lacking are the last one again, of which nothing is learned.
    """
    rows = len(batch["labels"])
    size = -(-rows // min(number, rows))
    count = max(-(-rows // size), least)
    place = torch.arange(count * size, device=batch["labels"].device)
    again = place >= rows
    filled = {
        name: value[place.clamp(max=rows - 1)] if name != "tally" and value.ndim and len(value) == rows else value
        for name, value in batch.items()
    }
    for name, value in (("labels", IGNORED), ("example", -1)):
        filled[name] = filled[name].masked_fill(again[:, None], value)
    by_row = {name for name, value in filled.items() if value is not batch[name]}
    chunks = {name: filled[name].split(size) for name in by_row}
    return [filled | {name: chunks[name][part] for name in by_row} for part in range(count)]
