"""LLMLingua: a small model's perplexity decides what of a prompt stays (Jiang et al., 2023)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import (
    Judge,
    Judged,
    Piece,
    count_tokens,
    cut,
    find_forced,
    find_room,
    join,
    note_chunks,
    open_judge,
)

COARSE = 2.0  # k of the paper: demonstrations are first kept to so many times their budget


@dataclass(frozen=True)
class LLMLingua(Judged):
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

    keep: float = 0.5  # tau: share of the tokens of the whole prompt that stay, in (0, 1]
    instruction: float = 0.85  # tau_ins: share of the instruction's tokens that stay, or more where contexts leave room
    question: float = 0.9  # tau_que: the same of the question
    step: int = 200  # tokens that are judged in one forward pass, of which a share stays; the paper has 100
    force: bool = False  # whether digits, names, words of the question and special tokens stay, as whole words

    def check(self) -> None:
        super().check()
        self.require(0 < self.instruction <= 1, "instruction is a share of its tokens, in (0, 1]")
        self.require(0 < self.question <= 1, "question is a share of its tokens, in (0, 1]")
        self.require(self.step >= 1, "step must be at least 1")

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1:
            return segments
        judge = open_judge(run, self.compressor)
        pieces = cut(segments, judge.tokenizer)
        forced = {pieces[i] for i in find_forced(segments, pieces, self.force)}
        parts = [[piece for piece in pieces if piece.part == i] for i in range(len(segments.contexts) + 3)]
        instruction, contexts, question = parts[0] + parts[1], parts[2:-1], parts[-1]

        # Budget controller. Lengths L in tokens; room is tau_dems L_dems.
        total, ins, que = map(count_tokens, (pieces, instruction, question))
        room = find_room(self, self.keep, total, self.instruction * ins + self.question * que)
        chosen = choose_contexts(judge, contexts, COARSE * room)
        demonstrations = [piece for i in sorted(chosen) for piece in contexts[i]]
        dems = count_tokens(demonstrations)
        # What is left of k tau_dems L_dems is shared by instruction and question: delta tau. Of their budget
        # demonstrations keep at least a k-th, so that the prompt meets its own.
        unused = max(0.0, min(COARSE * room - dems, room - room / COARSE))
        more = unused / (ins + que) if ins + que else 0.0
        rates = [min(1.0, self.instruction + more), 0.0, min(1.0, self.question + more)]
        rates[1] = min(1.0, (self.keep * total - rates[0] * ins - rates[2] * que) / dems) if dems else 0.0

        # Iterative token-level compression: each segment is judged behind what has been kept of those before it.
        kept: list[Piece] = []
        prefix: list[int] = []
        for stream, rate in zip((instruction, demonstrations, question), rates, strict=True):
            for segment in cut_segments(stream, self.step):
                stay = compress(judge, prefix, segment, rate, forced)
                kept += stay
                prefix += [token for piece in stay for token in piece.ids]
        if pieces and (not kept or kept[-1] is not pieces[-1]):  # of a prompt that ends with a context that went
            kept.append(pieces[-1])
        note_chunks(run, self, judge.chunks)
        return join(segments, kept, apart=self.force)


def choose_contexts(judge: Judge, contexts: Sequence[Sequence[Piece]], budget: float) -> set[int]:
    """Demonstration-level compression: by perplexity, highest first, up to the one with which the budget is used up."""
    ids = {i: [token for piece in context for token in piece.ids] for i, context in enumerate(contexts) if context}
    judged = len(ids) > 1 and sum(map(len, ids.values())) > budget
    losses = judge.losses([([judge.first], [], tokens) for tokens in ids.values()]) if judged else []
    surprisal = {i: sum(row) / len(row) for i, row in zip(ids, losses, strict=False)}  # logarithms of perplexities
    chosen: set[int] = set()
    for i in sorted(ids, key=lambda i: -surprisal.get(i, 0.0)):
        if budget <= 0:
            break
        chosen.add(i)
        budget -= len(ids[i])
    return chosen


def cut_segments(pieces: Sequence[Piece], step: int) -> Iterator[list[Piece]]:
    """Runs of pieces of `step` tokens, or a few more where the last make one character."""
    segment: list[Piece] = []
    for piece in pieces:
        segment.append(piece)
        if count_tokens(segment) >= step:
            yield segment
            segment = []
    if segment:
        yield segment


def compress(
    judge: Judge, prefix: list[int], segment: list[Piece], rate: float, forced: Set[Piece] = frozenset()
) -> list[Piece]:
    """The pieces of a segment with a token whose loss behind the compressed `prefix` is above the threshold."""
    if rate >= 1:
        return segment
    (found,) = judge.losses([([judge.first], prefix, [token for piece in segment for token in piece.ids])])
    left = iter(found)
    losses = [
        [math.inf if piece in forced else loss for loss in itertools.islice(left, len(piece.ids))] for piece in segment
    ]
    gamma = find_threshold([*itertools.chain.from_iterable(losses)], rate)
    pairs = zip(segment, losses, strict=True)
    return [piece for piece, own in pairs if piece.stays or piece in forced or max(own) > gamma]


def find_threshold(losses: Sequence[float], rate: float) -> float:
    """gamma_j: the percentile of the losses above which a share `rate` of them lies, to the nearest token."""
    dropped = len(losses) - int(rate * len(losses) + 0.5)
    return sorted(losses)[dropped - 1] if dropped else -float("inf")
