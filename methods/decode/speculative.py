"""Speculative decoding: a draft proposes tokens, the model checks them all in one pass (Leviathan et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from effbench.core.method import Method, Output
from effbench.core.run import Run
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.sampling import Sampling
from effbench.nn.train.teacher import count_shared


@dataclass(frozen=True)
class Speculative(Method):
    """The text is distributed as the verifier's own, whatever the draft proposes; a better draft only makes it faster.

    Draft: the model as the recipe leaves it, with its caches. Verifier: the unchanged model, behind the same prompt.
    """

    paper = "arXiv:2211.17192"
    published = "speculative(k=7)"
    caveats = ("the draft is the compressed model, of the same size; the paper drafts with a smaller one",)
    type = "decoding"
    claims: ClassVar = ("infer.decoder",)

    k: int = 4  # gamma: tokens that are drafted at a time
    verifier: str = "reference"  # role of the model whose text it is: the unchanged one, or the name of a snapshot

    def check(self) -> None:
        self.require(self.k >= 1, "k must be at least 1")
        self.require(self.verifier != "model", "verifier='model' is the draft: it has nothing to check itself by")

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.verifier: frozenset()}

    def apply(self, run: Run) -> None:
        engine = open_engine(run, run.role(self.verifier), count_shared(run, self.verifier))
        run.infer.claim("decoder", Speculation(self.k, self.verifier, engine), self)


@dataclass
class Drafting:
    """A text in the making; what the models have not yet read of it are its last tokens."""

    tokens: list[int]
    states: list[Any]  # of draft and verifier
    read: list[int]  # tokens that each has read


@dataclass
class Speculation:
    """Generates with a draft and a verifier, prompt by prompt; takes down how many tokens of whole drafts it took, and
    how many every pass of the verifier behind a prompt gave the text."""

    k: int
    role: str  # of the verifier
    verifier: Any  # its engine, of the tokens that the draft predicts, too
    accepted: list[int] = field(default_factory=list)  # of each pass of the verifier over k drafted tokens
    committed: list[int] = field(default_factory=list)  # of each pass; nothing behind a stop token, which counts

    def generate(
        self,
        draft: Any,
        prompts: Sequence[Any],
        most: int,
        stops: set[int],
        sampling: Sampling | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continuations of the prompts, each of at most so many tokens, that end before a stop token.

        `numbers` are names of the prompts, by which they are sampled; by default 0, 1, ...
        """
        made = []
        sampling = sampling or Sampling(temperature=0.0)
        numbers = range(len(prompts)) if numbers is None else numbers
        for prompt, chance in zip(prompts, sampling.chances(numbers), strict=True):
            text = self.start(draft, prompt, sampling, chance)
            while len(text.tokens) < most and not stops.intersection(text.tokens):
                before = len(text.tokens)
                self.go_on(draft, text, min(self.k, most - before - 1), sampling, chance)
                new = text.tokens[before:]
                self.committed.append(next((i for i, token in enumerate(new, 1) if token in stops), len(new)))
            cut = next((i for i, token in enumerate(text.tokens) if token in stops), most)
            made.append(text.tokens[: min(cut, most)])
        return made

    def start(self, draft: Any, prompt: Any, sampling: Sampling, chance: torch.Generator) -> Drafting:
        """Both read the prompt; the first token is the verifier's."""
        (ours, _), (theirs, last) = draft.read([prompt], croppable=True), self.verifier.read([prompt], croppable=True)
        p = sampling.warp(self.verifier.head(last)[0]).cpu()
        return Drafting([draw(p, chance)], [ours, theirs], [0, 0])

    def go_on(self, draft: Any, text: Drafting, k: int, sampling: Sampling, chance: torch.Generator) -> None:
        """One pass of the verifier over `k` drafted tokens: at least one token more (algorithm 1 of the paper).

        Fewer than the method's are drafted where the text ends before, as there may be no positions for more.
        """
        ours, theirs = text.states
        drafted: list[int] = []
        q: list[Tensor] = []
        unread = text.tokens[text.read[0] :]
        for _ in range(k):  # x_i ~ q_i
            hidden = draft.extend(ours, torch.tensor([unread], device=draft.device)).last_hidden_state
            q.append(sampling.warp(draft.head(hidden[:, -1])[0, : self.verifier.vocabulary]).cpu())
            unread = [draw(q[-1], chance)]
            drafted += unread
        unread = [*text.tokens[text.read[1] :], *drafted]
        hidden = self.verifier.extend(theirs, torch.tensor([unread], device=self.verifier.device)).last_hidden_state
        p = sampling.warp(self.verifier.head(hidden[0, -k - 1 :])).cpu()
        # n = min {i : r_i > p_i(x_i) / q_i(x_i)}, the first that is turned down
        odds = [float(p[i][x] / q[i][x]) for i, x in enumerate(drafted)]
        luck = torch.rand(k, generator=chance).tolist()
        n = next((i for i in range(k) if luck[i] >= odds[i]), k)
        # p' = norm(max(0, p - q)); of all accepted, one more from p
        rest = p[n] if n == k else (p[n] - q[n]).clamp(min=0)
        text.tokens += [*drafted[:n], draw(rest / rest.sum(), chance)]
        if k == self.k:
            self.accepted.append(n)
        # What was turned down is forgotten before caches settle; the draft has never read its last token.
        for place, (engine, state, fed) in enumerate(((draft, ours, max(0, k - 1)), (self.verifier, theirs, k))):
            engine.crop(state, fed - min(n, fed))
            engine.settle(state)
            text.read[place] = len(text.tokens) - 1 - n + min(n, fed)


def draw(probabilities: Tensor, chance: torch.Generator) -> int:
    """A token by its probability [V]."""
    return int(torch.multinomial(probabilities, 1, generator=chance))
