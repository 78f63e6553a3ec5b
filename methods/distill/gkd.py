"""Generalized knowledge distillation: the student learns on texts that it writes itself (Agarwal et al., 2024)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from effbench import ops
from effbench.core.kinds import Train
from effbench.core.method import Output
from effbench.core.run import Run
from effbench.nn.infer.engine import open_engine
from effbench.nn.train.batches import collate
from effbench.nn.train.loss import learned_logits, mean_cross_entropy, mean_learned
from effbench.nn.train.samples import Asked, Text, answer, ask, keep_texts, list_examples, sample
from effbench.nn.train.teacher import count_shared


@dataclass(frozen=True)
class GKD(Train):
    """L = (1 - lmbda) E_(x, y) of the data [D(p || q)(y | x)] + lmbda E_x E_(y ~ q) [D(p || q)(y | x)] (algorithm 1).

    p is the teacher, q the student, and D the mean over tokens of their generalized Jensen-Shannon divergence. Nothing
    is differentiated through what is drawn. On batches that the student has not written cross-entropy may stand beside.
    """

    paper = "arXiv:2306.13649"
    caveats = ("encoder-decoders in the paper; drawn at temperature 0.9 as in trl, at 1 in the paper",)
    type = "distillation"
    weight_update = "training"
    claims = ("train.loss",)
    trials = ({"alpha": 0.5, "new_tokens": 4, "prompt_tokens": 4},)
    tuned = {"lmbda": (0.0, 0.5, 1.0), "beta": (0.0, 0.5, 1.0)}

    lmbda: float = 0.5  # fraction of the steps whose texts the student writes
    beta: float = 0.5  # of the divergence; 0: KL(p || q), 1: KL(q || p)
    temperature: float = 0.9  # at which texts are drawn
    source: Literal["data", "teacher"] = "data"  # of the other steps' texts; those of the teacher are drawn once
    alpha: float = 1.0  # of the divergence; the rest is of the cross-entropy, on texts of the source
    loss_temperature: float = 1.0  # of both softmaxes in the divergence
    new_tokens: int = 64  # of a text, its end included, at most
    prompt_tokens: int = 16  # first tokens of an example without a prompt, which stand for one
    teacher: str = "reference"  # role of the teacher: the unchanged model, or the name of a snapshot

    def check(self) -> None:
        for name in ("lmbda", "beta", "alpha"):
            self.require(0 <= getattr(self, name) <= 1, f"{name} must be in [0, 1]")
        for name in ("temperature", "loss_temperature"):
            self.require(getattr(self, name) > 0, f"{name} must be above 0")
        for name in ("new_tokens", "prompt_tokens"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1")
        self.require_teacher(self.teacher)

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.teacher: {"logits"}}

    def is_on_policy(self, run: Run) -> bool:
        """Whether the student writes the texts of this step: u ~ U(0, 1) is below lmbda (algorithm 1, line 4)."""
        assert run.step is not None
        return random.Random(f"{run.seed}/{len(run.log.fits)}/{run.step.index}/gkd").random() < self.lmbda

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        on_policy = self.is_on_policy(run)
        if not on_policy and self.source == "data":
            return batch
        assert run.step is not None
        where = (len(run.log.fits), run.step.index) if on_policy else ("gkd",)
        examples = list_examples(batch)
        asked = [ask(example, self.prompt_tokens, *where) for example in examples]
        engine = open_engine(run, run.role("model" if on_policy else self.teacher), count_shared(run, self.teacher))

        def write(part: list[Asked]) -> list[Text]:
            return sample(run, engine, part, self.new_tokens, self.temperature)

        how = f"{self.temperature} {run.seed} {self.new_tokens}"
        texts = write(asked) if on_policy else keep_texts(run, self.teacher, how, asked, write)
        return collate([answer(*one) for one in zip(examples, asked, texts, strict=True)], run.pad, run.device)

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        shared = count_shared(run, self.teacher)
        student = learned_logits(out.logits[..., :shared], batch)  # [N, V]
        teacher = learned_logits(run.outputs(self.teacher).logits[..., :shared], batch)
        divergence = ops.load("generalized_jsd")(student, teacher, self.beta, self.loss_temperature)  # [N]
        terms = {"soft": self.alpha * mean_learned(divergence, batch)}
        if self.alpha < 1 and not self.is_on_policy(run):
            terms["hard"] = (1 - self.alpha) * mean_cross_entropy(out.logits, batch)
        return terms
