"""LLMLingua: a small model's perplexity decides what of a prompt stays (Jiang et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from effbench.core.errors import Refused, Unsupported
from effbench.core.kinds import Shorten
from effbench.core.method import Output
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import Piece, count_tokens, cut, join
from effbench.nn.infer.engine import open_engine

COARSE = 2.0  # k of the paper: demonstrations are first kept to so many times their budget


@dataclass(frozen=True)
class LLMLingua(Shorten):
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
    compressor: str = "reference"  # role of the small model: reference, model, or the name of a snapshot

    def check(self) -> None:
        super().check()
        self.require(0 < self.instruction <= 1, "instruction is a share of its tokens, in (0, 1]")
        self.require(0 < self.question <= 1, "question is a share of its tokens, in (0, 1]")
        self.require(self.step >= 1, "step must be at least 1")

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.compressor: set()}  # recipes ask whether there is such a model

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1:
            return segments
        pieces = cut(segments, run.tokenizer)
        parts = [[piece for piece in pieces if piece.part == i] for i in range(len(segments.contexts) + 3)]
        instruction, contexts, question = parts[0] + parts[1], parts[2:-1], parts[-1]
        engine, front = open_engine(run, run.role(self.compressor)), [choose_first(run.tokenizer)]

        # Budget controller. Lengths L in tokens; room is tau_dems L_dems.
        total, ins, que = map(count_tokens, (pieces, instruction, question))
        room = self.keep * total - (self.instruction * ins + self.question * que)
        if room < -1e-9:  # what binary fractions make of 0
            raise Refused(
                f"{self}: of {total} tokens instruction and question alone need more than the {self.keep * total:.0f} "
                "that may stay"
            )
        chosen = choose_contexts(engine, front, contexts, COARSE * room)
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
        prefix = list(front)
        for stream, rate in zip((instruction, demonstrations, question), rates, strict=True):
            for segment in cut_segments(stream, self.step):
                stay = compress(engine, prefix, segment, rate)
                kept += stay
                prefix += [token for piece in stay for token in piece.ids]
        if pieces and (not kept or kept[-1] is not pieces[-1]):  # of a prompt that ends with a context that went
            kept.append(pieces[-1])
        return join(segments, kept)


def choose_first(tokenizer: Any) -> int:
    """The token that a text begins with. Raises `Unsupported` where there is none."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise Unsupported("the tokenizer has neither a BOS nor an EOS token to begin a text with")
    return int(first)


def choose_contexts(engine: Any, front: list[int], contexts: Sequence[Sequence[Piece]], budget: float) -> set[int]:
    """Demonstration-level compression: by perplexity, highest first, up to the one with which the budget is used up."""
    ids = {i: [token for piece in context for token in piece.ids] for i, context in enumerate(contexts) if context}
    judged = len(ids) > 1 and sum(map(len, ids.values())) > budget
    scored = engine.score([(front, tokens) for tokens in ids.values()]) if judged else []
    surprisal = {i: entry.nll for i, entry in zip(ids, scored, strict=False)}  # its exponential is the perplexity
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


def compress(engine: Any, prefix: list[int], segment: list[Piece], rate: float) -> list[Piece]:
    """The pieces of a segment with a token whose loss behind the compressed `prefix` is above the threshold."""
    if rate >= 1:
        return segment
    ids = [token for piece in segment for token in piece.ids]
    losses = [-logprob for logprob in engine.score([(prefix, ids)])[0].token_logprobs]
    gamma = find_threshold(losses, rate)
    left = iter(losses)
    above = [max(next(left) for _ in piece.ids) > gamma for piece in segment]
    return [piece for piece, keep in zip(segment, above, strict=True) if keep or piece.stays]


def find_threshold(losses: Sequence[float], rate: float) -> float:
    """gamma_j: the percentile of the losses above which a share `rate` of them lies, to the nearest token."""
    dropped = len(losses) - int(rate * len(losses) + 0.5)
    return sorted(losses)[dropped - 1] if dropped else -float("inf")
