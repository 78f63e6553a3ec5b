"""What compressors into memory tokens share: the tokens, and where an example is divided that they are trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.infer.memory import Tokens, find_lead
from effbench.nn.model.adapters import add_part
from effbench.nn.model.blocks import Blocks, count_positions
from effbench.nn.model.feed import count_front
from effbench.nn.model.memory import MEMORY, MemoryTokens
from effbench.nn.train.outputs import Outputs
from effbench.nn.train.samples import list_examples


@dataclass(frozen=True)
class Memory(Method):
    """Trains memory tokens in the fit that follows; then memory stands in the place of all before the question."""

    must_define = (("start", "forward", "remember"),)
    type = "prompt compression"
    weight_update = "memory tokens"
    trains = True
    claims = ("train.forward", "infer.memory")

    def start(self, table: Tensor, run: Run) -> Tensor:
        """[n, width]: embeddings that the memory tokens begin with; `table` [V, width] holds those of the model."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Tensor], run: Run) -> Outputs:
        """What the model gives for a batch in training, memory tokens and all."""
        raise NotImplementedError

    def remember(self, ids: list[int], run: Run) -> Tokens | None:
        """The memory of the beginning of a prompt; None where there is nothing to make it of."""
        raise NotImplementedError

    @property
    def fills(self) -> tuple[str, ...]:
        return (MEMORY,)

    def apply(self, run: Run) -> None:
        rows = self.start(Blocks(run.model).embedding.get_parameter("weight").detach().float(), run)
        memory = MemoryTokens(*rows.shape).to(run.device)
        memory.rows.data = rows.to(run.device)
        add_part(run.model, MEMORY, memory)
        run.waiting.add(memory.rows)  # steps that freeze the model leave it trainable
        super().apply(run)


class Divided(NamedTuple):
    """A training example, of which the first `lead` tokens are to become memory."""

    example: Example
    lead: int
    chance: random.Random  # of this example in this step


def divide(batch: dict[str, Tensor], run: Run) -> Iterator[Divided]:
    """The examples of a batch. Of a prompt all before its question becomes memory, of a text without one a beginning
    that is drawn anew in each step."""
    fit, step = len(run.log.fits), 0 if run.step is None else run.step.index
    known: dict[Any, Example] = run.share(
        ("divided", fit, id(run.data.train)),
        lambda: {example.ids: example for example in run.data.train if example.segments},
    )
    for example in list_examples(batch):
        chance = random.Random(f"{run.seed}/{fit}/{step}/{example.ids}")
        lead = chance.randint(1, len(example.ids) - 1)
        if example.prompt:
            segments = known[example.ids].segments if example.ids in known else None
            prompt = example.ids[: example.prompt]
            lead = len(prompt) - 1 if segments is None else find_lead(run.data.encode_prompt, segments, prompt)
            lead = max(1, lead)
        yield Divided(example, lead, chance)


def check_room(run: Run, tokens: int, what: str, mend: str) -> None:
    """Raise `Unsupported`, with the mend, for more tokens in a pass than the model has positions."""
    positions = count_positions(run.model) - count_front(run.model)
    if tokens > positions:
        raise Unsupported(f"{what} takes {tokens} positions, and the model has {positions}: {mend}")
