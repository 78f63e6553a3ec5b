"""The six kinds of method: each reduces `apply` to one override, and the kind's service owns the rest.

The service of a kind is the module `service(kind)`, which does with torch what the kind promises. It is reached by that
name alone, so that core knows nothing of it. A rare method overrides `apply(run)` itself and is then of kind `apply`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effbench.core.method import BUILDERS, HOOKS, Alternatives, Method, Need, Part
from effbench.core.usage import matches_any
from effbench.core.views import SiteKind  # the hints of a method's class are read

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Set

    from effbench.core.run import Run
    from effbench.core.views import Block, Codec, Example, Layer, Module, Segments, SharedInput, Site, Slots, Tensor


@dataclasses.dataclass(frozen=True)
class Select(Method):
    """Chooses, orders or thins out training data.

    Override `score` (larger is kept first), `order` (best first, and read in this order) or `admit` (which may stay).
    What a selection ranks behind those that it keeps waits in reserve, and a later `admit` fills up from there what it
    turns away. `run.data.pool` stays whole.
    """

    must_define: ClassVar[Alternatives] = (("score",), ("order",), ("admit",))
    usual: ClassVar[float] = 1.0  # share of the pool that the first selection of a recipe keeps where it is not told

    # Share of the pool that stays, in (0, 1]; None: as many as an earlier selection left, else `usual`.
    keep: float | None = None

    @property
    def needs_part(self) -> str | None:
        """The part of the data, besides what is trained on, that it cannot do without."""
        return None

    def require_part(self, there: bool, data: str) -> None:
        """Raise `Usage` naming this step unless the part that it needs is there in the data of this name."""
        self.require(there, f"{data} has no {self.needs_part} part, which it looks at; give data= that has one")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        """[N]: the larger, the more worth keeping."""
        raise NotImplementedError

    def order(self, examples: Sequence[Example], run: Run) -> Sequence[int]:
        """Places in `examples`, best first. Where it is overridden, batches are read in this order and not shuffled."""
        return [int(place) for place in self.score(examples, run).argsort(descending=True, stable=True)]

    def admit(self, examples: Sequence[Example], run: Run) -> Iterable[int]:
        """Places of the examples that may stay, from the first on; it is asked for no more than are to be kept.

        `examples` are those that were chosen so far, best first, and behind them the reserve.
        """
        raise NotImplementedError

    def weigh(self, examples: Sequence[Example], run: Run) -> Sequence[float] | None:
        """How much each of those that stay counts in the loss; None: all alike."""
        return None

    def count(self, run: Run) -> int:
        """How many examples it is to keep, where there are so many; where answers are bought, of how many."""
        if run.data.asked is not None:
            return run.data.asked
        share = self.keep if self.keep is not None else None if run.log.selected else self.usual
        return len(run.data.train) if share is None else max(1, round(share * len(run.data.pool)))

    @property
    def keeps_order(self) -> bool:
        """Whether the fit reads examples in the order given."""
        return type(self).order is not Select.order

    @property
    def admits(self) -> bool:
        """Whether it judges examples one by one."""
        return type(self).admit is not Select.admit

    def slots(self) -> tuple[str, ...]:
        return super().slots() + (("train.sampler",) if self.keeps_order and not self.overrides("sampler") else ())

    @property
    def acts_in_fit(self) -> bool:
        return True

    def check(self) -> None:
        self.require(self.keep is None or 0 < self.keep <= 1, "keep is a share of the pool, in (0, 1]")

    def apply(self, run: Run) -> None:
        run.serve(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Weights(Method):
    """Rewrites the weights of every linear in the blocks, layer by layer, from streamed calibration statistics."""

    must_define: ClassVar[Alternatives] = (("compress",), ("compress_block",))
    sequential: ClassVar[bool] = True  # a block's statistics come from inputs that compressed blocks produced
    settles: ClassVar[bool] = True
    type: ClassVar[str] = "PTQ"
    weight_update: ClassVar[str] = "none"

    @property
    def needs(self) -> Set[Need]:
        """Statistics of inputs and gradients that `compress` reads."""
        return frozenset()

    def prepare(self, run: Run) -> Any:
        """Look at the whole model first (global thresholds); what it returns `compress` finds in `layer.prepared`."""

    def scales(self, block: Block, shared: Sequence[SharedInput]) -> Sequence[Tensor | None]:
        """Positive scales [in] to multiply the weights behind each shared input by; None leaves it as it is.

        Their inverse goes into what comes before (`SharedInput.previous`), so that the block computes what it did.
        `compress` then sees weights and statistics with the scales in them.
        """
        return [None] * len(shared)

    def compress(self, layer: Layer) -> Module:
        """The module that takes the layer's place."""
        raise NotImplementedError

    def compress_block(self, block: Block, shared: Sequence[SharedInput]) -> dict[str, Module]:
        """Modules that take the places of a block's linears, by path; by default one linear at a time."""
        return {layer.name: self.compress(layer) for layer in block.layers(shared)}

    @property
    def true_sequence(self) -> bool:
        """Whether groups of linears within a block are compressed one after the other, each on fresh statistics."""
        return False

    def apply(self, run: Run) -> None:
        run.serve(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Swap(Method):
    """Replaces modules by trainable ones; `settle` turns them into their final form once, after training."""

    trains: ClassVar[bool] = True
    must_define: ClassVar[Alternatives] = (("replace",),)
    sites: ClassVar[tuple[SiteKind, ...]] = ("linear",)  # what sort of modules it replaces

    @property
    def targets(self) -> Literal["all"] | tuple[str, ...]:
        """Names or patterns of the modules that are replaced; a method may have a field of this name."""
        return "all"

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the sites that it takes, see `Site`; empty: all."""
        return frozenset()

    def wants(self, path: str) -> bool:
        """Whether the module at `path` is to be replaced, by its name."""
        name = path.rpartition(".")[2]
        return self.targets == "all" or matches_any(name, self.targets)

    def prepare(self, run: Run) -> Any:
        """What all sites share; `replace` finds it in `site.prepared`."""

    def replace(self, module: Module, site: Site) -> Module:
        """The module that takes the place of `module` and may hold it, or `module` itself with something added."""
        raise NotImplementedError

    def settle(self, module: Module) -> Module:
        """The final form of a module that `replace` made (merged, packed); by default itself."""
        return module

    def apply(self, run: Run) -> None:
        run.serve(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Train(Method):
    """Changes the next `fit` through hooks and slots, and is undone at its end."""

    trains: ClassVar[bool] = True
    must_define: ClassVar[Alternatives] = (*((hook,) for hook in (*HOOKS, *BUILDERS)), ("slot_values",), ("claims",))

    def apply(self, run: Run) -> None:
        run.serve(self)


@dataclasses.dataclass(frozen=True)
class Cache(Method):
    """Keeps fewer cached tokens, or stores them in fewer bits, during inference.

    Override `score` and `capacity` to evict (`Evict` has the usual capacities), `codecs` to encode, or set `reach`.
    Everything is per layer and key-value head, and goes by the tokens of a row without its padding. A cache settles
    after every forward pass but those that feed a part of the prompt: then methods evict, in their order, then the
    oldest tokens are encoded.
    """

    must_define: ClassVar[Alternatives] = (("score", "capacity"), ("codecs",), ("reach",))
    evicts_later: ClassVar[bool] = True  # False: only once, where the prompt ends
    observes: ClassVar[bool] = False  # True: `score` reads `mass`, which costs the fused attention

    def open(self, run: Run) -> Any:
        """What the caches of this run's plan need to know: a seed, trained parts. Handed to `score` as `state`."""
        return None

    def score(self, slots: Slots, state: Any) -> Tensor:
        """[B, Hkv, S]: slots with the largest are kept."""
        raise NotImplementedError

    def capacity(self, prompt: Tensor) -> Tensor:
        """[B] slots that each head keeps, of the tokens [B] of the prompt (without one, of those seen so far)."""
        raise NotImplementedError

    def recents(self, capacity: Tensor) -> Tensor:
        """[B] how many of them are the newest tokens, whatever their score."""
        return capacity * 0

    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """How keys and how values are stored; None: as they are."""
        raise NotImplementedError

    @property
    def observed(self) -> int:
        """Last queries of the prompt whose attention `score` reads as `votes`."""
        return 0

    @property
    def reach(self) -> int | None:
        """Newest tokens that a query sees, itself among them; None: all that are held."""
        return None

    @property
    def evicts(self) -> bool:
        """Whether it keeps fewer tokens."""
        return type(self).score is not Cache.score

    @property
    def touches(self) -> frozenset[Part]:
        return super().touches | {"cache"}

    def slots(self) -> tuple[str, ...]:
        own = (
            ("infer.encoder", type(self).codecs is not Cache.codecs),
            ("infer.reach", type(self).reach is not Cache.reach),
        )
        return super().slots() + tuple(slot for slot, writes in own if writes)

    def apply(self, run: Run) -> None:
        run.serve(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Evict(Cache):
    """Keeps a number of tokens, or a share of the prompt that is fixed where the prompt ends."""

    must_define: ClassVar[Alternatives] = (("score",),)
    usual: ClassVar[float] = 0.25  # share of the prompt where neither is given

    budget: int | None = None  # tokens that each head keeps, all in all
    keep: float | None = None  # share of the prompt's tokens that it keeps, in (0, 1]; None: the budget, else the usual

    def check(self) -> None:
        self.require(self.budget is None or self.keep is None, "give budget or keep, not both")
        self.require(self.budget is None or self.budget >= 1, "budget must be at least 1")
        self.require(self.keep is None or 0 < self.keep <= 1, "keep is a share of the prompt, in (0, 1]")

    def capacity(self, prompt: Tensor) -> Tensor:
        if self.budget is not None:
            return prompt * 0 + self.budget
        return (prompt * (self.usual if self.keep is None else self.keep)).round().long().clamp(min=1)


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """Shortens prompts before they reach the model."""

    must_define: ClassVar[Alternatives] = (("rewrite",),)
    asks: ClassVar[bool] = False  # True: it reads the question, so that prompts without one are `unsupported`

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        """Segments with the same roles and fewer tokens; the last token of a prompt stays whatever is said here.

        Raises `Refused` for a prompt that is too short for what is asked.
        """
        raise NotImplementedError

    @property
    def touches(self) -> frozenset[Part]:
        return super().touches | {"prompt"}

    def apply(self, run: Run) -> None:
        run.serve(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Shorten(Prompt):
    """Keeps a share of what it may shorten, or more where answers would change too much."""

    must_define: ClassVar[Alternatives] = (("rewrite",),)

    keep: float = 0.5  # share of the tokens of the whole prompt that stay, in (0, 1]; contexts have what others leave
    bound: float | None = None  # KL of the answer, in nats a token, up to which it goes: `keep` grows by 0.1 until then

    def check(self) -> None:
        self.require(0 < self.keep <= 1, "keep is a share of the prompt, in (0, 1]")
        self.require(self.bound is None or self.bound >= 0, "bound is a divergence in nats, at least 0")


KINDS: dict[str, type[Method]] = {kind.__name__: kind for kind in (Select, Weights, Swap, Train, Cache, Prompt)}

BASES: dict[str, type[Method]] = KINDS | {base.__name__: base for base in (Evict, Shorten)}  # of methods, by name


def kind_of(method: type[Method]) -> str:
    """Name of the kind a method class belongs to; `apply` for one that overrides the verb itself."""
    return next((name for name, kind in KINDS.items() if issubclass(method, kind)), "apply")


def service(kind: str) -> str:
    """Name of the module whose `apply(run, method)` serves the methods of a kind."""
    return f"effbench.nn.kinds.{kind.lower()}"
