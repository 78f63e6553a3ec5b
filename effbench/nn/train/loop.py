"""The one training loop. Every slot and hook of the train plan stands here in its place:

    parallel.wrap                        around everything
        context                          of methods, around what follows
            activations.saving
            param_groups                 of the optimizer, each trainable tensor in one of them
            optimizer                    AdamW where the slot is empty
            sampler                      made now, so that it sees what all selections left
            for each step (`run.step`):
                chance                   seeded by run, fit, step and data rank
                draw, parallel.shard     examples of this process
                batch                    examples to tensors, in `accumulate` parts, as precision.forward computes
                tally                    what methods counted of the parts, summed over parts and data ranks
                until it is taken:
                    for each part:
                        precision.forward    a context of its own
                            forward      of the method that has claimed it, else the model's own
                        loss             terms of methods; cross-entropy unless one has claimed `train.loss`
                        precision.scale, backward
                    gradients of weights held at zero are zeroed
                    parallel.reduce
                    precision.unscale    whether they are finite here
                    parallel.agree       whether they are on all processes, else the pass is skipped
                    precision.settle
                parallel.clip, optimizer step
                weights held at zero are zeroed again
                on_step                  before gradients are cleared

A term is a mean over the learned tokens of the part that it was computed on. Parts count by their share of the learned
tokens of the whole step, over all ranks, so that it does not matter how a step is cut.

A step whose pass is skipped is taken again, from the same examples and the same chance: neither schedule, optimizer,
`run.step` nor sampler moves, and no hook but `loss` sees it twice.

Trained tensors that the model keeps in a 16-bit type are float32 inside, because steps below its resolution add up only
so; what the model computes with is then rounded by autocast, unless the slot `precision` says how.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench.core.errors import Diverged, Unsupported
from effbench.core.run import FitReport, Step
from effbench.core.views import Example
from effbench.nn.data import count_learned
from effbench.nn.model.attention import own_attention
from effbench.nn.model.experts import eager_experts
from effbench.nn.model.held import local
from effbench.nn.model.linear import MaskedLinear
from effbench.nn.train.batches import IGNORED, Batch, collate, pack
from effbench.nn.train.groups import group_parameters, limit_to, widen
from effbench.nn.train.loss import learned as is_learned
from effbench.nn.train.loss import mean_cross_entropy, sum_by_example, sum_weights
from effbench.nn.train.meter import Meter
from effbench.nn.train.outputs import Outputs, Roles
from effbench.nn.train.samplers import ByLength, InOrder, Sampler, Shuffled
from effbench.nn.train.shards import cut_like, join_states
from effbench.nn.train.slots import Activations, Parallel, Precision, Rounded

if TYPE_CHECKING:
    from effbench.core.method import Method
    from effbench.core.run import Run
    from effbench.nn.train.settings import FitSettings


COUNTS = ("tokens", "skipped", "seconds")
PASSES = 1000  # of one step, at most; a precision that scales gives up long before


class Loop:
    """One fit at one learning rate, from the first step to the last."""

    def __init__(
        self, run: Run, settings: FitSettings, examples: Sequence[Example], width: int, look: bool = True
    ) -> None:
        self.run = run
        self.settings = settings
        self.examples = examples
        self.width = width
        self.look = look  # into what a step costs
        self.number = len(run.log.fits)  # of this fit in the run
        self.lines: list[dict[str, Any]] = []  # of the log: a step each
        self.tokens = 0  # learned
        self.skipped = 0  # passes
        self.seconds = 0.0
        self.drawn: set[int] = set()
        self.resumed: list[int] = []  # steps after which it went on from a checkpoint

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Have the model ready to be trained inside, and what it was outside."""
        run, plan = self.run, self.run.train
        self.parallel: Parallel = plan.slot("parallel", Parallel())
        activations: Activations = plan.slot("activations", Activations())
        with contextlib.ExitStack() as stack:
            devices = [run.device] if run.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices))
            self._seed("start")  # alike on all ranks: what is made now is there on each
            stack.callback(self._step_out)
            stack.enter_context(limit_to(run.model, self.settings.train))
            run.model.train()
            stack.callback(run.model.eval)
            narrow = any(p.requires_grad and p.is_floating_point() and p.itemsize < 4 for p in run.model.parameters())
            stack.enter_context(self.parallel.wrap(run))
            for method in plan.chain("context"):
                stack.enter_context(method.context(run))
            self._check_layout()
            self.roles = Roles(run, plan.chain("loss"))
            self.feeder: Any = plan.slot("forward")
            stack.enter_context(run.reading(self.roles))
            stack.enter_context(self.roles.open())
            stack.enter_context(own_attention(run.model, run.infer))
            stack.enter_context(eager_experts(run.model))
            stack.enter_context(activations.saving(run))
            self.groups = group_parameters(run, self.settings.rates[0], self.settings.weight_decay)
            self.numbers, self.trained = self.parallel.describe(run.model, self.groups)
            self.parameters = [parameter for group in self.groups for parameter in group["params"]]
            widened = stack.enter_context(widen(self.parameters))
            self.precision: Precision = plan.slot("precision", Rounded() if narrow or widened else Precision())
            owner = plan.slot("optimizer")
            plain = owner.optimizer(self.groups, run) if owner else torch.optim.AdamW(self.groups)
            self.optimizer = self.parallel.deal(plain)
            self.peaks = [group["lr"] for group in self.optimizer.param_groups]
            self.sampler = self._make_sampler()
            masked = [module for module in run.model.modules() if isinstance(module, MaskedLinear)]
            trained = [module for module in masked if module.weight.requires_grad]
            self.held = [(module, cut_like(module.kept(), module.weight)) for module in trained]
            self.known = [*run.model.parameters(), *run.model.buffers()]
            self.names = _name_methods(plan.chain("loss"))
            self.meter = Meter(run, self.settings.steps if self.look else 0, self.parallel)
            yield
            self.cost = self.meter.report(run.model, self.numbers, self.parameters, self.optimizer)

    def step(self, index: int) -> dict[str, Any]:
        """Take one step; its line of the log. Raises `Diverged`, `Unsupported`."""
        self.run.step = Step(index, self.settings.steps)
        begin = time.perf_counter()
        self._seed(f"{index}/{self.parallel.data_rank}")
        line = self._take_step()
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self.lines.append(line | {"tokens_per_s": line["tokens"] / seconds})
        return self.lines[-1]

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from."""
        return {
            "model": _find_changing(self.run.model),
            "optimizer": self.optimizer.state_dict(),
            "methods": [self.run.state(method) for method in self.run.train.methods],
            "lines": self.lines,
            "drawn": sorted(self.drawn),
            "resumed": self.resumed,
            "spent": self.meter.spent(),
            **{name: getattr(self, name) for name in COUNTS},
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> int:
        """Go on from a state: the number of steps that are taken. Raises `ValueError` for one of another fit."""
        tensors = _find_changing(self.run.model)
        if tensors.keys() != state["model"].keys():
            raise ValueError("the checkpoint is of another model")
        for name, tensor in tensors.items():
            local(tensor).copy_(state["model"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        join_states(self.optimizer)
        for method, kept in zip(self.run.train.methods, state["methods"], strict=True):
            self.run.state(method).clear()
            self.run.state(method).update(kept)
        self.lines, self.drawn, self.meter.earlier = state["lines"], set(state["drawn"]), state["spent"]
        for name in COUNTS:
            setattr(self, name, state[name])
        self.resumed = [*state["resumed"], len(self.lines)]
        return int(self.lines[-1]["step"])

    def report(self) -> FitReport:
        """What happened."""
        losses = [line["loss"] for line in self.lines]
        cuts = [round(len(losses) * quarter / 4) for quarter in range(5)] if len(losses) >= 4 else []
        available = sum(map(count_learned, self.examples))
        report: FitReport = {
            "steps": len(self.lines),
            "tokens": self.tokens,
            "distinct_tokens": sum(count_learned(self.examples[place]) for place in self.drawn),
            "available_tokens": available,
            "epochs": self.tokens / available,
            "lr": self.settings.rates[0],
            "groups": self.trained,
            "loss_first": losses[0],
            "loss_mean": statistics.fmean(losses),
            "loss_quarters": [statistics.fmean(losses[start:end]) for start, end in itertools.pairwise(cuts)],
            "loss_last": losses[-1],
            "cost": self.cost,
        }
        if self.skipped:
            report["skipped"] = self.skipped
        if self.resumed:
            report["resumed"] = self.resumed
        return report

    def _take_step(self) -> dict[str, Any]:
        """One step of the optimizer; what happened in it, for the log."""
        run, settings, plan = self.run, self.settings, self.run.train
        now = run.step
        assert now is not None
        factor = rate(now.index, now.total, settings.warmup, settings.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        places = self.sampler.draw(now.index, settings.batch_size)
        parts = list(self._read(self.parallel.shard(range(len(places))), places))
        parts += self._fill_up(len(parts), places)
        counts = [sum_weights(batch) for batch in parts]
        learned, tokens = self._total(parts, counts)
        if not learned:
            raise Unsupported(f"all labels of step {now.index + 1} are masked: there is nothing to learn")
        chance = self._get_chance()
        skipped = self.skipped
        while True:
            losses = torch.zeros(2, len(places), dtype=torch.float64) if hasattr(self.sampler, "seen") else None
            self.meter.read(parts)
            terms, watched = self._differentiate(parts, [count / learned for count in counts], losses)
            loss = sum(terms.values())
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {now.index + 1} of {now.total}")
            if self._bring_back():
                break
            self.skipped += 1
            if self.skipped - skipped == PASSES:
                raise Diverged(f"step {now.index + 1} of {now.total} was skipped {PASSES} times")
            self._set_chance(chance)
        self._update()
        for method in plan.chain("on_step"):
            method.on_step(run)
        self.optimizer.zero_grad(set_to_none=True)
        if losses is not None:
            sums, counted = self.parallel.total(self.parallel.told(losses.flatten())).view(2, -1)
            self.sampler.seen(places, sums / counted.clamp(min=1))  # type: ignore[attr-defined]
        self.tokens += int(tokens)
        self.drawn.update(places)
        return {
            "step": now.index + 1,
            "loss": loss,
            "terms": terms,
            "lr": self.peaks[0] * factor,
            "tokens": int(tokens),
            **({"watched": watched} if watched else {}),
            **({"skipped": self.skipped - skipped} if self.skipped > skipped else {}),
        }

    def _read(self, mine: Sequence[int], places: Sequence[int]) -> Iterator[Batch]:
        """The examples of a step at `mine`, in parts, as tensors; `example` numbers those of the whole step."""
        run = self.run
        size = -(-len(mine) // self.settings.accumulate)
        for start in range(0, len(mine), max(1, size)):
            part = mine[start : start + size]
            examples = [self.examples[places[place]] for place in part]
            if self.settings.layout == "packed":
                batch = pack(examples, self.width, run.pad, run.device)
            else:
                batch = collate(examples, run.pad, run.device)
            for method in run.train.chain("batch"):
                with self.precision.forward(run), self.parallel.apart(run):
                    batch = method.batch(batch, run)
            number = torch.tensor([*part, -1], device=run.device)  # the last for padding, which is at -1
            yield batch | {"example": number[batch["example"]]}

    def _fill_up(self, number: int, places: Sequence[int]) -> list[Batch]:
        """Parts of which nothing is learned, where other data ranks have more than this one has."""
        if not self.parallel.lockstep:
            return []
        most = int(self.parallel.largest(torch.tensor([float(number)], device=self.run.device)))
        batch = collate([self.examples[places[0]]], self.run.pad, self.run.device)
        nothing = {"labels": torch.full_like(batch["labels"], IGNORED), "example": torch.full_like(batch["labels"], -1)}
        return [batch | nothing] * (most - number)

    def _go_along(self, batch: Batch) -> None:
        """The passes of a part of which nothing is learned, which other data ranks wait for."""
        self.precision.scale(0 * self._feed(batch).logits.sum(), self.run).backward()

    def _differentiate(
        self, parts: Sequence[Batch], shares: Sequence[float], losses: Tensor | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Add the gradients of all parts; gives terms and what is watched, of the whole step and all data ranks."""
        terms: dict[str, float] = {}
        watched: dict[str, float] = {}
        for batch, share in zip(parts, shares, strict=True):
            if share:
                for into, found in zip((terms, watched), self._backward(batch, share, losses), strict=True):
                    for name, value in found.items():
                        into[name] = into.get(name, 0.0) + value
            elif self.parallel.lockstep:
                self._go_along(batch)
        return self.parallel.merge(terms), self.parallel.merge(watched) if self.names else watched

    def _backward(self, batch: Batch, share: float, losses: Tensor | None) -> tuple[dict[str, float], dict[str, float]]:
        """Add the gradients of a part that holds this share of the learned tokens.

        Gives its terms, and what is watched beside them, times the share.
        """
        run = self.run
        told: dict[str, float] = {}
        seen: dict[str, float] = {}

        def lose(part: Batch, out: Outputs) -> Tensor:
            self.roles.turn_to(part, out)
            mine = share if part is batch else share * sum_weights(part) / sum_weights(batch)
            terms: dict[str, Tensor] = {}
            watched: dict[str, Tensor] = {}
            for name, method in self.names.items():
                run.watched = {}
                terms |= {f"{name}.{term}": value for term, value in method.loss(part, out, run).items()}
                watched |= {f"{name}.{what}": value.detach() for what, value in run.watched.items()}
            run.watched = {}
            if run.train.slot("loss") is None:
                terms["cross_entropy"] = mean_cross_entropy(out.logits, part)
            if losses is not None:
                sums, numbers = sum_by_example(out.logits, part, losses.shape[1])
                losses.add_(torch.stack([sums, numbers]).to(losses.device))
            for into, found in ((told, terms), (seen, watched)):
                for name, value in found.items():
                    into[name] = into.get(name, 0.0) + float(value.detach()) * mine
            return self.precision.scale(mine * sum(terms.values(), start=torch.zeros((), device=run.device)), run)

        self.parallel.backward(batch, self._feed, lose, self.meter.forward(self.known))
        return told, seen

    def _feed(self, batch: Batch) -> Outputs:
        with self.precision.forward(self.run, batch):
            out: Outputs = self.roles.feed(batch) if self.feeder is None else self.feeder.forward(batch, self.run)
            return out

    def _bring_back(self) -> bool:
        """Have the gradients of the whole step, unscaled; False, and no gradients, where they overflowed anywhere."""
        for module, mask in self.held:
            if module.weight.grad is not None:
                module.weight.grad.mul_(mask)
        self.parallel.reduce(self.parameters)
        taken = self.precision.unscale(self.parameters, self.run)
        if type(self.precision).unscale is not Precision.unscale:  # which never says no: nothing is to be asked
            taken = self.parallel.agree(taken)
        self.precision.settle(taken, self.run)
        if not taken:
            self.optimizer.zero_grad(set_to_none=True)
        return taken

    def _update(self) -> None:
        """The optimizer's step."""
        self.meter.hold(self.parameters)
        if self.settings.clip is not None:
            self.parallel.clip(self.parameters, self.settings.clip)
        self.optimizer.step()
        for module, mask in self.held:
            module.weight.data.mul_(mask)

    def _total(self, parts: Sequence[Batch], counts: Sequence[float]) -> tuple[float, float]:
        """What all learned tokens of the step count, and their number, over all ranks; tallies become those of all."""
        numbers = sum(int(is_learned(batch).sum()) for batch in parts)
        tallied = [batch for batch in parts if "tally" in batch]
        mine = torch.tensor([sum(counts), numbers, len(tallied)], dtype=torch.float64, device=self.run.device)
        learned, tokens, tallies = self.parallel.total(mine).tolist()
        if tallies:
            sums = sum((batch["tally"].double().cpu() for batch in tallied), start=torch.zeros(()))
            named = {str(place): value for place, value in enumerate(sums.tolist())} if tallied else {}
            totals = torch.tensor([*self.parallel.merge(named).values()], dtype=torch.float64)
            for batch in tallied:
                batch["tally"] = totals
        return learned, tokens

    def _check_layout(self) -> None:
        """Raise `Unsupported` where attention sees a part of a row alone: packed rows bring a mask of their own."""
        window = getattr(self.run.model.config, "sliding_window", None)
        if self.settings.layout == "packed" and window is not None and window < self.width:
            raise Unsupported(
                f"attention slides over {window} tokens, and packed rows have {self.width}: give layout='padded'"
            )

    def _make_sampler(self) -> Sampler:
        owner: Method | None = self.run.train.slot("sampler")
        if owner is not None:
            # A selection that orders claims the slot and brings no sampler of its own: its order is the train set's.
            ordered = not owner.overrides("sampler")
            sampler: Sampler = InOrder(len(self.examples)) if ordered else owner.sampler(self.examples, self.run)
            return sampler
        if self.settings.layout == "by_length":
            return ByLength([len(example.ids) for example in self.examples], self.run.seed)
        return Shuffled(len(self.examples), self.run.seed)

    def _seed(self, where: str) -> None:
        """Make what is drawn from here on a function of the run, the fit and this place."""
        seed = zlib.crc32(f"{self.run.seed}/{self.number}/{where}".encode())
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond: it looks for devices
        if self.run.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _get_chance(self) -> tuple[Tensor, Tensor | None]:
        """Where torch's generators stand: the processor's, and the device's where it is another."""
        cuda = self.run.device.type == "cuda"
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.run.device) if cuda else None

    def _set_chance(self, chance: tuple[Tensor, Tensor | None]) -> None:
        """Have torch's generators stand where they stood."""
        own, device = chance
        torch.set_rng_state(own)
        if device is not None:
            torch.cuda.set_rng_state(device, self.run.device)

    def _step_out(self) -> None:
        self.run.step = None


def _find_changing(model: Any) -> dict[str, Tensor]:
    """What a fit may change in a model, by name: frozen parameters too, as methods may merge into them."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _name_methods(methods: Sequence[Method]) -> dict[str, Method]:
    """Methods by what their terms are called after: their keys, numbered where steps share one."""
    named: dict[str, Method] = {}
    for method in methods:
        key = method.short_key
        number = 1 + sum(other.short_key == key for other in named.values())
        named[key if number == 1 else f"{key}#{number}"] = method
    return named


def rate(step: int, steps: int, warmup: float, schedule: str) -> float:
    """Fraction of the peak learning rate at `step` (from 0): linear warm-up, then constant, linear or cosine."""
    start = warmup * steps
    if step < start:
        return (step + 1) / (start + 1)
    done = (step - start) / max(1.0, steps - start)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
