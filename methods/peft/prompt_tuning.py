"""Prompt tuning: trainable embeddings in front of the tokens, and nothing else (Lester et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.model.adapters import NAMED, add_part, adding, choose_adapter, is_name, join_name
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.feed import SOFT, SoftPrompt


@dataclass(frozen=True)
class PromptTuning(Method):
    """The soft prompt takes positions of its own in front of every text, in training and in all that is measured."""

    paper = "arXiv:2104.08691"
    caveats = ("the paper tunes T5 by Adafactor at rate 0.3, for 30,000 steps, with 100 embeddings",)
    type = "PEFT"
    weight_update = "soft prompt"
    trains = True
    settles = stacks = True

    length: int = 20  # embeddings in front
    adapter: str = ""  # a name to keep it by, beside others
    start: Literal["vocabulary", "random"] = "vocabulary"  # embeddings of random tokens, or uniform in [-0.5, 0.5]

    def check(self) -> None:
        self.require(self.length > 0, "length must be at least 1")
        self.require(is_name(self.adapter), NAMED)

    @property
    def fills(self) -> tuple[str, ...]:
        return (join_name(SOFT, self.adapter),)

    def apply(self, run: Run) -> None:
        table = Blocks(run.model).embedding.get_parameter("weight").detach()
        generator = torch.Generator().manual_seed(run.seed)
        soft = SoftPrompt(self.length, table.shape[1], self.adapter).to(run.device)
        if self.start == "vocabulary":
            known = len(table) if run.tokenizer is None else min(len(table), len(run.tokenizer))  # others are padding
            rows = table[torch.randint(known, (self.length,), generator=generator).to(table.device)]
        else:
            rows = torch.rand(self.length, table.shape[1], generator=generator) - 0.5
        soft.rows.data = rows.float().to(run.device)
        with adding(run):
            add_part(run.model, SOFT, soft)
        if self.adapter:
            choose_adapter(run.model, self.adapter)
        super().apply(run)
