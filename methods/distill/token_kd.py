"""Word-level distillation: the teacher's prediction of each token in place of the token (Kim & Rush, 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effbench import ops
from effbench.core.kinds import Train
from effbench.core.method import Output
from effbench.core.run import Run
from effbench.nn.train.loss import learned_logits, mean_cross_entropy, mean_learned
from effbench.nn.train.teacher import count_shared, watch_agreement


@dataclass(frozen=True)
class TokenKD(Train):
    """L = D(p_teacher(. | y_<t, x), p_student(. | y_<t, x)), the mean over the learned tokens; no hard label.

    The paper's word-level loss (section 3.1) is the cross-entropy between the two: `forward`, KL(teacher || student),
    is it less the teacher's entropy, which has no gradient. `reverse` is KL(student || teacher), `jsd` what is between
    them (equation 1 of arXiv:2306.13649). A temperature other than 1 divides both logits, without a factor for it.
    """

    paper = "arXiv:1606.07947"
    caveats = (
        "the paper's models translate with LSTMs, and its loss is mixed with the hard label's, as that of kd() is",
    )
    type = "distillation"
    weight_update = "training"
    claims = ("train.loss",)
    tuned = {"divergence": ("forward", "reverse", "jsd"), "temperature": (1.0, 2.0)}
    trials = ({}, {"divergence": "jsd"})

    exceptions = dict.fromkeys(
        ("check_two_steps_of_fit", "check_learns", "check_trained_survives"),
        "the contract has the unchanged model teach itself, and without a hard label there is nothing to learn of it",
    )

    divergence: Literal["forward", "reverse", "jsd"] = "forward"  # from the teacher, from the student, or between
    beta: float = 0.5  # of jsd: the teacher's share of the mixture, in (0, 1)
    temperature: float = 1.0  # of both softmaxes
    teacher: str = "reference"  # role of the teacher: the unchanged model, or the name of a snapshot

    def check(self) -> None:
        self.require(0 < self.beta < 1, "beta must be in (0, 1): at its ends stand divergence='forward' and 'reverse'")
        self.require(self.temperature > 0, "temperature must be above 0")
        self.require_teacher(self.teacher)

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.teacher: {"logits"}}

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        shared = count_shared(run, self.teacher)
        student = learned_logits(out.logits[..., :shared], batch)  # [N, V]
        teacher = learned_logits(run.outputs(self.teacher).logits[..., :shared], batch)
        beta = {"forward": 0.0, "reverse": 1.0, "jsd": self.beta}[self.divergence]
        divergence = ops.load("generalized_jsd")(student, teacher, beta, self.temperature)  # [N]
        watch_agreement(run, batch, student, teacher.argmax(-1))
        with torch.no_grad():
            run.watched["cross_entropy"] = mean_cross_entropy(out.logits, batch)
        return {self.divergence: mean_learned(divergence, batch)}
