"""GaLore: AdamW on gradients projected to their leading singular vectors (Zhao et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench import ops
from effbench.core.errors import Diverged, Unsupported
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.nn.model.linear import MaskedLinear


def find_bases(gradient: Tensor, rank: int, projection: str) -> dict[str, Tensor]:
    """The leading singular vectors of a gradient [m, n] as columns of `left` [m, r], rows of `right` [r, n], or both.

    One side is the shorter one, the right one of a square. They come from a decomposition in float32, whatever the
    gradient's type. Raises `Diverged` for a gradient that is not finite.
    """
    if not gradient.isfinite().all():
        raise Diverged("a gradient that is to be decomposed is not finite")
    left, _, right = torch.linalg.svd(gradient.float(), full_matrices=False)
    bases = {"left": left[:, :rank], "right": right[:rank]}
    if projection == "one-sided":
        side = "right" if gradient.shape[0] >= gradient.shape[1] else "left"
        bases = {side: bases[side]}
    return {side: basis.to(gradient.dtype).contiguous() for side, basis in bases.items()}


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW that keeps the moments of matrices in a small space; groups without a `rank` have moments of full size."""

    def __init__(self, groups: Any, every: int, scale: float, projection: str, decay: str) -> None:
        super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-6, "rank": None, "transposed": False})
        self.every, self.scale, self.projection, self.decay = every, scale, projection, decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that there are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state, weight, gradient = self.state[parameter], parameter.data, parameter.grad
        if group["transposed"]:
            weight, gradient = weight.T, gradient.T
        if group["rank"] is not None and state.get("age", self.every) >= self.every:
            alive = bool(gradient.any())
            if alive or not state:  # a gradient of zero has no directions: the old basis stays until one has
                state |= find_bases(gradient, group["rank"], self.projection)
                state["age"] = 0 if alive else self.every
        left, right = state.get("left"), state.get("right")
        if "m" not in state:
            low = gradient if left is None else gradient[: left.shape[1]]
            low = low if right is None else low[:, : len(right)]
            state |= {"step": 0, "m": low.new_zeros(low.shape), "v": low.new_zeros(low.shape)}
        state["step"] += 1
        if "age" in state:
            state["age"] += 1  # moments are neither reset nor turned with the basis, as in the authors' code
        ops.load("galore_adamw")(
            weight, gradient, left, right, state["m"], state["v"], state["step"], group["lr"], *group["betas"],
            group["eps"], group["weight_decay"], self.scale if "age" in state else 1.0, self.decay == "before",
        )  # fmt: skip


@dataclass(frozen=True)
class GaLore(Train):
    """Only attention and MLP linears are projected, on the shorter side of [out, in]; all else has plain AdamW.

    With a gradient G and its leading singular vectors P: R = P^T G, N = Adam(R), W <- W - lr scale P N, or the same on
    the right (algorithm 2 of the paper). P is taken anew every so many steps.
    """

    paper = "arXiv:2403.03507"
    published = "galore(), fit(steps=10000, lr=0.01, batch_size=512, warmup=0.1, max_length=256)"
    caveats = ("published for pretraining from scratch, LLaMA of 60 million weights; the paper tunes rank by size",)
    type = "optimizer states"
    weight_update = "training"
    tuned = {"rank": (32, 128), "scale": (0.25, 1.0)}
    trials = ({"rank": 8, "every": 2}, {"rank": 8, "projection": "two-sided", "decay": "before"})

    rank: int = 128  # singular vectors that are kept; moments are rank x n
    every: int = 200  # steps between decompositions
    scale: float = 0.25  # of the update of projected matrices, alpha in the paper
    projection: Literal["one-sided", "two-sided"] = "one-sided"  # on the shorter side; or on both, moments rank x rank
    decay: Literal["after", "before"] = "after"  # of the weights, after the update as in the authors' code, or before
    # it as in AdamW

    def check(self) -> None:
        self.require(min(self.rank, self.every) > 0, "rank and every must be at least 1")
        self.require(self.scale > 0, "scale must be above 0")

    def optimizer(self, groups: list[dict[str, Any]], run: Run) -> Any:
        dense = [module for module in run.linears().values() if isinstance(module, (nn.Linear, Conv1D, MaskedLinear))]
        turned = {module.weight: isinstance(module, Conv1D) for module in dense}
        divided = []
        for group in groups:
            for transposed in (None, False, True):
                chosen = [parameter for parameter in group["params"] if turned.get(parameter) is transposed]
                rank = None if transposed is None else self.rank
                divided.append(group | {"params": chosen, "rank": rank, "transposed": bool(transposed)})
        if not any(group["params"] for group in divided if group["rank"] is not None):
            raise Unsupported(
                "no linear has a weight that is trained itself: leave out the step that froze or packed it"
            )
        return GaLoreAdamW(
            [group for group in divided if group["params"]], self.every, self.scale, self.projection, self.decay
        )
