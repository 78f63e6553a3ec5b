"""What acquisitions share: the distributions that a model predicts behind prompts, read a batch at a time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from effbench.core.kinds import Select
from effbench.core.method import Alternatives
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.feed import feed
from effbench.nn.train.batches import Batch, collate
from effbench.nn.train.examples import looking
from effbench.nn.train.passes import go_through
from effbench.nn.train.samples import Asked, sample


class Row(NamedTuple):
    """A prompt, and what is fed behind it: each token from the prompt's last one on predicts the next."""

    example: int  # place of the example
    prompt: tuple[int, ...]
    text: tuple[int, ...] = ()


@dataclass(frozen=True)
class Acquisition(Select):
    """Ranks prompts by how much their answers would tell.

    A score belongs to one predicted token. That of a prompt is the score of the first token of its answer, or, over
    `sampled` answers that the model itself writes, the mean over all their tokens.
    """

    must_define: ClassVar[Alternatives] = (("judge",),)
    blind: ClassVar[bool] = True
    usual: ClassVar[float] = 0.2
    type: ClassVar[str] = "data selection"

    over: Literal["first", "sampled"] = "first"  # the answer's first token, or all tokens of answers that are sampled
    answers: int = 4  # that are sampled behind each prompt
    new_tokens: int = 16  # of each of them, at most

    def check(self) -> None:
        super().check()
        self.require(min(self.answers, self.new_tokens) > 0, "answers and new_tokens must be at least 1")

    def judge(self, members: Sequence[Tensor]) -> Tensor:
        """[n]: scores of n predictions, from the float32 logits [n, V] of each member of an ensemble."""
        raise NotImplementedError

    def members(self, rows: Sequence[Row], run: Run) -> Iterator[Tensor]:
        """The hidden states [n, H] that predict, of each member of the ensemble; by default of the model alone."""
        yield read(rows, run)

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        engine = open_engine(run, run.model)
        rows = self._list_rows(examples, engine, run)
        engine.check_room(max(len(row.prompt) + len(row.text) for row in rows))
        sums = torch.zeros(2, len(examples), dtype=torch.float64)  # of scores, and of tokens

        def visit(places: list[int], _: Batch) -> None:
            part = [rows[place] for place in places]
            slices = zip(*(engine.slice_logits(states) for states in self.members(part, run)), strict=True)
            scores = torch.cat([self.judge(logits).double().cpu() for logits in slices])
            owners = torch.tensor([row.example for row in part for _ in range(1 + len(row.text))])
            sums.index_add_(1, owners, torch.stack([scores, torch.ones_like(scores)]))

        read = [Example("", row.prompt + row.text) for row in rows]
        with looking(run.model):
            go_through(run, f"{self.key}-{len(run.log.fits)}", read, {"sums": sums}, visit)
        return sums[0] / sums[1]

    def _list_rows(self, examples: Sequence[Example], engine: Engine, run: Run) -> list[Row]:
        prompts = [example.ids for example in examples]
        if self.over == "first":
            return [Row(place, prompt) for place, prompt in enumerate(prompts)]
        drawn = range(self.answers)
        fits = len(run.log.fits)
        asked = [Asked([*ids], name(self.key, fits, number, ids)) for ids in prompts for number in drawn]
        texts = sample(run, engine, asked, self.new_tokens, 1.0)
        owners = [place for place in range(len(prompts)) for _ in drawn]
        return [Row(place, prompts[place], text[:-1]) for place, text in zip(owners, texts, strict=True)]


def name(*what: object) -> int:
    """A number below 2^32 that stands for this."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:4])


def read(rows: Sequence[Row], run: Run) -> Tensor:
    """[n, H]: the last hidden states of the tokens of rows that predict, row by row."""
    batch = collate([Example("", row.prompt + row.text) for row in rows], run.pad, run.device)
    states: Tensor = feed(run.model, batch, body=True).last_hidden_state
    ends = [(len(row.prompt) - 1, len(row.prompt) + len(row.text)) for row in rows]
    return torch.cat([found[first:last] for found, (first, last) in zip(states, ends, strict=True)])


@contextlib.contextmanager
def dropping(run: Run, rate: float, member: int) -> Iterator[None]:
    """What attention and MLP of each block give is multiplied by a dropout mask [H] inside.

    The mask is the same for all tokens of all examples: a draw of the weights that make these outputs.
    """
    blocks = Blocks(run.model)
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(blocks.blocks):
            for inside in (blocks.names.out, blocks.names.down or blocks.names.mlp):  # the sum over experts
                module = block.get_submodule(inside)
                kept = draw_kept(run.model.config.hidden_size, rate, run.seed, member, blocks.path(number, inside))
                mask = (kept / (1 - rate)).to(run.device)

                def drop(module: torch.nn.Module, given: object, out: Tensor, mask: Tensor = mask) -> Tensor:
                    return out * mask.to(out.dtype)

                stack.callback(module.register_forward_hook(drop).remove)
        yield


def thin(row: Row, rate: float, run: Run, member: int) -> Row:
    """The row with tokens of its prompt left out at this rate, but neither the first nor the last."""
    inner = row.prompt[1:-1]
    kept = draw_kept(len(inner), rate, run.seed, member, row.prompt).tolist()
    left = tuple(token for token, stays in zip(inner, kept, strict=True) if stays)
    return row._replace(prompt=(*row.prompt[:1], *left, *row.prompt[1:][-1:]))


def draw_kept(size: int, rate: float, *what: object) -> Tensor:
    """Bool [size], False at this rate, by chance that belongs to what it is drawn for."""
    return torch.rand(size, generator=torch.Generator().manual_seed(name(*what))) >= rate
