"""A frozen linear, and what is trained beside it: what low-rank and other additive methods have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Refused
from effbench.nn.model.linear import Replaced, dense_bias, dense_weight, kept, make_linear, rebuilt
from effbench.nn.precision import widen

Merge = Literal["masked", "dense", "separate"]


class Beside(Replaced):
    """y = x (W + D)^T + b: W stays frozen in `base`, D [out, in] is what a subclass trains, kept in float32.

    `masked`: where the base holds a weight at zero, so does the sum; D is masked while it is trained, too. A module
    with the name of an `adapter` counts only while that is the adapter chosen, see `effbench.nn.model.adapters`.
    """

    leaves_bias: ClassVar[bool] = False  # True: what is trained acts on the bias too, which stays in `base`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        masked: bool = False,
        adapter: str = "",
        base: nn.Module | None = None,
    ) -> None:
        super().__init__(in_features, out_features)
        self.base = nn.Linear(in_features, out_features, bias=False) if base is None else base
        self.masked, self.adapter = masked, adapter
        self.active = True
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features))

    @classmethod
    def of(cls, base: nn.Module, **settings: Any) -> Self:
        """Stand in front of `base`; its bias moves here, and what was frozen stays so.

        `settings` are the subclass's own.
        """
        name = settings.get("adapter", "")
        if name and any(type(inner) is cls and inner.adapter == name for inner in _walk_down(base)):
            raise Refused(f"there is a {cls.__name__} of adapter {name!r} already: give another name")
        if isinstance(base, Conv1D):
            needed = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
            base = rebuilt(base, dense_weight(base)).train(base.training)
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(needed[name])
        module = cls(base.in_features, base.out_features, base=base, **settings)  # type: ignore[arg-type]
        if not (cls.leaves_bias or (isinstance(base, Beside) and base.leaves_bias)):
            module.bias, base.bias = base.bias, None  # type: ignore[assignment]
        return module.train(base.training).to(next((p.device for p in base.parameters()), torch.device("cpu")))

    def delta(self) -> Tensor:
        """D [out, in], before it is masked."""
        raise NotImplementedError

    def add(self, x: Tensor) -> Tensor:
        """x D^T, where that takes less than making D."""
        return nn.functional.linear(x, self.delta())

    def read(self, x: Tensor) -> Tensor:
        """What D is applied to; by default the input itself."""
        return x

    def dense_weight(self) -> Tensor:
        weight, mask = dense_weight(self.base), self._mask
        if not self.active:
            return weight
        delta = self.delta().detach()
        return weight + (delta if mask is None else delta * mask)

    def dense_bias(self) -> Tensor | None:
        """Its own bias and, where that did not move here, the one of `base`."""
        parts = [part for part in (self.bias, dense_bias(self.base)) if part is not None]
        return parts[0] if len(parts) == 1 else sum(parts) if parts else None  # type: ignore[return-value]

    def kept(self) -> Tensor | None:
        return kept(self.base) if self.masked or not self.active else None

    def rebuilt(self, weight: Tensor) -> nn.Module:
        module, bias = rebuilt(self.base, weight), self.dense_bias()
        made = bias is not None and bias is not self.bias
        module.bias = nn.Parameter(bias.detach()) if made else self.bias  # type: ignore[assignment, union-attr]
        return module

    def settle(self, merge: Merge) -> nn.Module:
        """The final form: in what stood there, as one dense linear, or beside it as it is."""
        if merge == "separate" or self.adapter:
            return self
        weight = self.dense_weight()
        return make_linear(weight, self.dense_bias()) if merge == "dense" else self.rebuilt(weight)

    def config(self) -> dict[str, Any]:
        return super().config() | {"masked": self.masked, "adapter": self.adapter}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.active:
            inside = dense_bias(self.base)  # which did not move here
            y = (self.changed(x, y) if inside is None else self.changed(x, y - inside) + inside).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        """x (W + D)^T where y = x W^T, before it is rounded."""
        return y + self.added(self.read(widen(x)))

    def added(self, read: Tensor) -> Tensor:
        """What D, masked, makes of what it is applied to."""
        mask = self._mask
        return self.add(read) if mask is None else nn.functional.linear(read, self.delta() * mask)

    @property
    def _mask(self) -> Tensor | None:
        """What D is multiplied by."""
        return kept(self.base) if self.masked else None


class Merged(NamedTuple):
    """Squared norms of what a merge was to put into a weight, and of what rounding took away."""

    product: float
    lost: float


@torch.no_grad()
def measure_merge(module: Beside, stored: nn.Module) -> Merged:
    """What became of the product of `module` in the linear that took its place, as that is stored."""
    exact = module.dense_weight()
    lost = dense_weight(stored) - exact
    return Merged(float((exact - dense_weight(module.base)).square().sum()), float(lost.square().sum()))


def _walk_down(module: nn.Module) -> Iterator[Any]:
    """What stands in front of a linear, from the outside."""
    while isinstance(module, Beside):
        yield module
        module = module.base
