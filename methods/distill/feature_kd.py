"""Feature distillation: projected hidden states follow the teacher's (FitNets, 2014; TinyBERT, 2019)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effbench.core.method import Output
from effbench.core.run import Run
from effbench.methods.distill._layers import ByLayer, Examples
from effbench.nn.precision import widen

NAME = "feature_projections"  # of the projections, in the model while they are trained


@dataclass(frozen=True)
class FeatureKD(ByLayer):
    """L = beta sum_l |W_l h_l - t_g(l)|^2 / |t_g(l)|^2 over the student's blocks l, the norms over an example.

    h and t [T, width] are what blocks of the student and of the teacher give, of all real tokens, those of the prompt
    too; an example counts by its learned tokens. The projections W are trained with the student and dropped after the
    fit. Equation 8 of TinyBERT, and 3 of FitNets with a linear regressor; both are raw errors, which the layers with
    the largest states rule. Adds its own term alone: predictions are taught by another method of the recipe, if at all.
    """

    paper = "arXiv:1909.10351"
    caveats = (
        "the papers take the raw error (error='raw'), and TinyBERT the embeddings' and attention's as well",
        "one projection per layer as in FitNets, which starts from the identity where widths are equal",
    )
    trials = ({}, {"error": "raw"})

    error: Literal["relative", "raw"] = "relative"  # over the teacher's mean square; raw: mean squares as they are

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {"model": {"hidden"}, self.teacher: {"hidden"}}

    @contextlib.contextmanager
    def context(self, run: Run) -> Iterator[None]:
        width, target = run.model.config.hidden_size, run.role(self.teacher).config.hidden_size
        linears = [nn.Linear(width, target, bias=False) for _ in self.map_layers(run)]
        if width == target:
            for linear in linears:
                nn.init.eye_(linear.weight)
        name = next(name for i in range(1, 100) if not hasattr(run.model, name := f"{NAME}_{i}"))
        run.state(self)["name"] = name  # that of another step of this method is another
        run.model.add_module(name, nn.ModuleList(linears).to(run.device))
        try:
            yield
        finally:
            delattr(run.model, name)

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        examples = Examples(batch)
        states, targets = run.outputs("model").hidden, run.outputs(self.teacher).hidden
        projections = getattr(run.model, run.state(self)["name"])
        errors = []
        for state, place, projection in zip(states, self.map_layers(run), projections, strict=True):
            h, t = (widen(x[examples.real]) for x in (state, targets[place]))  # [N, width]
            error = examples.sum((nn.functional.linear(h, projection.weight.to(h)) - t).square().mean(-1))
            scale = t.square().mean(-1) if self.error == "relative" else torch.ones_like(t[:, 0])
            errors.append(examples.mean(error / examples.sum(scale).clamp(min=torch.finfo(t.dtype).tiny)))
        return {"feature": self.weigh(errors, run)}
