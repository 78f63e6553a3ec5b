"""Learned masks: n:m candidates by Gumbel-softmax (MaskLLM, Fang et al., 2024), or L0 gates (Louizos et al., 2018)."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.formats.sparse import Pattern
from effbench.methods.prune._common import check_pattern, keep_mask, to_groups
from effbench.methods.prune._l0 import HardConcreteMask, close, density
from effbench.methods.prune._training import (
    TrainedMask,
    find_masks,
    freeze,
    mask_linears,
    split_group,
    train_like,
    trainable_linears,
)
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, rebuilt

MOST = 70  # candidates of a group: those of 4:8


class CandidateMask(TrainedMask):
    """A soft choice, drawn anew at every step, among all masks that keep n of m weights; one for every m inputs."""

    candidates: Tensor  # [candidates, m], 0 and 1

    def __init__(
        self, linear: nn.Module, path: str, seed: int, method: LearnedMask, source: nn.Module | None = None
    ) -> None:
        super().__init__(source or linear, path, seed)
        self.method = method
        weight = self.weight.detach().float()
        _, n, m = Pattern.of(method.pattern)
        rows = [[float(i in chosen) for i in range(m)] for chosen in itertools.combinations(range(m), n)]
        self.register_buffer("candidates", torch.tensor(rows, device=weight.device))
        groups = len(to_groups(weight, method.pattern, "local"))
        logits = 0.01 * torch.randn(groups, len(rows), generator=self.generator("start"), device=weight.device)
        if method.prior == "magnitude":
            # The paper's mask prior: candidates that share more with the mask of the largest weights start with larger
            # logits.
            largest = keep_mask(dense_weight(linear).abs(), method.sparsity, method.pattern)
            prior = largest.float().view(-1, m)
            overlap = prior @ self.candidates.T - n * n / m  # 0 on average over the candidates
            logits += method.prior_strength * logits.std() * overlap
        self.logits = nn.Parameter(logits)  # [groups, candidates]

    def gate(self) -> Tensor:
        # Gumbel-softmax: y = softmax((kappa * logits + g) / tau), and the mask is the mean of the candidates under y.
        # The scale kappa grows and the temperature tau falls over the fit, so that choices become firm.
        noise = -torch.empty_like(self.logits).exponential_(generator=self.generator("gate")).log()
        scale, temperature = (interpolate(ends, self.progress) for ends in (self.method.scale, self.method.temperature))
        choice = ((self.logits * scale + noise) / temperature).softmax(-1)
        return (choice @ self.candidates).view(self.weight.shape)

    def result(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.candidates[self.logits.argmax(-1)].bool().view(self.weight.shape)


@dataclass(frozen=True)
class LearnedMask(Train):
    """The masks are trained, by a fit whose own learning rate and weight decay they do not share.

    For n:m the weights stay frozen. `prior="magnitude"` starts from the mask of the largest weights, which is the
    mask of an earlier step that pruned by the same pattern; what that step pruned stays zero unless `weights` brings it
    back. MaskLLM itself starts so: `sparsegpt(pattern='2:4'), learned_mask(weights='reference'), fit()`.
    With pattern="unstructured" the gates are trained together with the weights, and a penalty draws the expected
    density to 1 - `sparsity`, from above and from below.
    """

    paper = "arXiv:2409.17481"
    published = (
        "sparsegpt(pattern='2:4'), learned_mask(weights='reference'), "
        "fit(steps=2000, batch_size=256, warmup=0.0, max_length=4096)"
    )
    caveats = ("masks need training: MaskLLM gives them 2,000 steps of a million tokens",)
    type = "sparse training"
    sparsifies = True
    settles = True
    trials = ({}, {"pattern": "unstructured"})

    pattern: str = "2:4"  # or another "n:m", or "unstructured" for L0 gates (arXiv:1712.01312)
    sparsity: float = 0.5  # at the end; n:m fixes it at 1 - n/m
    lr: float | None = None  # peak, of the logits; None: 5e-4 for n:m, 0.1 for unstructured
    temperature: tuple[float, float] = (4.0, 0.05)  # of the softmax, from the first step to the last
    scale: tuple[float, float] = (100.0, 500.0)  # of the logits, from the first step to the last
    prior: Literal["magnitude"] | None = "magnitude"  # masks that the logits start from; None: no preference
    prior_strength: float = 3.0  # in standard deviations of the logits
    weights: str = "model"  # what n:m masks choose from: the weights of the model, the reference or a snapshot
    weight_reg: float = 1e-5  # reward for the squared norm of the kept weights, removed linearly over the fit
    penalty: float = 125.0  # on the expected density of L0 gates, from the code of arXiv:2005.07683

    @property
    def weight_update(self) -> str:  # type: ignore[override]
        """Nothing for n:m, whose weights stay frozen; gates are trained together with the weights."""
        return "training" if self.pattern == "unstructured" else "none"

    def check(self) -> None:
        check_pattern(self, self.sparsity, self.pattern)
        kind, n, m = Pattern.of(self.pattern)
        self.require(kind != "block" and self.sparsity > 0, "pattern is 'n:m' or 'unstructured', sparsity above 0")
        self.require(math.comb(m, n) <= MOST, f"pattern {self.pattern} has {math.comb(m, n)} masks, more than {MOST}")
        self.require(self.lr is None or self.lr > 0, "lr must be above 0, or None")
        self.require(min(*self.temperature, *self.scale) > 0, "temperature and scale must be above 0")
        factors = (self.prior_strength, self.weight_reg, self.penalty)
        self.require(min(factors) >= 0, "prior_strength, weight_reg and penalty must not be negative")
        self.require(kind == "n:m" or self.weights == "model", "L0 gates train the weights of the model itself")

    def check_shape(self, out: int, width: int) -> None:
        Pattern.of(self.pattern).check_shape(out, width)

    @contextlib.contextmanager
    def context(self, run: Run) -> Iterator[Any]:
        if self.pattern == "unstructured":
            with mask_linears(run, HardConcreteMask, self.pattern) as gates:
                yield
                close(gates, self.sparsity)
        else:
            sources = self._sources(run)
            still = [parameter for module in (run.model, *sources.values()) for parameter in module.parameters()]

            def choose(linear: nn.Module, path: str, seed: int) -> CandidateMask:
                return CandidateMask(linear, path, seed, self, sources.get(path))

            with mask_linears(run, choose, self.pattern), freeze(still):
                yield

    def _sources(self, run: Run) -> dict[str, nn.Module]:
        """Linears with the weights of another role, by path. Raises `Unsupported` where it has none of that shape."""
        if self.weights == "model":
            return {}
        role = dict(Blocks(run.role(self.weights)).linears())
        sources = {}
        for path, linear in trainable_linears(run).items():
            weight = dense_weight(role[path]) if path in role else None
            if weight is None or weight.shape != dense_weight(linear).shape:
                raise Unsupported(
                    f"{path}: {self.weights} has no linear of this shape; leave weights={self.weights!r} out"
                )
            sources[path] = train_like(linear, rebuilt(role[path], weight))
        return sources

    def param_groups(self, groups: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
        if self.pattern == "unstructured":
            gates = (mask.log_alpha for mask in find_masks(run, HardConcreteMask))
            return split_group(groups, gates, lr=self.lr or 0.1, weight_decay=0.0)
        logits = (mask.logits for mask in find_masks(run, CandidateMask))
        return split_group(groups, logits, lr=self.lr or 5e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5)

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        if self.pattern == "unstructured":
            return {"density": self.penalty * (density(find_masks(run, HardConcreteMask)) - (1 - self.sparsity)).abs()}
        masks = find_masks(run, CandidateMask)
        # The paper's sparse weight regularization, -lambda ||W * M||^2, rewards large kept weights: gradients would
        # vanish where masks keep small ones.
        norm = torch.stack([(mask.weight.float() * mask.gate()).square().sum() for mask in masks]).sum()
        return {"kept_norm": -self.weight_reg * (1 - masks[0].progress) * norm}

    def on_step(self, run: Run) -> None:
        assert run.step is not None
        for mask in find_masks(run, TrainedMask):
            mask.clock[:] = torch.tensor([run.step.index + 1, run.step.total])


def interpolate(ends: tuple[float, float], progress: float) -> float:
    """Value of a linear schedule at a fraction of the fit."""
    return ends[0] + (ends[1] - ends[0]) * progress
