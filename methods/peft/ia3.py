"""(IA)³: trained vectors that rescale keys, values and what is inside the MLPs (Liu et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.core.kinds import Swap
from effbench.core.run import Run
from effbench.core.views import Site
from effbench.nn.model.adapters import NAMED, is_name, join_name
from effbench.nn.model.beside import Beside, Merge
from effbench.nn.model.blocks import Blocks, count_heads
from effbench.nn.model.linear import dense_weight, kept, matrix_shape
from effbench.nn.model.structure import heads

FUSED = 3  # queries, keys and values in one projection


class IA3Linear(Beside):
    """l * (W x + b), or W (l * x) + b.

    `scales`: "out" or "in", that l is as long as; "qkv": l is that of the keys and values that stand behind as many
    queries among the outputs, in each of `heads` parts.
    """

    leaves_bias = True

    def __init__(self, in_features: int, out_features: int, scales: str, heads: int = 1, **common: Any) -> None:
        super().__init__(in_features, out_features, **common)
        self.scales, self.heads = scales, heads
        size = {"in": in_features, "out": out_features, "qkv": out_features // FUSED * (FUSED - 1)}[scales]
        self.l = nn.Parameter(torch.ones(size, dtype=torch.float32))

    def factor(self) -> Tensor:
        """What inputs [in] or outputs [out] are multiplied by."""
        if self.scales != "qkv":
            return self.l
        rescaled = self.l.view(self.heads, -1)
        queries = torch.ones_like(rescaled[:, : rescaled.shape[1] // (FUSED - 1)])
        return torch.cat([queries, rescaled], 1).flatten()

    def dense_weight(self) -> Tensor:
        weight, factor = dense_weight(self.base), self.factor().detach()
        if not self.active:
            return weight
        return weight * (factor if self.scales == "in" else factor[:, None])

    def dense_bias(self) -> Tensor | None:
        bias = super().dense_bias()
        return bias * self.factor() if self.active and self.scales != "in" and bias is not None else bias

    def kept(self) -> Tensor | None:
        return kept(self.base)  # a zero stays zero

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
        return self.base(self.rescale(x)) if self.scales == "in" else self.rescale(self.base(x))

    def rescale(self, x: Tensor) -> Tensor:
        """Inputs or outputs times their factor, which is float32."""
        return (x * self.factor()).to(x.dtype)

    def config(self) -> dict[str, Any]:
        return super().config() | {"scales": self.scales, "heads": self.heads}


@dataclass(frozen=True)
class IA3(Swap):
    """Section 3.3: l_k and l_v on the outputs of the projections to keys and values, l_ff on the input of the last
    projection of the MLP. They start at one, and can be merged into weights and biases; see `lora` for `merge`.
    """

    paper = "arXiv:2205.05638"
    published = "ia3(), fit(steps=1000, lr=0.003, batch_size=8, schedule='linear', warmup=0.06)"
    caveats = ("without T-Few's Adafactor, terms for unlikely answers and for their length, and pre-trained vectors",)
    type = "PEFT"
    weight_update = "rescaling"
    merges = stacks = True

    merge: Merge = "masked"  # what becomes of the vectors after the fit
    adapter: str = ""  # a name to keep them by, beside others; they are then not merged

    def check(self) -> None:
        self.require(is_name(self.adapter), NAMED)

    @property
    def roles(self) -> frozenset[str]:
        return frozenset({"k", "v", "qkv", "down"})

    @property
    def fills(self) -> tuple[str, ...]:
        return (join_name("ia3", self.adapter),) if self.adapter else ()  # without a name they are merged

    def prepare(self, run: Run) -> int | None:
        """Width of each head, where a fused projection holds queries, keys and values head by head.

        Raises `Unsupported` where a fused projection holds fewer keys than queries.
        """
        view = Blocks(run.model)
        if len(view.names.qkv) == 1 and any(heads(view, index).share > 1 for index in range(len(view))):
            raise Unsupported(
                f"{view.names.qkv[0]}: (IA)³ finds keys behind as many queries, and here heads share them"
            )
        return count_heads(view.blocks[0].get_submodule(view.names.attention))[1] if view.names.interleaved else None

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        scales = {"down": "in", "qkv": "qkv"}.get(site.role, "out")
        heads = matrix_shape(module)[0] // (FUSED * site.prepared) if scales == "qkv" and site.prepared else 1
        return IA3Linear.of(module, scales=scales, heads=heads, adapter=self.adapter)

    def settle(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, IA3Linear)
        return module.settle(self.merge)
