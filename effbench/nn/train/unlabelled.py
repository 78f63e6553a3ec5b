"""Examples whose answers have not been told: what an acquisition sees of them, and who tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from effbench.core.errors import Refused, Unsupported
from effbench.core.views import Example
from effbench.nn.data import WITHHELD

if TYPE_CHECKING:
    from effbench.core.kinds import Select
    from effbench.core.run import Run


class Withheld(Mapping[str, Any]):
    """Stands for what the source of an example says of it, among which may be the answer."""

    def __getitem__(self, key: str) -> NoReturn:
        raise Refused(f"{WITHHELD}, and must not look at what their source says of them")

    def __iter__(self) -> Iterator[str]:
        return self[""]

    def __len__(self) -> int:
        return self[""]


def withhold(examples: Sequence[Example]) -> list[Example]:
    """The prompts of examples, as texts of their own. Raises `Unsupported` where one has none."""
    bare = [example.id for example in examples if not example.prompt]
    if bare:
        raise Unsupported(
            f"{len(bare)} of {len(examples)} training examples have no prompt, such as {bare[0]!r}: answers are bought "
            "for prompts; give data with prompts, such as data=tiny:task"
        )
    hidden = Withheld()
    texts = ["" if example.segments is None else example.segments.text() for example in examples]
    return [
        dataclasses.replace(example, ids=example.ids[: example.prompt], prompt=0, text=text, meta=hidden)
        for example, text in zip(examples, texts, strict=True)
    ]


def require_told(examples: Sequence[Example]) -> None:
    """Raise `Refused` for unlabelled examples, for what trains on examples or asks what that would do."""
    if any(isinstance(example.meta, Withheld) for example in examples):
        raise Refused(f"{WITHHELD}, and must not go by what would be learned of them")


def rank(run: Run, method: Select, unlabelled: Sequence[Example], labelled: list[Example], number: int) -> list[int]:
    """Places of examples whose answers are not told, best first; of `labelled` ones the method sees all.

    `number` is how many answers are bought now. Raises `Refused` where the method looks at an answer that is not told,
    or leaves out or repeats an example. A hollow model tells none apart: they stay in their order.
    """
    if run.hollow:
        return [*range(len(unlabelled))]
    with run.data.asking(number, labelled):
        order = [int(place) for place in method.order(withhold(unlabelled), run)]
    if sorted(order) != list(range(len(unlabelled))):
        raise Refused(f"{method}: gives {len(order)} places for {len(unlabelled)} examples, not each of them once")
    return order


class Annotator:
    """Tells answers, each at the price of one of a budget. Raises `Unsupported` for a budget above the examples."""

    def __init__(self, examples: Sequence[Example], budget: int) -> None:
        if budget > len(examples):
            raise Unsupported(
                f"a budget of {budget} answers is more than the {len(examples)} examples that there are: give less"
            )
        self.examples = examples
        self.budget = budget
        self.told: list[int] = []  # places, in the order asked for

    @property
    def untold(self) -> list[int]:
        """Places of the examples whose answers are not told, in their order."""
        told = set(self.told)
        return [place for place in range(len(self.examples)) if place not in told]

    def tell(self, places: Sequence[int]) -> None:
        """Buy answers. Raises `Refused` for one that is told already, or beyond the budget."""
        asked = [*self.told, *places]
        if len(set(asked)) < len(asked) or len(asked) > self.budget:
            raise Refused(f"{len(asked)} answers, {len(set(asked))} different ones, of a budget of {self.budget}")
        self.told = asked

    @property
    def labelled(self) -> list[Example]:
        """The examples whose answers are told, whole."""
        return [self.examples[place] for place in self.told]
