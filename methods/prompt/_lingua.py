"""What LLMLingua and LongLLMLingua share: budgets, thresholds, and the selection of the authors' package."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence, Set
from typing import Literal

from effbench.core.views import Segments
from effbench.methods.prompt._common import Judge, Judged, Piece, count_tokens, find_room, list_ids, list_parts

COARSE = 2.0  # k of the papers: demonstrations are first kept to so many times their budget
PACKAGE_ROOM = 100 + 1e-9  # tokens beyond the budget up to which, and with which, the package takes contexts


@dataclasses.dataclass(frozen=True)
class Lingua(Judged):
    """Settings of both papers."""

    instruction: float = 0.85  # tau_ins: share of the instruction's tokens that stay, or more where contexts leave room
    question: float = 0.9  # tau_que: the same of the question
    step: int = 200  # tokens that are judged in one forward pass, of which a share stays
    tail: Literal["compressed", "package"] = "compressed"  # package: as the authors' package does it, which compresses
    # contexts alone, and no more of them than whole steps

    def check(self) -> None:
        super().check()
        self.require(0 < self.instruction <= 1, "instruction is a share of its tokens, in (0, 1]")
        self.require(0 < self.question <= 1, "question is a share of its tokens, in (0, 1]")
        self.require(self.step >= 1, "step must be at least 1")
        self.require(not (self.force and self.tail == "package"), "the package forces nothing: leave force or tail out")


def split(segments: Segments, pieces: Sequence[Piece]) -> tuple[list[Piece], list[list[Piece]], list[Piece]]:
    """Pieces of system prompt and instruction, of each context, and of the question."""
    parts: list[list[Piece]] = [[] for _ in list_parts(segments)]
    for piece in pieces:
        parts[piece.part].append(piece)
    return parts[0] + parts[1], parts[2:-1], parts[-1]


def share_budget(method: Lingua, total: int, ins: int, que: int, dems: int, room: float) -> tuple[float, float, float]:
    """Rates of instruction and question, and tokens that stay of demonstrations of which `dems` are looked at.

    What is left of k tau_dems L_dems is shared by instruction and question: delta tau. Of their budget demonstrations
    keep at least a k-th, so that the prompt meets its own.
    """
    unused = max(0.0, min(COARSE * room - dems, room - room / COARSE))
    more = unused / (ins + que) if ins + que else 0.0
    rates = min(1.0, method.instruction + more), min(1.0, method.question + more)
    return *rates, method.keep * total - rates[0] * ins - rates[1] * que


def take_within(order: Sequence[int], sizes: Sequence[int], budget: float) -> list[int]:
    """The first of `order`, up to the one with which the budget is used up."""
    taken: list[int] = []
    for i in order:
        if budget <= 0:
            break
        taken.append(i)
        budget -= sizes[i]
    return taken


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


def compress_stream(
    judge: Judge,
    prefix: list[int],
    stream: Sequence[Piece],
    rate: float,
    step: int,
    forced: Set[Piece],
    condition: list[int] | None = None,
) -> list[Piece]:
    """Iterative token-level compression: each segment is judged behind the `prefix` and what was kept before it.

    By its losses, or by how much less they are behind a `condition` in front of all, such as the question.
    """
    if rate >= 1:
        return [*stream]
    kept: list[Piece] = []
    for segment in cut_segments(stream, step):
        seen, ids = [*prefix, *list_ids(kept)], list_ids(segment)
        (worth,) = judge.losses([([judge.first], seen, ids)])
        if condition is not None:
            (behind,) = judge.losses([([judge.first, *condition], seen, ids)])
            worth = [loss - less for loss, less in zip(worth, behind, strict=True)]
        kept += select(segment, worth, rate, forced)
    return kept


def select(segment: Sequence[Piece], worth: Sequence[float], rate: float, forced: Set[Piece]) -> list[Piece]:
    """The pieces with a token whose worth, one number a token, is above the threshold of a share `rate` of them."""
    left = iter(worth)
    own = [[math.inf if piece in forced else x for x in itertools.islice(left, len(piece.ids))] for piece in segment]
    gamma = find_threshold([*itertools.chain.from_iterable(own)], rate)
    pairs = zip(segment, own, strict=True)
    return [piece for piece, values in pairs if piece.stays or piece in forced or max(values) > gamma]


def find_threshold(worth: Sequence[float], rate: float) -> float:
    """gamma_j: the percentile above which a share `rate` lies, to the nearest token."""
    dropped = len(worth) - int(rate * len(worth) + 0.5)
    return sorted(worth)[dropped - 1] if dropped > 0 else -float("inf")


def select_as_package(
    judge: Judge, front: list[int], contexts: Sequence[Sequence[Piece]], rates: Sequence[float], step: int
) -> list[Piece]:
    """The pieces of contexts that `llmlingua` 0.2.2 keeps, which judges them against what they are behind `front`.

    Without `front` worth is the loss. It differs from the papers: a token stays for the loss of the one behind it; the
    threshold is that of all that is left of the text, kept and not yet read; the loss of what follows a step stays what
    it was before the step was compressed; and what is left behind the last whole step is not compressed, of texts
    shorter than a step most or all.
    """
    joined = strip_end([piece for context in contexts for piece in context])
    stream = [(piece, token) for piece in joined for token in piece.ids]
    where = [*range(-len(front), len(stream))]  # of what is left; below 0: in front
    start = len(front)

    def measure(places: Sequence[int]) -> list[float]:
        ids = [front[place] if place < 0 else stream[place][1] for place in places]
        (losses,) = judge.losses([(ids[:1], [], ids[1:])])
        return losses

    end, ready = min(step + start, len(where)), 0
    losses, alone = measure(where), measure(where[start:]) if start else []
    for number, group in enumerate(
        plan_package([count_tokens(strip_end(context)) + 2 for context in contexts], rates, step)
    ):
        if end > len(where):
            break
        if number:
            losses[ready : end - 1] = measure(where[:end])[ready:]
            if start:
                own = max(0, ready - start)
                alone[own : end - start - 1] = measure(where[start:end])[own:]
            ready = end - step
        for size, rate in group:
            behind = losses[start:]
            worth = [own - loss for own, loss in zip(alone, behind, strict=True)] if start else behind
            gamma = -math.inf if rate == 1 else sorted(worth, reverse=True)[max(0, int(len(worth) * rate) - 1)]
            stop = end - step + size
            stays = [*[True] * start, *[value > gamma for value in worth], True]
            for place in [*range(len(where))[stop:], *range(len(where))[: stop - size]]:  # from the end where below 0
                stays[place] = True
            where = [place for place, stay in zip(where, stays, strict=True) if stay]
            losses = [loss for loss, stay in zip(losses, stays[:-1], strict=True) if stay]
            alone = [loss for loss, stay in zip(alone, stays[start:-1], strict=True) if stay] if start else []
            end = stop - stays[:stop].count(False) + step
    kept = {stream[place][0] for place in where if place >= 0}
    return [piece for context in contexts for piece in context if piece in kept or piece.stays]


def strip_end(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces without the white space at their end."""
    ended = itertools.dropwhile(lambda piece: not piece.text.strip(), reversed(pieces))
    return [*ended][::-1]


def find_package_room(
    method: Lingua, instruction: Sequence[Piece], contexts: Sequence[Sequence[Piece]], question: Sequence[Piece]
) -> tuple[float, list[int]]:
    """Tokens that the package leaves to contexts, and theirs. It does not count white space between parts.

    Raises `Refused` where instruction and question alone are more.
    """
    sizes = [count_tokens(strip_end(context)) for context in contexts]
    fixed = count_tokens(strip_end(instruction)) + count_tokens(strip_end(question))
    return find_room(method, fixed + sum(sizes), fixed), sizes


def plan_package(lengths: Sequence[int], rates: Sequence[float], step: int) -> list[list[tuple[int, float]]]:
    """How many tokens at which rate, in each step, for contexts of these lengths; the first step is a token shorter."""
    steps: list[list[tuple[int, float]]] = []
    now: list[tuple[int, float]] = []
    used = 1
    for length, rate in zip(lengths, rates, strict=True):
        left = length
        while used + left >= step:
            steps.append([*now, (step - used, rate)])
            left -= step - used
            now, used = [], 0
        if left:
            now.append((left, rate))
            used += left
    return [*steps, now]
