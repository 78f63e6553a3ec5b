"""Inference methods that do nothing, or what they do not say, and the check of the contract that catches each."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from effbench import checks
from effbench.core.errors import Usage
from effbench.core.kinds import Cache, Evict, Prompt
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.core.views import Codec, Segments, Slots
from effbench.methods.decode.speculative import Speculative


@dataclasses.dataclass(frozen=True)
class Zeros(Cache):
    """Decodes zeros, also where it says that nothing changes."""

    identity: ClassVar = {"bits": 16}
    bits: int = 16

    def codecs(self) -> tuple[Codec, Codec]:
        codec = Codec(lambda units: (units.half(),), lambda stored, width: torch.zeros_like(stored[0]).float())
        return codec, codec


@dataclasses.dataclass(frozen=True)
class Copies(Cache):
    """Encodes into what came in."""

    def codecs(self) -> tuple[Codec, Codec]:
        codec = Codec(lambda units: (units.clone(),), lambda stored, width: stored[0])
        return codec, codec


@dataclasses.dataclass(frozen=True)
class KeepsAll(Evict):
    """Scores, and evicts nothing."""

    def capacity(self, prompt: Tensor) -> Tensor:
        return prompt + 1_000

    def score(self, slots: Slots, state: Any) -> Tensor:
        return slots.position


@dataclasses.dataclass(frozen=True)
class LooksAtCompany(Evict):
    """Treats rows of a batch by their number in it."""

    keep: float | None = 0.5

    def score(self, slots: Slots, state: Any) -> Tensor:
        rows = torch.arange(len(slots.position))[:, None, None]
        return torch.where(rows % 2 == 0, slots.position, -slots.position)


@dataclasses.dataclass(frozen=True)
class Forgets(Evict):
    """Draws anew in every cache."""

    keep: float | None = 0.5

    def score(self, slots: Slots, state: Any) -> Tensor:
        return torch.rand(slots.position.shape)


@dataclasses.dataclass(frozen=True)
class SamePrompt(Prompt):
    """Gives the prompt back."""

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        return segments


CALLS = iter(range(1_000))


@dataclasses.dataclass(frozen=True)
class OtherEveryTime(Prompt):
    """Shortens to something else at every call."""

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        return segments.with_contexts([text[: 3 + next(CALLS) % 5] for text in segments.contexts])


@dataclasses.dataclass(frozen=True)
class KeepsTwice(Evict):
    """Keeps twice as much as it is asked to."""

    keep: float | None = 0.25

    def capacity(self, prompt: Tensor) -> Tensor:
        return 2 * super().capacity(prompt)

    def score(self, slots: Slots, state: Any) -> Tensor:
        return slots.position


@dataclasses.dataclass(frozen=True)
class OneScore(Evict):
    """Scores one slot for all."""

    keep: float | None = 0.25

    def score(self, slots: Slots, state: Any) -> Tensor:
        return slots.position[..., :1]


@dataclasses.dataclass(frozen=True)
class DropsQuestion(Prompt):
    """Shortens the question away."""

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        return dataclasses.replace(segments, question="")


@dataclasses.dataclass(frozen=True)
class ClaimsOnly(Method):
    """Claims a slot and writes nothing."""

    claims: ClassVar = ("infer.rope",)

    def apply(self, run: Run) -> None:
        run.model.eval()


@dataclasses.dataclass(frozen=True)
class OwnText(Speculative):
    """Writes the draft's text."""

    def apply(self, run: Run) -> None:
        super().apply(run)
        run.infer.slot("decoder").go_on = self.draft

    def draft(self, draft: Any, text: Any, left: int, sampling: Any, chance: Any) -> None:
        text.tokens.append(5)


PLANTED = [
    ("check_encodes", Zeros(), "relative error of 1; zeros have 1"),
    ("check_holds_what_is_asked", KeepsTwice(), r"10 slots are asked for, and \{20\} are held"),
    ("check_shortens", DropsQuestion(), "the question is gone"),
    ("check_writes_its_slots", ClaimsOnly(), "claims infer.rope and does not write it"),
    ("check_text_is_the_verifiers", OwnText(), "not the verifier's"),
    ("check_identity", Zeros(), "differ at the identity settings"),
    ("check_changes_what_is_read", Copies(), "what is scored is what is scored without it"),
    ("check_changes_what_is_read", KeepsAll(), "what is scored is what is scored without it"),
    ("check_changes_what_is_read", LooksAtCompany(), "alone a row differs"),
    ("check_deterministic", Forgets(), "two runs with one seed differ"),
    ("check_shortens", SamePrompt(), "tokens before and"),
    ("check_shortens", OtherEveryTime(), "shortened in two ways"),
]


@pytest.mark.parametrize(("check", "method", "message"), PLANTED)
def test_a_planted_fault_is_caught(check: str, method: Method, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(checks, check)(method)


def test_scores_of_another_shape_are_an_error() -> None:
    run = checks.toy_run()
    run.apply(OneScore())
    with pytest.raises(ValueError, match=r"scores are numbers of the shape \(3, 4, 39\)"):
        checks.score(run)


def test_a_claim_that_nothing_reads_is_an_error_at_load() -> None:
    @dataclasses.dataclass(frozen=True)
    class Claims(Cache):
        claims: ClassVar = ("infer.decode",)

        def codecs(self) -> tuple[None, None]:
            return None, None

    with pytest.raises(Usage, match=r"claims 'infer\.decode', which nothing reads; did you mean 'infer\.decoder'"):
        Claims()
