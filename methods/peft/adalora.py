"""AdaLoRA: ranks move to the matrices where they matter, within one budget for the whole model (Zhang et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effbench.core.run import Run
from effbench.core.views import Site
from effbench.methods.peft._lowrank import LowRank, LowRankLinear

FACTORS = ("p", "singular", "q")


class SVDLinear(LowRankLinear):
    """D = scaling * P diag(lambda) Q (equation 3): P [out, rank], lambda [rank, 1], Q [rank, in].

    The scaling is that of the initial rank, however many lambdas are left.
    """

    output_factors = ("p",)
    step: AdaLoRA | None = None  # that has put it in place: two of equal settings are two

    def __init__(
        self, in_features: int, out_features: int, rank: int, initial_rank: int, alpha: float, **common: Any
    ) -> None:
        super().__init__(in_features, out_features, **common)
        self.initial_rank, self.alpha = initial_rank, alpha
        self.p = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32).normal_(std=0.02))
        self.singular = nn.Parameter(torch.zeros(rank, 1, dtype=torch.float32))
        self.q = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32).normal_(std=0.02))

    @property
    def scaling(self) -> float:
        """What the product counts, with the authors' guard against a rank of zero."""
        return self.alpha / (self.initial_rank + 1e-5)

    def delta(self) -> Tensor:
        return self.scaling * (self.p @ (self.singular * self.q))

    def add(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.scaling * self.singular * self.q), self.p)

    def config(self) -> dict[str, Any]:
        ranks = {"rank": len(self.q), "initial_rank": self.initial_rank}
        return super().config() | ranks | {"alpha": self.alpha}

    @torch.no_grad()
    def trim(self) -> None:
        """Let go of what a lambda of zero leaves without effect."""
        kept = self.singular.flatten() != 0
        for name, value in (("p", self.p[:, kept]), ("singular", self.singular[kept]), ("q", self.q[kept])):
            setattr(self, name, nn.Parameter(value.clone(), requires_grad=getattr(self, name).requires_grad))


@dataclass(frozen=True)
class AdaLoRA(LowRank):
    """Starts from `initial_rank` everywhere and ends with `rank` on average.

    The whole schedule is in shares of the fit, so that it holds for any number of steps; the defaults are about what
    the authors' scripts come to. Where the budget stands is final before the last `final` of the fit begins. A lambda
    that was masked before goes on training, and counts again if its importance rises. The published code adds the
    regularizer with a weight of 0.1 to 0.5.
    """

    paper = "arXiv:2303.10512"
    caveats = ("on every linear; the schedule is in shares of the fit, where the paper tunes numbers of steps by task",)
    weight_update = "low rank, chosen by matrix"
    tuned = {"rank": (4, 8)}
    trials = ({}, {"merge": "separate"})

    rank: int = 8  # on average, in the end
    initial_rank: int = 12  # of every matrix at the start
    alpha: float = 32.0  # the product counts alpha / initial_rank times
    orthogonality: float = 0.5  # weight of the term that keeps P and Q orthogonal
    beta: float = 0.85  # of the averages of sensitivity and uncertainty
    warmup: float = 0.1  # share of the fit before the budget falls
    final: float = 0.3  # share of the fit after it has fallen
    interval: float = 0.001  # share of the fit between two choices of what is masked; at least a step

    def check(self) -> None:
        super().check()
        self.require(self.initial_rank >= self.rank, "initial_rank must be at least rank")
        self.require(self.orthogonality >= 0, "orthogonality must not be negative")
        self.require(0 < self.beta < 1, "beta must be in (0, 1)")
        self.require(min(self.warmup, self.final, self.interval) >= 0, "warmup, final and interval are shares of a fit")
        self.require(self.interval < 1, "interval is a share of the fit, below 1")
        self.require(self.warmup + self.final < 1, "warmup and final leave no part of the fit between them")

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        ranks = {"rank": self.initial_rank, "initial_rank": self.initial_rank}
        made = SVDLinear.of(module, **ranks, alpha=self.alpha, **self.beside)
        made.step = self
        return made

    def settle(self, module: nn.Module) -> nn.Module:
        final = super().settle(module)
        if isinstance(final, SVDLinear):
            final.trim()
        return final

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        # Equation 4 with the norm itself, and the mean over all P and Q, as in the authors' code.
        linears = self._find(run).values()
        if not linears:  # another adapter is chosen
            return {}
        grams = [gram for module in linears for gram in (module.p.T @ module.p, module.q @ module.q.T)]
        norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
        return {"orthogonality": self.orthogonality * torch.stack(norms).mean()}

    @torch.no_grad()
    def on_step(self, run: Run) -> None:
        assert run.step is not None
        step, total = run.step.index + 1, run.step.total
        start, end = int(self.warmup * total), total - int(self.final * total)
        linears, state = self._find(run), run.state(self)
        if not linears:
            return
        if "kept" not in state and (step < end or not state):
            self.follow(linears, state)
        if step >= end and state and "kept" not in state:
            kept = choose(linears, state, self.rank * len(linears))
            state.clear()
            state["kept"] = kept
        if "kept" in state:
            mask(linears, state["kept"])
        elif start < step and step % max(1, round(self.interval * total)) == 0:
            mask(linears, choose(linears, state, self.budget(len(linears), (step - start) / (end - start))))

    def budget(self, linears: int, done: float) -> int:
        """Lambdas that are left in all at a point of the way down, from 0 to 1: the cubic schedule of equation 10."""
        first, last = self.initial_rank * linears, self.rank * linears
        return int(last + (first - last) * (1 - done) ** 3)

    def follow(self, linears: dict[str, SVDLinear], state: dict[str, Any]) -> None:
        """Average sensitivity and uncertainty of every weight; weights are those after the step, gradients before."""
        for name, weight in _weights(linears):
            assert weight.grad is not None
            sensitivity, uncertainty = (
                state.setdefault(what, {}).get(name, torch.zeros_like(weight)).to(weight.device)
                for what in ("sensitivity", "uncertainty")
            )
            now = (weight * weight.grad).abs()  # equation 7
            sensitivity = sensitivity.lerp(now, 1 - self.beta)  # equation 8
            uncertainty = uncertainty.lerp((now - sensitivity).abs(), 1 - self.beta)  # equation 9
            state["sensitivity"][name], state["uncertainty"][name] = sensitivity, uncertainty

    def _find(self, run: Run) -> dict[str, SVDLinear]:
        """What this step has put beside linears, by path."""
        return {
            path: module
            for path, module in run.model.named_modules()
            if isinstance(module, SVDLinear) and module.step is self and module.active and module.singular.requires_grad
        }


def _weights(linears: dict[str, SVDLinear]) -> list[tuple[str, nn.Parameter]]:
    return [(f"{path}.{name}", getattr(module, name)) for path, module in linears.items() for name in FACTORS]


def choose(linears: dict[str, SVDLinear], state: dict[str, Any], budget: int) -> dict[str, Tensor]:
    """Which lambdas are left, bool [rank, 1] by path: the `budget` of the highest importance in the whole model."""
    scores = {path: importance(path, state) for path in linears}
    pooled = torch.cat(list(scores.values()))
    kept = torch.zeros_like(pooled, dtype=torch.bool)
    kept[pooled.argsort(descending=True, stable=True)[:budget]] = True
    parts = kept.split([len(score) for score in scores.values()])
    return {path: part.unsqueeze(1) for path, part in zip(scores, parts, strict=True)}


def importance(path: str, state: dict[str, Any]) -> Tensor:
    """S_k = s(lambda_k) + mean s(P_k) + mean s(Q_k) [rank], with s = sensitivity * uncertainty (equations 5 and 9)."""
    p, singular, q = (state["sensitivity"][f"{path}.{n}"] * state["uncertainty"][f"{path}.{n}"] for n in FACTORS)
    return singular.flatten() + p.mean(0) + q.mean(1)


def mask(linears: dict[str, SVDLinear], kept: dict[str, Tensor]) -> None:
    """Set lambdas to zero that are not kept (equation 6)."""
    for path, module in linears.items():
        module.singular.mul_(kept[path].to(module.singular.device))
