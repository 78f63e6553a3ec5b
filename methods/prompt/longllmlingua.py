"""LongLLMLingua: what the question makes likely is what stays of long contexts (Jiang et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import (
    Judge,
    Piece,
    count_tokens,
    cut,
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
    select_as_package,
    share_budget,
    split,
    strip_end,
    take_within,
)

RESTRICT = " We can get the answer to this question in the given documents."  # x^restrict, behind the question


@dataclass(frozen=True)
class LongLLMLingua(Lingua):
    """Documents are ranked by how likely they make the question, tokens by how much likelier the question makes them.

    Contexts are the paper's documents. The best are looked at, best first, each is kept to a rate by its rank, and
    what stays is brought into the order of the ranks. The system prompt counts as instruction.
    """

    paper = "arXiv:2310.06839"
    published = "longllmlingua(keep=0.25)"
    caveats = (
        "what the large model answers is not put back into the words of the prompt (subsequence recovery)",
        "rates of documents lie evenly about their mean, as in the authors' code, and meet the budget together",
        "the small model is by default the one that is measured; the paper's has 7B parameters",
        "tokens of one character stay together",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    asks = True
    trials = ({}, {"tail": "package", "step": 8, "reorder": False})

    dynamic: float = 0.3  # delta tau: how far the rates of the first and the last document are from their mean
    reorder: bool = True  # whether documents stand in the order of their ranks; False: in that of the prompt

    restrict: bool = True  # whether the question is ranked by with the restrictive statement behind it

    def check(self) -> None:
        super().check()
        self.require(0 <= self.dynamic <= 1, "dynamic is a difference of shares, in [0, 1]")

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1:
            return segments
        judge = open_judge(run, self.compressor)
        asked = segments.question.strip()
        instruction, contexts, question = split(segments, cut(segments, judge.tokenizer))
        ins, que, *sizes = map(count_tokens, (instruction, question, *contexts))
        total = ins + que + sum(sizes)
        package = self.tail == "package"
        if package:
            room, own = find_package_room(self, instruction, contexts, question)
            sizes = [size + 2 for size in own]  # with the empty line between documents
        else:
            room = find_room(self, total, self.instruction * ins + self.question * que)

        # Coarse: documents by r_k, the mean loss of the question behind them (equation 2).
        losses = measure_question(judge, contexts, asked + RESTRICT * self.restrict, bos=not package)
        order = sorted(losses, key=losses.__getitem__)
        taken = take_within(order, own if package else sizes, room + PACKAGE_ROOM if package else COARSE * room)
        stay = taken if self.reorder else sorted(taken)
        dems = sum(sizes[i] for i in taken)

        # Rates by rank (equation 5), of which instruction and question have what the documents leave.
        steps = {i: self.dynamic * (1 - 2 * rank / max(1, len(taken) - 1)) for rank, i in enumerate(taken)}
        steps = steps if len(taken) > 1 else dict.fromkeys(taken, 0.0)
        if package:
            tau = room / (dems + 1)
        else:
            tau_ins, tau_que, left = share_budget(self, total, ins, que, dems, room)
            tau = solve_rate([(sizes[i], steps[i]) for i in taken], left)
        rates = [min(1.0, max(0.0, tau + steps[i])) for i in stay]

        # Fine: contrastive perplexity (equation 3), documents in their new order, each segment behind what was kept.
        segments = arrange(segments, stay)
        pieces, forced = self.read(segments, judge)
        instruction, contexts, question = split(segments, pieces)
        condition = encode(judge, asked + "\n\n", "".join(segments.contexts))
        if package:
            kept = [*instruction, *select_as_package(judge, condition, contexts, rates, self.step), *question]
        else:
            kept = compress_stream(judge, [], instruction, tau_ins, self.step, forced)
            for context, rate in zip(contexts, rates, strict=True):
                kept += compress_stream(judge, list_ids(kept), context, rate, self.step, forced, condition)
            kept += compress_stream(judge, list_ids(kept), question, tau_que, self.step, forced)
        note_chunks(run, self, judge.chunks)
        return join(segments, kept, apart=self.force)


def measure_question(
    judge: Judge, contexts: Sequence[Sequence[Piece]], asked: str, bos: bool = True
) -> dict[int, float]:
    """r_k: the mean loss of the tokens of what is asked behind each context that says anything.

    Without `bos` the first token of a context begins the text.
    """
    ids = {i: list_ids(strip_end(context)) for i, context in enumerate(contexts) if strip_end(context)}
    wanted = encode(judge, asked)
    losses = judge.losses(
        [([judge.first], tokens, wanted) if bos else (tokens[:1], tokens[1:], wanted) for tokens in ids.values()]
    )
    return {i: sum(row) / len(row) for i, row in zip(ids, losses, strict=True)}


def encode(judge: Judge, text: str, behind: str = "") -> list[int]:
    """Tokens of a text that is read beside the prompt, as they are where another text stands `behind` it."""
    encoded = judge.tokenizer(text + behind, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (_, end) in pairs if end <= len(text)]


def solve_rate(documents: Sequence[tuple[int, float]], budget: float) -> float:
    """tau: what steps [(tokens, step)] are added to so that rates cut to [0, 1] leave `budget` tokens, by halving."""
    low, high = -1.0, 2.0
    for _ in range(50):
        tau = (low + high) / 2
        kept = sum(size * min(1.0, max(0.0, tau + step)) for size, step in documents)
        low, high = (tau, high) if kept < budget else (low, tau)
    return high


def arrange(segments: Segments, order: Sequence[int]) -> Segments:
    """The prompt with these of its contexts, in this order; white space between contexts stays where it was."""
    if list(order) == sorted(order):
        return replace(segments, contexts=tuple(segments.contexts[i] for i in order))
    ends = [text[len(text.rstrip()) :] for text in (segments.contexts[i] for i in sorted(order))]
    texts = [segments.contexts[i].strip() + end for i, end in zip(order, ends, strict=True)]
    return replace(segments, contexts=tuple(texts))
