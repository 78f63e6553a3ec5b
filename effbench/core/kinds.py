"""The six kinds of method: each reduces `apply` to one override, and the run owns the rest.

A rare method overrides `apply(run)` itself and is then of kind `apply`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effbench.core.method import HOOKS, Alternatives, Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from effbench.core.run import Run
    from effbench.nn.calibration import BlockInputs, Layer
    from effbench.nn.data import Example, Segments
    from effbench.nn.infer.cache import Slots
    from effbench.nn.model.blocks import Group

Need = Literal["norm", "hessian", "raw", "grad", "grad_abs", "grad2"]


@dataclasses.dataclass(frozen=True)
class Select(Method):
    """Chooses or orders training data. Ranks `run.data.pool`, writes `run.data.train`.

    Override `score` (larger is kept first) or `order` (example indices, best first).
    """

    must_define: ClassVar[Alternatives] = (("score",), ("order",))

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        """[N]: the larger, the more worth keeping."""
        raise NotImplementedError

    def order(self, examples: Sequence[Example], run: Run) -> Sequence[int]:
        """Indices into `examples`, best first; may be shorter than the pool."""
        scores = self.score(examples, run)
        return [int(i) for i in scores.argsort(descending=True, stable=True)]

    def apply(self, run: Run) -> None:
        run.select(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Weights(Method):
    """Rewrites the weights of every linear in the blocks, layer by layer, from streamed calibration statistics."""

    must_define: ClassVar[Alternatives] = (("compress",), ("compress_block",))
    needs: ClassVar[set[Need]] = set()  # statistics of the inputs and gradients that `compress` reads
    sequential: ClassVar[bool] = True  # a block's statistics come from inputs that compressed blocks produced
    folds: ClassVar[bool] = False  # moves scales into other modules, so weights do not compare before and after
    settles: ClassVar[bool] = True
    type: ClassVar[str] = "PTQ"  # facts for the comparison table
    weight_update: ClassVar[str] = "none"

    def prepare(self, run: Run) -> Any:
        """Look at the whole model first (global thresholds); what it returns `compress` finds in `layer.prepared`."""

    def compress(self, layer: Layer) -> nn.Module:
        """The module that takes the layer's place."""
        raise NotImplementedError

    def compress_block(self, block: BlockInputs, groups: Sequence[Group]) -> dict[str, nn.Module]:
        """Modules that take the places of a block's linears, by path; by default one linear at a time."""
        return {layer.name: self.compress(layer) for layer in block.layers(groups)}

    @property
    def true_sequence(self) -> bool:
        """Whether groups of linears within a block are compressed one after the other, each on fresh statistics."""
        return False

    def apply(self, run: Run) -> None:
        run.stream(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Swap(Method):
    """Replaces linears by trainable ones; `settle` turns them into their final form once, after training."""

    must_define: ClassVar[Alternatives] = (("replace",),)

    def wants(self, path: str) -> bool:
        """Whether the linear at `path` is to be replaced: by its name, where a method has the field `targets`."""
        targets: Literal["all"] | tuple[str, ...] = getattr(self, "targets", "all")
        name = path.rpartition(".")[2]
        return targets == "all" or any(fnmatch.fnmatchcase(name, target) for target in targets)

    def replace(self, module: nn.Module) -> nn.Module:
        """The module that takes the place of `module` and may hold it."""
        raise NotImplementedError

    def settle(self, module: nn.Module) -> nn.Module:
        """The final form of a module that `replace` made (merged, packed); by default itself."""
        return module

    def apply(self, run: Run) -> None:
        run.swap(self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Train(Method):
    """Changes the next `fit` through hooks and slots, and is undone at its end."""

    must_define: ClassVar[Alternatives] = (*((hook,) for hook in HOOKS), ("slot_values",), ("claims",))

    def slot_values(self) -> dict[str, Any]:
        """What to write in each slot named by `claims`."""
        return {}

    def apply(self, run: Run) -> None:
        run.attach(self)


@dataclasses.dataclass(frozen=True)
class Cache(Method):
    """Keeps fewer cached tokens (`keep`), or stores them in fewer bits (`encode`, `decode`), during inference."""

    must_define: ClassVar[Alternatives] = (("keep",), ("encode", "decode"))
    unit: ClassVar[Literal["token", "block"]] = "token"  # what an encoder can evict at a time

    def keep(self, layer: Slots) -> Tensor:
        """Indices of the slots that stay, [B, Hkv, kept]."""
        raise NotImplementedError

    def encode(self, keys: Tensor, values: Tensor) -> Any:
        """Store keys and values [B, Hkv, T, D] in fewer bytes."""
        raise NotImplementedError

    def decode(self, stored: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, T, D] of what `encode` stored."""
        raise NotImplementedError

    def slots(self) -> tuple[str, ...]:
        return super().slots() + (("infer.encoder",) if type(self).encode is not Cache.encode else ())

    def apply(self, run: Run) -> None:
        if type(self).keep is not Cache.keep:
            run.infer.chain("cache_keep").append(self)
        if type(self).encode is not Cache.encode:
            run.infer.claim("encoder", self, self)
        super().apply(run)


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """Shortens prompts before they reach the model."""

    must_define: ClassVar[Alternatives] = (("rewrite",),)

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        """Segments with the same roles and fewer tokens."""
        raise NotImplementedError

    def apply(self, run: Run) -> None:
        run.infer.chain("prompt").append(self)
        super().apply(run)


KINDS: dict[str, type[Method]] = {kind.__name__: kind for kind in (Select, Weights, Swap, Train, Cache, Prompt)}


def kind_of(method: type[Method]) -> str:
    """Name of the kind a method class belongs to; `apply` for one that overrides the verb itself."""
    return next((name for name, kind in KINDS.items() if issubclass(method, kind)), "apply")
