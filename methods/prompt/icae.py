"""ICAE: an encoder puts a context into memory slots, from which the frozen model decodes (Ge et al., 2024)."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.core.errors import Refused, Unsupported
from effbench.core.run import InferPlan, Run
from effbench.methods.prompt._memory import Memory, check_room, divide
from effbench.nn.infer.memory import Tokens
from effbench.nn.model.adapters import adding, choose_adapter, list_adapters
from effbench.nn.model.feed import feed
from effbench.nn.model.memory import count_vocabulary, embed, find_memory
from effbench.nn.train.batches import collate
from effbench.nn.train.outputs import Outputs


@dataclass(frozen=True)
class ICAE(Memory):
    """Memory tokens stand behind each span of a context; their last hidden states, by the model with the adapter of the
    `encoder`, are its memory slots. The model without it reads them, and stays as it was.

    Learned from the slots are the context itself, behind [AE] (equation 2), or what follows it, behind [LM] (equation
    3): each example is one of the two by chance. Of a prompt that is the answer to its question (equation 4).
    """

    paper = "arXiv:2307.06945"
    published = (
        "lora(rank=128, dropout=0.05, targets=('q_proj', 'v_proj'), adapter='encoder'), icae(), "
        "fit(steps=200000, lr=0.0001, batch_size=256)"
    )
    caveats = (
        "one fit for both stages; the paper learns answers to questions after, at half the rate",
        "[LM] stands behind the slots of all that is read after the fit; the authors learn another token for questions",
    )
    trials = ({"tokens": 2, "encoder": ""},)
    exceptions = {
        "check_two_steps_of_fit": "the decoder is frozen: only what it makes of memory changes",
        "check_trained_survives": "the decoder is frozen: only what it makes of memory changes",
    }

    tokens: int = 128  # k: memory slots of a span
    rate: int = 4  # tokens of a span to a slot, at most
    reconstruct: float = 0.5  # lambda: share of the examples that are reconstructed
    encoder: str = "encoder"  # adapter that encodes, of a step before; empty: only memory tokens are trained

    def check(self) -> None:
        self.require(min(self.tokens, self.rate) >= 1, "tokens and rate must be at least 1")
        self.require(0 <= self.reconstruct <= 1, "reconstruct is a share of the examples, in [0, 1]")

    def start(self, table: Tensor, run: Run) -> Tensor:
        """Of slots, [AE] and [LM], drawn as embeddings of torch are."""
        return torch.randn(self.tokens + 2, table.shape[1], generator=torch.Generator().manual_seed(run.seed))

    def apply(self, run: Run) -> None:
        if self.encoder and self.encoder not in list_adapters(run.model):
            raise Refused(f"no adapter is called {self.encoder!r}: put lora(adapter={self.encoder!r}) before icae")
        with adding(run):
            super().apply(run)
        choose_adapter(run.model, None)

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        slot = count_vocabulary(run.model)
        end = getattr(run.tokenizer, "eos_token_id", None)
        spans: list[list[int]] = []
        laid = []
        for example, lead, chance in divide(batch, run):
            new = self.cut(example.ids[:lead], slot)
            spans += new
            slots = [slot] * (self.tokens * len(new))
            if chance.random() < self.reconstruct:
                front = [*slots, slot + self.tokens]
                ids, prompt = (*front, *example.ids[:lead], *([] if end is None else [end])), len(front)
            else:
                front = [*slots, slot + self.tokens + 1]
                ids, prompt = (*front, *example.ids[lead:]), len(front) + max(0, example.prompt - lead)
            laid.append(dataclasses.replace(example, ids=ids, prompt=prompt))
        decoded = collate(laid, run.pad, run.device)
        check_room(run, decoded["input_ids"].shape[1], "a row behind its slots", "give a smaller max_length")
        return decoded | {"spans": self.lay(spans, run)}

    def forward(self, batch: dict[str, Tensor], run: Run) -> Outputs:
        if run.train.slot("activations") is not None:
            raise Unsupported(f"{run.train.owner('activations')} computes again what the encoder has computed")
        ids, slot = batch["input_ids"], count_vocabulary(run.model)
        embeds = embed(run.model, ids)
        # ids of slots hold their places; memory has the order of rows, spans and slots
        embeds[ids == slot] = self.encode(batch["spans"], run, None).to(embeds.dtype)
        logits = feed(run.model, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}).logits
        return Outputs(logits, (), (), ())

    @torch.no_grad()
    def remember(self, ids: list[int], run: Run) -> Tokens | None:
        spans = self.cut(ids, count_vocabulary(run.model))
        if len(spans) * self.tokens + 1 >= len(ids):
            return None
        return [*self.encode(self.lay(spans, run), run, InferPlan()), find_memory(run.model).rows[self.tokens + 1]]

    def cut(self, ids: Sequence[int], slot: int) -> list[list[int]]:
        """Spans of a context, as even as can be, each with memory tokens behind it."""
        number = math.ceil(len(ids) / (self.rate * self.tokens))
        length = math.ceil(len(ids) / number) if number else 1
        memory = range(slot, slot + self.tokens)
        return [[*ids[start : start + length], *memory] for start in range(0, len(ids), length)]

    def lay(self, spans: Sequence[Sequence[int]], run: Run) -> Tensor:
        """[N, L] spans with padding behind, which no token sees."""
        width = max(map(len, spans))
        check_room(run, width, "a span with its slots", "give fewer tokens, or a smaller rate")
        return torch.tensor([[*span, *[run.pad] * (width - len(span))] for span in spans], device=run.device)

    def encode(self, spans: Tensor, run: Run, plan: InferPlan | None) -> Tensor:
        """[N k, H] memory slots of spans [N, L], one span after the other."""
        slots = spans >= count_vocabulary(run.model)
        real = slots.flip(1).cumsum(1).flip(1) > 0  # slots stand last, and padding behind them
        with encoding(run, self.encoder):
            inputs = {"inputs_embeds": embed(run.model, spans), "attention_mask": real.long()}
            states = feed(run.model, inputs, body=True, plan=plan).last_hidden_state
        return states[slots]


@contextlib.contextmanager
def encoding(run: Run, adapter: str) -> Iterator[None]:
    """Have the adapter count inside, and none outside."""
    if adapter:
        choose_adapter(run.model, adapter)
    try:
        yield
    finally:
        choose_adapter(run.model, None)
