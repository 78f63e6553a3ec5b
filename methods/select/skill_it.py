"""Skill-It: the mixture of skills that is read next follows losses along a graph of skills (Chen et al., 2023)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._target import Aimed
from effbench.nn.train.examples import measure_losses
from effbench.nn.train.fit import fit
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.windows import training_on


@dataclass(frozen=True)
class SkillIt(Aimed):
    """A fit is cut into rounds. In round t a share p_t of what is read is of each skill, as `meta` calls it.

    p_1 ~ exp(eta A 1), and p_{t+1} ~ exp(eta A (L_{t-w+1} + ... + L_t)): always from the same start, with the losses
    L_t of each skill aimed at before round t, and the graph A of how much one skill teaches of another (algorithm 1).
    """

    paper = "arXiv:2307.14430"
    caveats = (
        "edges weigh the share of a skill's loss that a short fit on one skill alone takes away",
        "the paper fits for hundreds of steps to learn an edge, and for thousands with the mixtures",
    )
    type = "data selection"
    tuned = {"eta": (0.1, 0.2, 0.5)}
    trials = ({"rounds": 2, "probing_steps": 1},)

    eta: float = 0.2  # how much losses count
    window: int = 3  # rounds whose losses count
    rounds: int = 5  # of the fit
    graph: Literal["learned", "identity"] = "learned"  # identity: every skill teaches itself alone
    probing_steps: int = 10  # of the fit on each skill that the graph is learned by
    probing_lr: float = 1e-3  # of these fits

    def check(self) -> None:
        super().check()
        counts = (self.window, self.rounds, self.probing_steps)
        self.require(min(counts) > 0, "window, rounds and probing_steps must be at least 1")
        self.require(min(self.eta, self.probing_lr) > 0, "eta and probing_lr must be above 0")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        """[N] at random, if not all are to be kept; what it is about is the graph, which is made here."""
        skills, aimed = list_skills(examples), list_skills(self.find_target(run))
        self.require(bool(aimed), f"{run.data.name} has no {self.aim} part whose skills are known")
        if not skills:
            raise Unsupported(f"{run.data.name} does not say of what skill its examples are: meta has no skill")
        if self.graph == "identity":
            graph = torch.tensor([[float(one == other) for other in aimed] for one in skills])
        else:
            graph = self._learn(examples, skills, run)
        run.state(self).update(skills=skills, graph=graph, losses={})
        chance = random.Random(f"{run.seed}/skill_it")
        return torch.tensor([chance.random() for _ in examples])

    def _learn(self, examples: Sequence[Example], skills: Sequence[str], run: Run) -> Tensor:
        """[K, M] the share of the loss of each skill aimed at that steps on each skill alone take away."""
        before = self.measure(run)
        rows = []
        for number, skill in enumerate(skills):
            own = [example for example in examples if read_skill(example) == skill]
            with run.aside(f"skill-{number}"), training_on(run, own):
                fit(run, FitSettings(steps=self.probing_steps, lr=self.probing_lr))
                rows.append((before - self.measure(run)) / before)
        return torch.stack(rows).clamp(min=0)

    def measure(self, run: Run) -> Tensor:
        """[M] the mean loss of each skill aimed at, in nats."""
        examples = self.find_target(run)
        losses = measure_losses(run, run.model, examples)
        skills = [read_skill(example) for example in examples]
        of_each = [
            [loss for loss, one in zip(losses, skills, strict=True) if one == skill] for skill in list_skills(examples)
        ]
        return torch.stack([torch.stack(found).mean() for found in of_each])

    def mix(self, graph: Tensor, losses: Sequence[Tensor]) -> Tensor:
        """[K] shares of the round that follows rounds with these losses [M]."""
        windowed = torch.stack([*losses[-self.window :]]).sum(0) if losses else torch.ones(graph.shape[1])
        return torch.softmax(self.eta * graph @ windowed, 0)

    def sampler(self, examples: Sequence[Example], run: Run) -> Any:
        return Rounds(examples, run, self)


class Rounds:
    """What `skill_it` draws from. Its state between steps: the losses before each round that has begun."""

    def __init__(self, examples: Sequence[Example], run: Run, method: SkillIt) -> None:
        self.run = run
        self.method = method
        self.state = run.state(method)
        self.state["losses"] = {}
        self.places = [
            [place for place, example in enumerate(examples) if read_skill(example) == skill]
            for skill in self.state["skills"]
        ]
        self._made: tuple[int, int] | None = None  # round and batch size of the order here
        self._order: list[int] = []

    def draw(self, step: int, batch_size: int) -> list[int]:
        """The next batch of the round."""
        assert self.run.step is not None
        steps = -(-self.run.step.total // self.method.rounds)
        number, place = divmod(step, steps)
        if number not in self.state["losses"]:
            self.state["losses"][number] = self.method.measure(self.run)
        if self._made != (number, batch_size):
            self._made, self._order = (number, batch_size), self._fill(number, steps * batch_size)
        return self._order[place * batch_size : (place + 1) * batch_size]

    def _fill(self, number: int, size: int) -> list[int]:
        """Places of what a round reads, in random order: of each skill its share, again from the first if need be."""
        losses = self.state["losses"]
        mixtures = [
            self.method.mix(self.state["graph"], [losses[past] for past in range(now) if past in losses])
            for now in range(number + 1)
        ]
        self.run.log.notes[self.method.label] = {
            "skills": self.state["skills"],
            "graph": self.state["graph"].tolist(),
            "mixtures": [mixture.tolist() for mixture in mixtures],
        }
        chance = random.Random(f"{self.run.seed}/{number}/skill_it")
        there = torch.tensor([bool(places) for places in self.places])
        order: list[int] = []
        for places, count in zip(self.places, divide(mixtures[-1] * there, size), strict=True):
            while count:
                read = chance.sample(places, min(count, len(places)))
                order += read
                count -= len(read)
        chance.shuffle(order)
        return order


def list_skills(examples: Sequence[Example]) -> list[str]:
    """The skills of examples, sorted. Raises `Unsupported`."""
    return sorted({skill for example in examples if (skill := read_skill(example))})


def read_skill(example: Example) -> str:
    """What `meta` calls the skill of an example, as text; empty where it says nothing. Raises `Unsupported`."""
    skill = example.meta.get("skill")
    if not isinstance(skill, str | int | float | None):
        raise Unsupported(f"example {example.id}: its skill is a {type(skill).__name__}, and must be text or a number")
    return "" if skill is None else str(skill)


def divide(shares: Tensor, number: int) -> list[int]:
    """A number of things by shares [K], whole: what is left over goes to the largest fractions."""
    exact = shares.double() / shares.double().sum() * number
    counts = exact.floor().long()
    left = number - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:left]] += 1
    found: list[int] = counts.tolist()
    return found
