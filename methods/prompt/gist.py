"""Gist tokens: a prompt is compressed into the keys and values of a few tokens behind it (Mu et al., 2023)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from effbench.core.errors import Unsupported
from effbench.core.run import InferPlan, Run
from effbench.methods.prompt._memory import Memory, check_room, divide
from effbench.nn.infer.memory import KeyValues, Tokens
from effbench.nn.model.feed import feed
from effbench.nn.model.memory import count_vocabulary, embed
from effbench.nn.train.batches import collate
from effbench.nn.train.outputs import Outputs


@dataclass(frozen=True)
class Gist(Memory):
    """-log p(y | G(t), x): y is learned behind the gists G of a task t and an input x, neither of which sees t.

    The whole model is trained. One token is added, whose embedding begins as the mean of all, and stands `tokens` times
    behind t. Afterwards the keys and values that a prompt leaves in the gists are read in its place; what follows keeps
    its positions.
    """

    paper = "arXiv:2304.08467"
    published = "gist(tokens=1), fit(steps=3000, lr=2e-05, batch_size=128)"
    caveats = (
        "a prompt is all that stands before the question, contexts too; in the paper it is the instruction",
        "of text without prompts a beginning of random length is the prompt, and the rest is learned",
    )

    tokens: int = 4  # k: gists of a prompt

    def check(self) -> None:
        self.require(self.tokens >= 1, "tokens must be at least 1")

    def start(self, table: Tensor, run: Run) -> Tensor:
        return table.mean(0, keepdim=True)

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        gist = count_vocabulary(run.model)
        laid = []
        for example, lead, _ in divide(batch, run):
            ids = (*example.ids[:lead], *[gist] * self.tokens, *example.ids[lead:])
            laid.append(dataclasses.replace(example, ids=ids, prompt=(example.prompt or lead) + self.tokens))
        new = collate(laid, run.pad, run.device)
        width = new["input_ids"].shape[1]
        check_room(run, width, "a row with gists", "give a smaller max_length")
        window = getattr(run.model.config, "sliding_window", None)
        if window is not None and window < width:
            raise Unsupported(f"attention slides over {window} tokens, and rows with gists have {width}")
        return new | {
            "attention_mask": see_gists(new["input_ids"] == gist, new["attention_mask"].bool()),
            "position_ids": torch.arange(width, device=run.device).expand(len(laid), -1),
        }

    def forward(self, batch: dict[str, Tensor], run: Run) -> Outputs:
        inputs = {name: batch[name] for name in ("attention_mask", "position_ids")}
        logits = feed(run.model, inputs | {"inputs_embeds": embed(run.model, batch["input_ids"])}).logits
        return Outputs(logits, (), (), ())

    @torch.no_grad()
    def remember(self, ids: list[int], run: Run) -> Tokens | None:
        if not ids:
            return None
        check_room(run, len(ids) + self.tokens, "a prompt with its gists", "it is longer than can be compressed")
        gists = [count_vocabulary(run.model)] * self.tokens
        cache = DynamicCache()
        embeds = embed(run.model, torch.tensor([[*ids, *gists]], device=run.device))
        feed(run.model, {"inputs_embeds": embeds}, cache, body=True, plan=InferPlan())
        layers: list[Any] = cache.layers
        states = [(layer.keys, layer.values) for layer in layers]
        keys, values = ([part[0, :, -self.tokens :].clone() for part in parts] for parts in zip(*states, strict=True))
        return [KeyValues(keys, values, before=len(ids))]


def see_gists(gists: Tensor, real: Tensor) -> Tensor:
    """The causal gist mask (figure 2) of gists and real tokens [B, T]: bool [B, 1, T, T], True where a query may look.

    Tokens behind the last gist see none before the first. In a row without gists all see what is before them.
    """
    before = gists.cumsum(1) == 0
    after = (gists.cumsum(1) == gists.sum(1, keepdim=True)) & ~gists
    causal = torch.ones(gists.shape[1], gists.shape[1], dtype=torch.bool, device=gists.device).tril()
    divided = gists.any(1)[:, None, None]
    seen = causal & ~(after[:, :, None] & before[:, None, :] & divided) & real[:, None, :]
    alone = torch.eye(len(causal), dtype=torch.bool, device=gists.device)  # so that padding sees something
    return (seen | alone)[:, None]
