"""Knowledge distillation: learn the softened predictions of a teacher (Hinton et al., 2015)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effbench import ops
from effbench.core.kinds import Train
from effbench.core.method import Output
from effbench.core.run import Run
from effbench.nn.train.loss import learned_logits, mean_cross_entropy, mean_learned
from effbench.nn.train.teacher import bucketed_kl, count_shared, soften_top, watch_agreement


@dataclass(frozen=True)
class KD(Train):
    """L = (1 - alpha) CE(y, softmax(z)) + alpha tau^2 KL(softmax(v / tau) || softmax(z / tau)), means over tokens.

    z are the student's logits and v the teacher's; tau^2 keeps the size of the second gradient, which falls with
    tau, near that of the first (section 2 of the paper).
    """

    paper = "arXiv:1503.02531"
    caveats = ("no setting for language models in the paper; temperature 2 as in DistilBERT, both terms alike",)
    type = "distillation"
    weight_update = "training"
    claims = ("train.loss",)
    tuned = {"temperature": (1.0, 2.0), "alpha": (0.5, 0.9)}

    temperature: float = 2.0  # tau, of both softmaxes
    alpha: float = 0.5  # of the teacher's term; the rest is of the cross-entropy
    teacher: str = "reference"  # role of the teacher: the unchanged model, or the name of a snapshot
    top_k: int | None = None  # teacher's likeliest tokens that are looked at, the rest as one; None: all
    cache: bool = False  # whether predictions of the teacher are kept on disk for later epochs and cells

    def check(self) -> None:
        self.require(self.temperature > 0, "temperature must be above 0")
        self.require(0 <= self.alpha <= 1, "alpha must be in [0, 1]")
        self.require_teacher(self.teacher)
        self.require(self.top_k is None or self.top_k > 0, "top_k must be at least 1, or None")

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.teacher: {"logits"}}

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        tau = self.temperature
        shared = count_shared(run, self.teacher)
        student = learned_logits(out.logits[..., :shared], batch)  # [N, V]
        if self.cache or self.top_k is not None:
            targets = soften_top(run, self.teacher, batch, tau, self.top_k, self.cache)
            divergence, likeliest = bucketed_kl(student, targets, tau), targets.tokens[:, 0]
        else:
            teacher = learned_logits(run.outputs(self.teacher).logits[..., :shared], batch)
            divergence = ops.load("soft_kl")(student, teacher, tau)  # [N]
            likeliest = teacher.argmax(-1)
        watch_agreement(run, batch, student, likeliest)
        hard, soft = mean_cross_entropy(out.logits, batch), mean_learned(divergence, batch)
        run.watched |= {"cross_entropy": hard, "divergence": soft}
        return {"hard": (1 - self.alpha) * hard, "soft": self.alpha * tau**2 * soft}
