"""MiniLLM: reverse KL divergence, minimised by policy gradients on texts of student and teacher (Gu et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effbench import ops
from effbench.core.kinds import Train
from effbench.core.method import Output
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.distill._rollouts import lay_out, roll_out
from effbench.nn.train.loss import learned, learned_logits, sum_weights, token_losses, token_weights
from effbench.nn.train.samplers import Repeated, Sampler, Shuffled
from effbench.nn.train.samples import answer, ask, list_examples
from effbench.nn.train.teacher import count_shared


@dataclass(frozen=True)
class MiniLLM(Train):
    """L = L_long + L_single + lm_coef L_pt (algorithm 1), means over tokens: of texts that student q and teacher p
    write together, and of the data. Each batch of texts serves `epochs` steps.

    L_single is KL(q || p) of the next token, and its gradient exact (equation 3); L_long makes tokens likelier by the
    rewards log p / q that follow them (equation 6), clipped as in PPO; L_pt is the cross-entropy of the data.
    """

    paper = "arXiv:2306.08543"
    caveats = (
        "rewards scaled, discounted and whitened as in the authors' program, of which the paper says nothing",
        "texts of one batch at a time; the authors draw those of four, and whiten over padding, too",
        "the pre-training loss is of the train set; the authors' is of plain text, and half of it the teacher's",
    )
    type = "distillation"
    weight_update = "training"
    claims = ("train.loss",)
    trials = ({"new_tokens": 4, "prompt_tokens": 4},)
    tuned = {"teacher_mix": (0.0, 0.2), "lm_coef": (0.5, 1.0)}

    teacher_mix: float = 0.2  # alpha: share of the teacher in the distribution that tokens are drawn from
    gamma: float = 0.95  # discount of a reward for each token on the way to it
    reward_scale: float = 0.5  # what rewards are divided by
    reward_clip: float = 100.0  # bound of their magnitude
    clip: float = 0.2  # epsilon: how far the ratio of new to old probability, times w, counts from 1
    epochs: int = 4  # steps that learn from one batch of texts
    variant: Literal["program", "paper"] = "program"  # program: a token's own reward is among those that follow it, and
    # what they come to is whitened; paper: neither, and L_single is weighed by w, too (equation 7)
    length_norm: bool = True  # whether rewards that follow are divided by their number
    single_step: bool = True  # whether L_single counts
    lm_coef: float = 1.0  # of L_pt
    temperature: float = 1.0  # of all softmaxes of both models
    new_tokens: int = 64  # of a text, its end included, at most
    prompt_tokens: int = 16  # first tokens of an example without a prompt, which stand for one
    teacher: str = "reference"  # role of the teacher: the unchanged model, or the name of a snapshot

    def check(self) -> None:
        self.require(0 <= self.teacher_mix < 1, "teacher_mix must be in [0, 1)")
        self.require(0 <= self.gamma <= 1, "gamma must be in [0, 1]")
        for name in ("reward_scale", "reward_clip", "clip", "temperature"):
            self.require(getattr(self, name) > 0, f"{name} must be above 0")
        for name in ("epochs", "new_tokens", "prompt_tokens"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1")
        self.require(self.lm_coef >= 0, "lm_coef must not be negative")
        self.require_teacher(self.teacher)

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.teacher: {"logits"}}

    def sampler(self, examples: Sequence[Example], run: Run) -> Sampler:
        return Repeated(Shuffled(len(examples), run.seed), self.epochs)

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        assert run.step is not None
        data, state, round_ = list_examples(batch), run.state(self), run.step.index // self.epochs
        asked = [ask(example, self.prompt_tokens, len(run.log.fits), round_) for example in data]
        names = [str(name) for _, name in asked]
        if state.get("round") != round_:  # new texts y ~ (1 - alpha) q + alpha p, token by token (equation 4)
            state |= {"round": round_, "texts": {}}
        new = [place for place, name in enumerate(names) if name not in state["texts"]]
        if new:
            one, other = [data[place] for place in new], [asked[place] for place in new]
            made = roll_out(run, self.teacher, one, other, self.new_tokens, self.temperature, self.teacher_mix)
            state["texts"] |= {names[place]: text for place, text in zip(new, made, strict=True)}
        texts = [state["texts"][name] for name in names]
        mixed = [self.teacher_mix * t["teacher"].exp() + (1 - self.teacher_mix) * t["student"].exp() for t in texts]
        numbers = {
            "old": [t["student"] for t in texts],
            "w": [t["student"].exp() / m for t, m in zip(texts, mixed, strict=True)],  # equation 5, for one step each
            "advantage": [self.advantages(t["teacher"] - t["student"]) for t in texts],
        }
        written = [answer(e, a, tuple(t["ids"])) for e, a, t in zip(data, asked, texts, strict=True)]
        merged = lay_out(run, written, data, numbers)
        weights = torch.cat([torch.full((len(t["ids"]),), e.weight) for t, e in zip(texts, data, strict=True)]).double()
        gain = torch.cat(numbers["advantage"]).double()
        sums = [weights.sum(), (weights * gain).sum(), (weights * gain**2).sum(), torch.tensor(sum_weights(merged))]
        return merged | {"tally": torch.stack(sums)}

    def advantages(self, rewards: Tensor) -> Tensor:
        """[n]: what follows each token of a text, of its rewards log p / q [n] (equation 6)."""
        rewards = (rewards / self.reward_scale).clamp(-self.reward_clip, self.reward_clip)
        ahead = torch.arange(len(rewards)) - torch.arange(len(rewards))[:, None]  # [t, i]: i - t
        if self.variant == "paper":
            ahead = ahead - 1  # R_(t + 1); equation 6 divides its T - t rewards by one fewer, which may be none
        later = ahead >= 0
        found = (later * rewards.new_tensor(self.gamma) ** ahead.clamp(min=0)) @ rewards
        return found / later.sum(1).clamp(min=1) if self.length_norm else found

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        count, total, squares, everything = batch["tally"].tolist()  # of the whole step
        shared, where = count_shared(run, self.teacher), learned(batch)
        text = batch["text"][:, 1:][where]  # [N]
        student = learned_logits(out.logits[..., :shared], batch)[text]
        teacher = learned_logits(run.outputs(self.teacher).logits[..., :shared], batch)[text]
        old, w, advantage = (batch[key][:, 1:][where][text] for key in ("old", "w", "advantage"))
        if self.variant == "program":
            mean = total / count
            advantage = (advantage - mean) / (max(0.0, squares / count - mean**2) + 1e-8) ** 0.5
        tokens = batch["labels"][:, 1:][where][text]
        long = ops.load("clipped_policy")(student, tokens, old, advantage, w, self.clip, self.temperature)
        weights = token_weights(batch)
        weights = torch.ones(len(text), device=text.device) if weights is None else weights
        share = everything / sum_weights(batch)  # with it a mean is one over the tokens of its kind in the whole step
        terms = {"long": share * (long * weights[text]).sum() / count}
        if self.single_step:
            single = ops.load("generalized_jsd")(student, teacher, 1.0, self.temperature)  # KL(q || p)
            single = w * single if self.variant == "paper" else single
            terms["single"] = share * (single * weights[text]).sum() / count
        if self.lm_coef:
            plain = (token_losses(out.logits, batch) * weights)[~text]
            terms["pretraining"] = self.lm_coef * share * plain.sum() / (everything - count)
        return terms
