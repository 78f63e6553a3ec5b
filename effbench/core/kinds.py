"""The six kinds of method: each reduces `apply` to one override, and the kind's service owns the rest.

The service of a kind is the module `service(kind)`, which does with torch what the kind promises. It is reached by that
name alone, so that core knows nothing of it. A rare method overrides `apply(run)` itself and is then of kind `apply`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effbench.core.method import BUILDERS, HOOKS, Alternatives, Method, Need
from effbench.core.usage import matches_any
from effbench.core.views import SiteKind  # the hints of a method's class are read

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence, Set

    from effbench.core.run import Run
    from effbench.core.views import Block, Example, Layer, Module, Segments, SharedInput, Site, Slots, Tensor


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
    """Keeps fewer cached tokens (`keep`), or stores them in fewer bits (`encode`, `decode`), during inference."""

    must_define: ClassVar[Alternatives] = (("keep",), ("encode", "decode"))

    def keep(self, layer: Slots) -> Tensor:
        """Indices of the slots that stay, [B, Hkv, kept]."""
        raise NotImplementedError

    def encode(self, keys: Tensor, values: Tensor) -> Any:
        """Store keys and values [B, Hkv, T, D] in fewer bytes."""
        raise NotImplementedError

    def decode(self, stored: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, T, D] of what `encode` stored."""
        raise NotImplementedError

    @property
    def evicts(self) -> bool:
        """Whether it keeps fewer tokens."""
        return type(self).keep is not Cache.keep

    def slots(self) -> tuple[str, ...]:
        return super().slots() + (("infer.encoder",) if type(self).encode is not Cache.encode else ())

    def apply(self, run: Run) -> None:
        run.serve(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """Shortens prompts before they reach the model."""

    must_define: ClassVar[Alternatives] = (("rewrite",),)

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        """Segments with the same roles and fewer tokens."""
        raise NotImplementedError

    def apply(self, run: Run) -> None:
        run.serve(self)
        super().apply(run)


KINDS: dict[str, type[Method]] = {kind.__name__: kind for kind in (Select, Weights, Swap, Train, Cache, Prompt)}


def kind_of(method: type[Method]) -> str:
    """Name of the kind a method class belongs to; `apply` for one that overrides the verb itself."""
    return next((name for name, kind in KINDS.items() if issubclass(method, kind)), "apply")


def service(kind: str) -> str:
    """Name of the module whose `apply(run, method)` serves the methods of a kind."""
    return f"effbench.nn.kinds.{kind.lower()}"
