"""A run: one recipe on one model, and everything a method may touch.

`Run` is the contract between methods and the machinery; `effbench.nn.run.ModelRun` implements it with torch.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar

from effbench.core.errors import Conflict
from effbench.core.method import HOOKS, SLOTS, TRAIN_SLOTS, Part
from effbench.core.plain import plain

if TYPE_CHECKING:
    from effbench.core.kinds import Cache, Swap
    from effbench.core.method import Method
    from effbench.core.views import Data, Device, Module, Segments, Tensor

T = TypeVar("T")


class Plan:
    """Slots have exactly one writer, chains are ordered; closing the plan undoes everything."""

    name = ""
    slots: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._slots: dict[str, tuple[Any, Method]] = {}
        self._chains: dict[str, list[Any]] = {name: [] for name in self.chains}
        self._undo = contextlib.ExitStack()
        self._lasts = False

    def claim(self, slot: str, value: Any, owner: Method) -> None:
        """Write a slot, or raise `Conflict` naming both writers."""
        if slot not in self.slots:
            raise KeyError(f"{self.name} has no slot {slot!r}; it has {', '.join(self.slots)}")
        if slot in self._slots:
            raise Conflict(conflict(f"{self.name}.{slot}", str(self._slots[slot][1]), str(owner)))
        self._slots[slot] = (value, owner)

    def slot(self, slot: str, default: Any = None) -> Any:
        """The value in a slot, or `default`."""
        return self._slots[slot][0] if slot in self._slots else default

    def owner(self, slot: str) -> Method | None:
        """The method that wrote a slot."""
        return self._slots[slot][1] if slot in self._slots else None

    def chain(self, name: str) -> list[Any]:
        """An ordered chain; methods append to it."""
        return self._chains[name]

    @property
    def methods(self) -> list[Method]:
        """The methods that wrote slots and stand in chains, each once."""
        owners = [owner for _, owner in self._slots.values()]
        entries = [*owners, *(entry for chain in self._chains.values() for entry in chain)]
        return list({id(entry): entry for entry in entries}.values())

    @property
    def empty(self) -> bool:
        """Whether no slot and no chain holds anything."""
        return not self._slots and not any(self._chains.values())

    def on_exit(self, undo: Callable[[], Any]) -> None:
        """Have `undo` called when the plan is closed."""
        self._undo.callback(undo)

    @contextlib.contextmanager
    def lasting(self) -> Iterator[None]:
        """Have the plan serve several fits inside, and be used up by all of them together."""
        self._lasts = True
        try:
            yield
        finally:
            self._lasts = False
            self.close()

    def close(self) -> None:
        """Undo and forget everything, latest first; not yet where it is lasting."""
        if self._lasts:
            return
        self._undo.close()
        self.__init__()  # type: ignore[misc]


class TrainPlan(Plan):
    """The plan of the next fit, which uses it up; `effbench.nn.train.loop` says where each entry acts.

    Slots: `precision`, `activations` and `parallel` hold what `effbench.nn.train.slots` describes; `optimizer` and
    `sampler` the method that builds one; `forward` the method that feeds batches to the model in a way of its own, by
    `forward(batch, run)`; `loss` the method whose terms stand in the place of the cross-entropy.
    Chains: methods, called through the hook of the chain's name.
    """

    name = "train"
    slots = TRAIN_SLOTS
    chains = HOOKS


class InferPlan(Plan):
    """How scoring and generation go; lives until the probes are done.

    Slots: `rope` says where cached keys are rotated to, `encoder` stores keys and values in fewer bytes, `reach` bounds
    how far back queries see, `decoder` generates, `memory` makes what is fed in the place of a prompt's beginning, by
    `remember(ids, run)`. Chains: `cache_keep` evicts, `prompt` rewrites prompts,
    `attend_observe` sees attention weights and `attend_scores` their scores, as `effbench.nn.model.attention` says.
    """

    name = "infer"
    slots = tuple(SLOTS)
    chains = ("cache_keep", "prompt", "attend_observe", "attend_scores")

    def __init__(self) -> None:
        super().__init__()
        self._states: dict[int, Any] = {}
        self.acted: set[int] = set()  # methods that have changed something since it was last emptied, by identity

    def act(self, method: Any) -> None:
        """Take note that a method has evicted, encoded, shortened or generated something."""
        self.acted.add(id(method))

    @property
    def idle(self) -> list[Method]:
        """Methods that have changed nothing since `acted` was emptied."""
        return [method for method in self.methods if id(method) not in self.acted and hasattr(method, "touches")]

    def open(self, method: Cache, run: Run) -> None:
        """Have a method prepare what its caches need to know."""
        self._states[id(method)] = method.open(run)

    def state(self, method: Cache) -> Any:
        """What `open` of a method returned."""
        return self._states[id(method)]

    @property
    def streams(self) -> bool:
        """Whether caches are not the model's own, so that scoring has to go token by token."""
        return bool(self.chain("cache_keep")) or any(self.slot(name) is not None for name in ("encoder", "reach"))

    @property
    def touches(self) -> frozenset[Part]:
        """The parts of inference that it changes."""
        chains: dict[Part, bool] = {"cache": bool(self.chain("cache_keep")), "prompt": bool(self.chain("prompt"))}
        written = {SLOTS[slot] for slot in self.slots if self.slot(slot) is not None}
        return frozenset(written.union(part for part, is_changed in chains.items() if is_changed))


def conflict(slot: str, first: str, second: str) -> str:
    """The one wording of a `Conflict`."""
    return f"Conflict: {slot} is already set by {first}, {second} cannot also set it; leave one of them out"


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a fit is."""

    index: int  # of the step that is being taken, from 0
    total: int

    @property
    def done(self) -> float:
        """Fraction of the fit that is done after this step."""
        return (self.index + 1) / self.total


class StepCost(TypedDict):
    """What one step of the recipe cost."""

    step: str
    seconds: float
    peaks: dict[str, int]  # bytes, by kind of peak


class TuningPoint(TypedDict):
    """One setting that was tried."""

    steps: str
    loss: float | None  # of the validation part, in nats a token; None: not finite
    seconds: float
    tokens: int  # learned
    metrics: dict[str, float]  # of the task


class GroupReport(TypedDict):
    """Parameters that were trained alike."""

    lr: float  # peak
    weight_decay: float
    tensors: int
    parameters: int  # numbers in them


class Told(TypedDict):
    """Collectives of one kind in a step."""

    calls: int
    bytes: int  # of all that is reduced, gathered, scattered or sent, once for each call


class FitCost(TypedDict):
    """What a fit cost. Bytes are those that one process holds; what could not be measured is absent."""

    seconds: float
    parameters: int  # weights of the model while it is trained, frozen and packed ones too
    parameter_bytes: int  # of the model as it is trained; what is tied, shared or viewed counts once, here and below
    buffer_bytes: int  # codes of packed weights, their scales and masks
    gradient_bytes: int  # before a step of the optimizer
    optimizer_bytes: int
    fullest: NotRequired[list[int]]  # processes of which one holds most; of a hollow run
    gathered_bytes: NotRequired[int]  # most of the weights that lie in parts and are whole at a time in a forward pass
    rule_bytes: NotRequired[float]  # of weights, gradients and AdamW's states by the formula of the engine
    collectives: NotRequired[dict[str, Told]]  # of one step, by kind
    activation_bytes: NotRequired[int]  # that a forward pass saved for its backward pass
    length: NotRequired[int]  # tokens of the longest row of the step that was looked into, with padding
    step_peak_bytes: NotRequired[int]  # most of what the passes of one step made and held at a time, gradients too
    step_ms: NotRequired[float]  # median, with the machine to itself
    timed_ms: NotRequired[list[float]]  # of each step that was timed
    flops_per_token: NotRequired[float]  # of a step per token read, with what is computed again
    joules: NotRequired[float]


class FitReport(TypedDict):
    """What happened in one fit."""

    steps: int  # optimizer steps taken
    tokens: int  # tokens learned: predicted, and neither prompt nor padding
    distinct_tokens: int  # different ones of them
    available_tokens: int  # that could be learned from the train set
    epochs: float  # tokens over available tokens
    lr: float  # peak
    groups: list[GroupReport]
    loss_first: float
    loss_mean: float  # over all steps
    loss_quarters: list[float]  # means over the quarters of the steps, where there are four
    loss_last: float
    cost: FitCost
    skipped: NotRequired[int]  # passes that were given up because gradients overflowed; their steps were taken again
    resumed: NotRequired[list[int]]  # steps after which it was taken up again from a checkpoint
    left_out: NotRequired[str]  # what of the train set could not be learned, or was not needed
    rates: NotRequired[dict[str, float | None]]  # validation loss by the learning rates tried; None: it diverged
    validation_tokens: NotRequired[int]  # learned tokens of that part, which was set aside from the train set


class Composition(TypedDict):
    """What a set of training examples is made of; what its sources do not say is absent."""

    examples: int
    lengths: dict[str, float]  # tokens of an example, by quantile
    topics: float  # entropy of the clusters of the pool that they are in, nats
    sources: NotRequired[dict[str, float]]  # shares, of the most frequent ones of the pool
    skills: NotRequired[dict[str, float]]
    balance: NotRequired[float]  # entropy of their labels over the largest that those of the pool can have


class SelectionReport(TypedDict):
    """What one selection kept, of what, and what it cost."""

    step: str
    seconds: float  # of scoring and choosing, on this machine beside other cells
    examined: int  # examples that it was given
    kept: Composition
    pool: Composition
    coverage: dict[str, float]  # share of the sources and skills of the pool that are among those kept
    planted: NotRequired[dict[str, float]]  # share of what was planted in the pool that is kept, by what it is
    noise_last: NotRequired[float]  # share of planted noise among those ranked last, as many as there is of it
    turned_away: NotRequired[int]  # examples that were judged one by one and not let in
    rightly: NotRequired[float]  # share of them that is planted noise, or near one that is kept
    pairs_kept: NotRequired[float]  # share of the planted pairs of near-duplicates that is kept, both of them


@dataclasses.dataclass
class RunLog:
    """What happened on the way, for the record: each field has one meaning, and `notes` is free to methods."""

    steps: list[StepCost] = dataclasses.field(default_factory=list)
    commit: str | None = None  # of the model on the Hub
    model_types: str = ""  # how the files of the model store it, by kind of tensor
    calibration_sequences: int | None = None  # None: nothing calibrated
    calibration_tokens: int = 0  # of one pass over the calibration set
    layers: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # errors by path of the linear
    removed: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # structure: its step, and what went
    near_duplicates: int | None = None  # held-out documents that have one among what is learned; None: not counted
    selected: dict[str, int] = dataclasses.field(default_factory=dict)  # training examples left, by step
    selections: list[SelectionReport] = dataclasses.field(default_factory=list)
    chosen: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # id and weight of each, for the samples
    fits: list[FitReport] = dataclasses.field(default_factory=list)
    tuning: list[TuningPoint] = dataclasses.field(default_factory=list)  # settings tried, of which this is the best
    sparsity_asked: float | None = None  # the largest that a step was asked for; None: no step prunes weights
    merge_lost: dict[str, float] = dataclasses.field(default_factory=dict)  # share of a product, by step
    densified: list[str] = dataclasses.field(default_factory=list)  # linears whose held zeros were given up
    decoded: list[str] = dataclasses.field(default_factory=list)  # probes for which packed linears were decoded once
    energy: str | None = None  # why energy was not measured
    simulated: bool = False  # whether a fit emulated what the device cannot compute
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # a method's own remarks

    def to_json(self) -> dict[str, Any]:
        """The log in plain values; what nothing was written to is left out, but for `steps`, and so are samples."""
        entries = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del entries["chosen"]
        told = {"steps"} | ({"near_duplicates"} if self.near_duplicates is not None else set())
        return {name: plain(value) for name, value in entries.items() if value or name in told}


class Run(abc.ABC):
    """One recipe on one model: everything a method may touch.

    What a method takes from the library instead (`effbench.nn.calibration`, `effbench.nn.train.fit`,
    `effbench.nn.model.structure` and so on) it imports from there and passes the run to it.
    """

    model: Any  # being changed: a causal language model of transformers, an `nn.Module` with `config`
    tokenizer: Any  # of transformers; None where the model comes without one
    data: Data  # pool, train, calibration and held-out sets, tasks
    device: Device
    storage: Any  # dtype in which an artifact keeps dense parameters, or those of matrices and of vectors
    seed: int
    hollow: bool = False  # whether its model has shapes and no values, so that only bytes can be found
    waiting: set[Any]  # parameters that steps have put in place for the next fit, beside what they froze

    def __init__(self) -> None:
        self.waiting = set()
        self.train = TrainPlan()  # the plan of the next fit
        self.infer = InferPlan()  # the plan of scoring and generation
        self.log = RunLog()  # what happened, for the record
        self.step: Step | None = None  # of the fit that goes on
        self.watched: dict[str, Tensor] = {}  # what `loss` of a method has put here for the log, not to be learned:
        # means over the learned tokens of the batch, by name
        self.teacher = "reference"  # role of the model that taught last, or that is to teach
        self.folder: Path | None = None  # of this run's own, for checkpoints; gone once its record is written
        self.cache: Path | None = None  # for what other runs may use, too, such as predictions of a teacher
        self.alone: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext  # the machine to oneself
        self.progress: Callable[[str, int, int], None] = lambda unit, done, total: None  # told how far a step has come;
        # returns once those have had their turn who wait to have the machine to themselves
        self.waited = 0.0  # seconds that this run has waited for the machine, inside of `alone` and `progress`
        self.recovered = 0.0  # seconds of scoring that a killed run had done before and that this one has taken over
        self._states: dict[int, tuple[Method, dict[str, Any]]] = {}
        self._shared: dict[Hashable, tuple[Any, set[int]]] = {}  # with what acted as it was computed

    # What is there.

    @property
    @abc.abstractmethod
    def reference(self) -> Any:
        """The unchanged original, loaded when first asked for; probes compare with it, distillation may name it."""

    @property
    @abc.abstractmethod
    def pad(self) -> int:
        """Token id for padding."""

    @abc.abstractmethod
    def targeted(self, path: str) -> bool:
        """Whether methods may replace the linear at `path`: no pattern says that it is to be left alone."""

    @abc.abstractmethod
    def linears(self) -> dict[str, Module]:
        """The linears of all blocks that methods may replace, by path; what lies inside a replaced one is not there."""

    @abc.abstractmethod
    def calibration(self) -> Tensor:
        """[sequences, length] calibration tokens of this run's seed."""

    @abc.abstractmethod
    def role(self, name: str) -> Any:
        """The model of a role: `reference`, `model`, or the name of a snapshot. Raises `Usage` for any other."""

    @abc.abstractmethod
    def reading(self, roles: Any) -> AbstractContextManager[None]:
        """Have `outputs` read these roles of a fit inside."""

    @abc.abstractmethod
    def outputs(self, role: str) -> Any:
        """What the model of a role gives for the batch whose loss is computed, see `effbench.nn.train.outputs`.

        Of what methods declare in `reads`; computed once, whoever asks.
        """

    @abc.abstractmethod
    def adapter(self, name: str | None) -> None:
        """Have the adapter of that name count, and no other; None: none. Raises `Usage` for one that is not there."""

    @abc.abstractmethod
    def tokenizer_of(self, name: str) -> Any:
        """The tokenizer that the model of a role belongs to; None where it comes without one. Raises as `role`."""

    @abc.abstractmethod
    def snapshot(self, name: str) -> None:
        """Put a frozen copy of the model on the shelf under `name`."""

    @abc.abstractmethod
    def shelve(self, name: str, model: Any, tokenizer: Any) -> None:
        """Put another model, which is frozen, and its tokenizer on the shelf under `name`."""

    def state(self, method: Method) -> dict[str, Any]:
        """What this step of the recipe keeps between its hooks and uses; gone with the run.

        Two equal steps of one recipe have a state each.
        """
        return self._states.setdefault(id(method), (method, {}))[1]  # holds the method, so that its id stays its own

    def share(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What one probe computed and another needs: the value kept under `key`, computed by whoever comes first.

        Values are of the model as it is: they are forgotten when a step changes it. Who finds one has met the methods
        that acted when it was computed.
        """
        if key not in self._shared:
            before, self.infer.acted = self.infer.acted, set()
            try:
                self._shared[key] = compute(), self.infer.acted
            finally:
                self.infer.acted = before | self.infer.acted
        value: T
        value, acted = self._shared[key]
        self.infer.acted |= acted
        return value

    @abc.abstractmethod
    def rewrite(self, segments: Segments) -> Segments:
        """A prompt after the plan's prompt methods, in their order. Raises `Unsupported` for one that they cannot take
        because it is not divided."""

    # What kinds and fits ask for.

    @abc.abstractmethod
    def serve(self, method: Method) -> None:
        """Do for a method what its kind promises: see the service of the kind in `effbench.nn.kinds`."""

    @contextlib.contextmanager
    def own_fits(self) -> Iterator[None]:
        """An empty train plan inside, for fits of a method's own; the recipe's waits for the recipe's next fit."""
        outer, self.train = self.train, TrainPlan()
        try:
            yield
        finally:
            self.train.close()
            self.train = outer

    @abc.abstractmethod
    def aside(self, name: str, seed: int | None = None) -> AbstractContextManager[None]:
        """Steps and fits inside leave no trace: the run is afterwards what it was, whatever they did to it.

        Their checkpoints lie in a folder of this name, and of this step of the recipe alone. They may draw from another
        `seed`. Raises as `remember`.
        """

    def attach(self, method: Method) -> None:
        """Put a method's slots and hooks into the plans."""
        plans = {plan.name: plan for plan in (self.train, self.infer)}
        values = method.slot_values()
        for claim in method.slots():
            plan, _, slot = claim.partition(".")
            plans[plan].claim(slot, values.get(slot, method), method)
        for hook in HOOKS:
            if method.overrides(hook):
                self.train.chain(hook).append(method)

    @abc.abstractmethod
    def remember(self) -> Callable[[], None]:
        """A function that puts back in place what a fit may change: model, plans, states of steps, log and chance.

        Raises `Unsupported` where something cannot be kept.
        """

    @abc.abstractmethod
    def settle(self) -> None:
        """Give replaced modules that a fit has trained their final form."""

    @abc.abstractmethod
    def note_swap(self, module: Module, method: Swap, held: bool) -> None:
        """Take note of a module that a `Swap` put in place and that is to settle after a fit.

        held  whether the linear that stood there held weights at zero
        """

    @abc.abstractmethod
    def note_fit(self, report: FitReport) -> None:
        """Write a fit down, and take note that replaced modules have been trained."""
