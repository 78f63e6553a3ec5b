"""AutoCompressor: a text is read in segments, each behind summaries of those before (Chevalier et al., 2023)."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.run import InferPlan, Run
from effbench.methods.prompt._memory import Memory, check_room
from effbench.nn.infer.memory import Tokens
from effbench.nn.model.feed import feed
from effbench.nn.model.memory import find_memory
from effbench.nn.train.outputs import Outputs

SHORTEST = 2  # tokens of a segment in training


@dataclass(frozen=True)
class AutoCompressor(Memory):
    """Behind each segment S_i stand summary tokens, whose last hidden states are its summary vectors sigma_i.

    The next segment is read behind sigma_1 .. sigma_i (summary accumulation), and all tokens are learned (equation 1).
    In training segments have random lengths, and gradients stop after `stop` of them. The whole model is trained.
    Summary vectors of what stands before the question are then read in its place.
    """

    paper = "arXiv:2305.14788"
    published = (
        "autocompressor(), fit(steps=20345, lr=2e-05, batch_size=16, schedule='linear', warmup=0.05, max_length=6144)"
    )
    caveats = (
        "summary tokens and vectors have positions as others do; the paper's OPT adds none to them, its Llama does",
    )

    tokens: int = 50  # kappa: summary tokens of a segment
    segments: int = 4  # of a row in training, as far as it is long enough
    stop: int = 2  # segments that gradients go back over
    length: int = 1536  # tokens of a segment of a prompt, at most

    def check(self) -> None:
        for name in ("tokens", "segments", "stop", "length"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1")

    def start(self, table: Tensor, run: Run) -> Tensor:
        """All as the token that ends a text; their positions tell them apart."""
        end = getattr(run.tokenizer, "eos_token_id", None)
        return (table.mean(0) if end is None else table[end]).repeat(self.tokens, 1)

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        if batch["attention_mask"].ndim == 4:
            raise Unsupported("packed rows have no segments in common: give layout='padded'")
        width, step = batch["input_ids"].shape[1], 0 if run.step is None else run.step.index
        lengths = draw_lengths(width, self.segments, random.Random(f"{run.seed}/{len(run.log.fits)}/{step}"))
        most = max(length + (i + 1) * self.tokens for i, length in enumerate(lengths))
        check_room(run, most, "a segment with summaries", "give fewer tokens or segments, or a smaller max_length")
        return batch | {"lengths": torch.tensor(lengths)}

    def forward(self, batch: dict[str, Tensor], run: Run) -> Outputs:
        embeds, real = run.model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
        lengths = batch["lengths"].tolist()
        summaries = embeds[:, :0]
        states: list[Tensor] = []
        for i, (segment, seen) in enumerate(zip(embeds.split(lengths, 1), real.split(lengths, 1), strict=True)):
            if i % self.stop == 0:
                summaries = summaries.detach()
            hidden, new = self.read(summaries, segment, seen, run, plan=None)
            states.append(hidden)
            summaries = torch.cat([summaries, new], 1)
        return Outputs(run.model.get_output_embeddings()(torch.cat(states, 1)), (), (), ())

    def read(
        self, summaries: Tensor, segment: Tensor, real: Tensor, run: Run, plan: InferPlan | None
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, T, H] of a segment behind summaries [B, S, H], and its summary vectors [B, k, H]."""
        rows = find_memory(run.model).rows.to(segment.dtype).expand(len(segment), -1, -1)
        front, length = summaries.shape[1], segment.shape[1]
        mask = torch.cat([real.new_ones(summaries.shape[:2]), real, real.new_ones(rows.shape[:2])], 1)
        inputs = {
            "inputs_embeds": torch.cat([summaries.to(segment.dtype), segment, rows], 1),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        states = feed(run.model, inputs, body=True, plan=plan).last_hidden_state
        return states[:, front : front + length], states[:, front + length :]

    @torch.no_grad()
    def remember(self, ids: list[int], run: Run) -> Tokens | None:
        number = math.ceil(len(ids) / self.length)
        if number * self.tokens >= len(ids):
            return None
        embeds = run.model.get_input_embeddings()(torch.tensor([ids], device=run.device))
        segments = embeds.tensor_split(number, 1)
        most = segments[0].shape[1] + number * self.tokens
        check_room(run, most, "a segment with summaries", "give a smaller length, or fewer tokens")
        summaries = embeds[:, :0]
        for segment in segments:
            real = torch.ones(segment.shape[:2], dtype=torch.long, device=run.device)
            _, new = self.read(summaries, segment, real, run, InferPlan())
            summaries = torch.cat([summaries, new], 1)
        return [*summaries[0]]


def draw_lengths(width: int, segments: int, chance: random.Random) -> list[int]:
    """Random lengths of so many segments, or fewer of a short row, that come to `width`, as the authors draw them."""
    segments = max(1, min(segments, (width + 1) // (SHORTEST + 1)))
    free = width - SHORTEST * segments
    breaks = [0, *sorted(chance.sample(range(free), segments - 1)), free]
    return [SHORTEST + end - begin for begin, end in itertools.pairwise(breaks)]
