"""Active learning: acquire, label, fit, repeat (Lewis & Gale, 1994; Gal et al., 2017)."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any, Self

from effbench.core.errors import Usage
from effbench.core.files import replace_file
from effbench.core.kinds import Select
from effbench.core.method import Method
from effbench.core.recipe import parse_step
from effbench.core.run import Run
from effbench.nn.train.checkpoint import count_ranks
from effbench.nn.train.composition import report_selection
from effbench.nn.train.fit import count_from, fit
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.unlabelled import Annotator, rank


@dataclass(frozen=True)
class ActiveLearning(FitSettings, Method):
    """In each round a selection ranks the prompts whose answers are not told yet, the answers of the best are told, and
    the model is fitted to all that are told by then.

    A selection that scores texts is given the prompts as texts of their own; one that looks at what is not told, or
    trains on it, is refused. Every fit begins with the model as it is before the first, with the same hooks of the
    recipe; the first round asks that model. The train set is left as what was told.
    """

    paper = "arXiv:1703.02910"
    caveats = (
        "the paper begins with 20 random labels and acquires ten at a time; here the pretrained model is asked",
        "an acquisition that was made for whole texts, such as hybrid, is given the prompts for such",
    )
    type = "fine-tuning"
    weight_update = "training"
    consumes = True
    blind = True
    trials = ({"acquire": "entropy()", "budget": 8, "rounds": 2, "steps": 2, "batch_size": 4, "max_length": 32},)

    acquire: str = "bald()"  # a selection, as a step string; it sees prompts alone
    budget: int = 100  # answers that are told, all in all
    rounds: int = 5  # of acquisition and fit, each of which is told as many, or one more

    def _convert(self, name: str, value: Any) -> Any:
        value = super()._convert(name, value)
        if name != "acquire":
            return value
        try:
            return str(parse_step(value))
        except Usage as error:
            raise Usage(f"{self.key}.acquire: {error}") from None

    @property
    def parts(self) -> tuple[Method, ...]:
        return (parse_step(self.acquire),)

    def check(self) -> None:
        self.require(not self.find_fault(), self.find_fault())
        (step,) = self.parts
        ranks = isinstance(step, Select) and not step.admits
        self.require(ranks, "acquire must be a selection that ranks examples, such as bald()")
        self.require(getattr(step, "keep", None) is None, "acquire takes no keep: the budget says how many are taken")
        self.require(1 <= self.rounds <= self.budget, "rounds must be at least 1, and at most the budget")

    def slots(self) -> tuple[str, ...]:
        return super().slots() + (("train.sampler",) if self.layout == "by_length" else ())

    def shorten(self, steps: int, batch_size: int, max_length: int) -> Self:
        short = super().shorten(steps, batch_size, max_length)
        return replace_fields(short, budget=min(self.budget, steps * batch_size), rounds=1)  # they hold the same

    def apply(self, run: Run) -> None:
        (acquisition,) = self.parts
        assert isinstance(acquisition, Select)
        annotator = Annotator(run.data.train, self.budget)
        seconds, behind = 0.0, list[int]()  # what acquisitions took, and what the last one ranked behind those it asked
        begin = run.remember()
        steps = self.steps * len(self.rates)
        with run.train.lasting():
            for number in range(self.rounds):
                size = (number + 1) * self.budget // self.rounds - len(annotator.told)
                order, spent = acquire(run, acquisition, annotator, size)
                annotator.tell(order[:size])
                seconds, behind = seconds + spent, order[size:]
                if number:
                    log = dict(vars(run.log))
                    begin()
                    vars(run.log).update(log)
                run.data.train, run.data.reserve = annotator.labelled, []
                with count_from(run, number * steps, self.rounds * steps):
                    fit(run, self)
        run.data.train = annotator.labelled
        run.log.selected[self.label] = len(annotator.told)
        run.log.chosen[self.label] = [[example.id, example.weight] for example in annotator.labelled]
        rest = [annotator.examples[place] for place in behind]
        run.log.selections.append(report_selection(run, self, annotator.labelled, rest, None) | {"seconds": seconds})


def acquire(run: Run, acquisition: Select, annotator: Annotator, size: int) -> tuple[list[int], float]:
    """Places of the examples whose answers are not told, best first, and the seconds it took to rank them.

    So many are bought next. Once they are ranked the order is kept for a run that is killed.
    """
    file = None if run.folder is None else run.folder / f"acquired-{len(run.log.fits) + 1}.json"
    if file is not None and file.exists():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept["order"], kept["seconds"]
    begun, before, untold = time.perf_counter(), run.recovered, annotator.untold
    unlabelled = [annotator.examples[place] for place in untold]
    order = [untold[place] for place in rank(run, acquisition, unlabelled, annotator.labelled, size)]
    seconds = time.perf_counter() - begun + run.recovered - before
    if file is not None and not count_ranks()[0]:
        replace_file(file, json.dumps({"order": order, "seconds": seconds}).encode())
    return order, seconds
