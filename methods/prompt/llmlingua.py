"""LLMLingua: a small model's perplexity decides what of a prompt stays (Jiang et al., 2023)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import (
    Judge,
    Piece,
    count_tokens,
    find_room,
    join,
    list_ids,
    note_chunks,
    open_judge,
)
from effbench.methods.prompt._lingua import (
    COARSE,
    PACKAGE_ROOM,
    Lingua,
    compress_stream,
    find_package_room,
    select,
    select_as_package,
    share_budget,
    split,
    strip_end,
    take_within,
)


@dataclass(frozen=True)
class LLMLingua(Lingua):
    """Budget controller (algorithm 1 of the paper), then iterative token-level compression (algorithm 2).

    Contexts are the paper's demonstrations, the system prompt counts as instruction. The white space behind a part
    stays with it, and the last token of the prompt stays.
    """

    paper = "arXiv:2310.05736"
    published = "llmlingua(keep=0.2, step=100)"
    caveats = (
        "without distribution alignment: the small model is not tuned on text of the large one",
        "the paper's budgets are those of one demonstration and less, a fifth of the prompt at most for GSM8K",
        "demonstrations that stay are compressed so that the whole prompt meets its budget, as in the authors' code",
        "the small model is by default the one that is measured; the paper's is another, of 7B parameters or GPT-2",
        "tokens of one character stay together",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    trials = ({}, {"order": "topk", "instruction": 0.9, "question": 1.0}, {"tail": "package", "step": 8})

    order: Literal["iterative", "topk"] = "iterative"  # topk: of each part the tokens with the largest losses in the
    # whole prompt; no choice of demonstrations, and nothing is judged behind what was kept

    def check(self) -> None:
        super().check()
        self.require(self.order == "iterative" or self.tail == "compressed", "the package's order is iterative")

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1:
            return segments
        judge = open_judge(run, self.compressor)
        pieces, forced = self.read(segments, judge)
        instruction, contexts, question = split(segments, pieces)
        if self.tail == "package":
            demonstrations = follow_package(self, judge, instruction, contexts, question)
            kept = [*instruction, *demonstrations, *question]
        elif self.order == "topk":
            kept = self._rank(judge, instruction, [*itertools.chain.from_iterable(contexts)], question, forced)
        else:
            kept = self._iterate(judge, instruction, contexts, question, forced)
        if pieces and (not kept or kept[-1] is not pieces[-1]):  # of a prompt that ends with a context that went
            kept.append(pieces[-1])
        note_chunks(run, self, judge.chunks)
        return join(segments, kept, apart=self.force)

    def _iterate(
        self,
        judge: Judge,
        instruction: list[Piece],
        contexts: list[list[Piece]],
        question: list[Piece],
        forced: Set[Piece],
    ) -> list[Piece]:
        # Budget controller. Lengths L in tokens; room is tau_dems L_dems.
        ins, que, *sizes = map(count_tokens, (instruction, question, *contexts))
        total = ins + que + sum(sizes)
        room = find_room(self, total, self.instruction * ins + self.question * que)
        chosen = choose_contexts(judge, contexts, COARSE * room)
        demonstrations = [piece for i in sorted(chosen) for piece in contexts[i]]
        dems = count_tokens(demonstrations)
        tau_ins, tau_que, left = share_budget(self, total, ins, que, dems, room)

        # Iterative token-level compression: each segment is judged behind what has been kept of those before it.
        kept: list[Piece] = []
        for stream, rate in ((instruction, tau_ins), (demonstrations, left / max(1, dems)), (question, tau_que)):
            kept += compress_stream(judge, list_ids(kept), stream, rate, self.step, forced)
        return kept

    def _rank(
        self,
        judge: Judge,
        instruction: list[Piece],
        context: list[Piece],
        question: list[Piece],
        forced: Set[Piece],
    ) -> list[Piece]:
        ins, que, size = map(count_tokens, (instruction, question, context))
        room = find_room(self, ins + que + size, self.instruction * ins + self.question * que)
        (losses,) = judge.losses([([judge.first], [], list_ids([*instruction, *context, *question]))])
        kept: list[Piece] = []
        left = iter(losses)
        for part, rate in (instruction, self.instruction), (context, room / max(1, size)), (question, self.question):
            kept += select(part, [*itertools.islice(left, count_tokens(part))], rate, forced)
        return kept


def choose_contexts(judge: Judge, contexts: Sequence[Sequence[Piece]], budget: float, bos: bool = True) -> list[int]:
    """Demonstration-level compression: by perplexity, highest first, up to the one with which the budget is used up."""
    sizes = [*map(count_tokens, contexts)]
    there = [i for i, size in enumerate(sizes) if size]
    if len(there) < 2 or sum(sizes) <= budget:
        return take_within(there, sizes, budget)
    found = measure_perplexity(judge, contexts, bos)
    return take_within(sorted(found, key=lambda i: -found[i]), sizes, budget)


def measure_perplexity(judge: Judge, contexts: Sequence[Sequence[Piece]], bos: bool = True) -> dict[int, float]:
    """Mean loss of the tokens of each context that has any, the logarithm of its perplexity.

    Without `bos` the first token of a context begins the text, and is not judged.
    """
    ids = {i: list_ids(strip_end(context) if not bos else context) for i, context in enumerate(contexts) if context}
    losses = judge.losses([([judge.first], [], row) if bos else (row[:1], [], row[1:]) for row in ids.values()])
    return {i: sum(row) / max(1, len(row)) for i, row in zip(ids, losses, strict=True)}


def follow_package(
    method: LLMLingua,
    judge: Judge,
    instruction: Sequence[Piece],
    contexts: Sequence[Sequence[Piece]],
    question: Sequence[Piece],
) -> list[Piece]:
    """What `PromptCompressor.compress_prompt` keeps of the contexts; instruction and question stay as they are."""
    room, sizes = find_package_room(method, instruction, contexts, question)
    chosen = choose_contexts(judge, [*map(strip_end, contexts)], room + PACKAGE_ROOM, bos=False)
    taken = [contexts[i] for i in sorted(chosen)]
    tau = min(1.0, room / (sum(sizes[i] + 2 for i in chosen) + 1))  # two tokens for the empty line between contexts
    return select_as_package(judge, [], taken, [tau] * len(taken), method.step)
