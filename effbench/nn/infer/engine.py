"""Scoring and generation through the inference plan: probes measure what a method really leaves behind.

Without cache methods a continuation is scored in one forward pass. With them the context is prefilled, the cache
evicts and encodes, and the continuation follows `block` tokens at a time, because in one block an evicting cache
is never read. Either way the head sees a slice of the hidden states at a time, so that the memory of scoring does not
grow with text times vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from effbench.core.errors import Refused
from effbench.core.run import InferPlan, Run
from effbench.nn.infer.cache import SlotCache
from effbench.nn.model import attention
from effbench.nn.model.blocks import Blocks, count_positions
from effbench.nn.model.feed import count_front, count_soft, feed

SLICE_BYTES = {"cpu": 2**24, "cuda": 2**27}  # of the float32 logits that scoring makes at a time


@dataclasses.dataclass(frozen=True)
class Scored:
    """A scored continuation."""

    logprob: float  # natural logarithm, summed
    greedy: bool  # whether every token is the most likely one
    token_logprobs: list[float]

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, in nats per token."""
        return -self.logprob / len(self.token_logprobs)

    @classmethod
    def of(cls, logprobs: Tensor, likeliest: Tensor) -> Scored:
        """From float32 [N] and bool [N], as `score_targets` gives them."""
        return cls(float(logprobs.double().sum()), bool(likeliest.all()), logprobs.tolist())


@dataclasses.dataclass
class State:
    """A batch in the middle of generation."""

    cache: Any
    ids: Tensor  # [B] the token to be fed next
    length: int  # tokens in the cache
    padding: Tensor | None = None  # bool [B, length], True where real; None when nothing is padded


def open_engine(run: Run, model: Any = None) -> Engine:
    """Scores and generates with the model of a run under its plan, or with another model under an empty one."""
    return Engine(run.model, run.infer, run.pad) if model is None else Engine(model, InferPlan(), run.pad)


class Engine:
    """Runs `model` under `plan`."""

    def __init__(self, model: Any, plan: InferPlan, pad: int = 0) -> None:
        self.model = model
        self.plan = plan
        self.pad = pad
        self.device = next(model.parameters()).device
        self.shrunk: bool | None = None  # whether a cache ever held less than it had seen; None: nothing streamed

    @property
    def max_length(self) -> int:
        """Positions the model has."""
        return count_positions(self.model) - count_front(self.model)

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, V] float32 logits of tokens [B, T], `mask` True where real (padding on the right or the left)."""
        with self._run_plan():
            out = feed(self.model, {"input_ids": ids.to(self.device), **self._describe_padding(mask)}, plan=self.plan)
        logits: Tensor = out.logits.float()
        return logits

    def hidden(self, ids: Tensor, padding: dict[str, Tensor] | None = None) -> Tensor:
        """[B, T, H] last hidden states of tokens [B, T], of which the head makes logits."""
        with self._run_plan():
            out = feed(self.model, {"input_ids": ids.to(self.device), **(padding or {})}, body=True, plan=self.plan)
        states: Tensor = out.last_hidden_state
        return states

    def slice_logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """float32 logits [n, V] of hidden states [N, H] in their order, at most `SLICE_BYTES` at a time."""
        head = self.model.get_output_embeddings()
        rows = max(1, SLICE_BYTES[self.device.type] // (4 * self.model.config.vocab_size))
        for part in hidden.split(rows):
            with torch.no_grad():
                logits: Tensor = head(part).float()
            yield logits

    def score(
        self, pairs: list[tuple[list[int], list[int]]], block: int | None = None, batch_tokens: int = 8192
    ) -> list[Scored]:
        """Log-likelihood of each continuation given its context (at least one token), in the order given.

        `block` is the number of tokens per forward pass after the context; None is all of them, or 1 under a plan
        that evicts or encodes.
        """
        if self.plan.streams or block is not None:
            return [self._stream(context, continuation, block or 1) for context, continuation in pairs]
        # The last token is never fed, so the one-token choices of a question share one row.
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            rows.setdefault((*context, *continuation[:-1]), []).append(i)
        results: list[Scored | None] = [None] * len(pairs)
        order = sorted(rows, key=len, reverse=True)
        while order:
            size = max(1, batch_tokens // len(order[0]))
            batch, order = order[:size], order[size:]
            shortest = [min(len(pairs[i][0]) for i in rows[row]) for row in batch]
            states, ends = self._predict(batch, shortest)
            owners = [(i, end) for row, end in zip(batch, ends, strict=True) for i in rows[row]]
            targets = [torch.tensor(pairs[i][1]) for i, _ in owners]
            places = [torch.arange(end - len(ids), end) for (_, end), ids in zip(owners, targets, strict=True)]
            scored = self._score_at(states, torch.cat(places), torch.cat(targets))
            parts = (values.split(list(map(len, targets))) for values in scored)
            for (i, _), logprobs, likeliest in zip(owners, *parts, strict=True):
                results[i] = Scored.of(logprobs, likeliest)
        return [entry for entry in results if entry is not None]

    def _score_at(self, states: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `score_targets`, of targets [M] that are predicted at `places` [M] of hidden states [N, H]."""
        places, targets = places.to(self.device), targets.to(self.device)
        logprobs = torch.empty(len(targets), device=self.device)
        likeliest = torch.empty(len(targets), dtype=torch.bool, device=self.device)
        first = 0
        for logits in self.slice_logits(states):
            here = ((places >= first) & (places < first + len(logits))).nonzero()[:, 0]
            logprobs[here], likeliest[here] = score_targets(logits, targets[here], places[here] - first)
            first += len(logits)
        return logprobs, likeliest

    def _predict(self, rows: list[tuple[int, ...]], contexts: list[int]) -> tuple[Tensor, list[int]]:
        """Hidden states [N, H] of all rows, each from its last context token on, and where each row ends."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows], device=self.device)
        place = torch.arange(width, device=self.device)
        real = place < torch.tensor([[len(row)] for row in rows], device=self.device)
        # The head costs more than the rest of a small model: it is applied only where a continuation is predicted.
        predicting = real & (place >= torch.tensor([[length - 1] for length in contexts], device=self.device))
        # Padding stands on the right, where no causal query looks: without a mask attention takes its fast path.
        padding = self._describe_padding(real) if attention.changes_attention(self.model, self.plan) else {}
        return self.hidden(ids, padding)[predicting], predicting.sum(1).cumsum(0).tolist()

    def _stream(self, context: list[int], continuation: list[int], block: int) -> Scored:
        ids = torch.tensor([context + continuation], device=self.device)
        cache = self._cache()
        states = [self._extend(ids[:, : len(context)], cache, body=True).last_hidden_state[0, -1:]]
        for start in range(len(context), ids.shape[1] - 1, block):
            part = ids[:, start : min(start + block, ids.shape[1] - 1)]
            states.append(self._extend(part, cache, body=True).last_hidden_state[0])
        targets = ids[0, len(context) :]
        return Scored.of(*self._score_at(torch.cat(states), torch.arange(len(targets)), targets))

    def generate(self, prompts: list[list[int]], max_new_tokens: int, stop_ids: set[int]) -> list[list[int]]:
        """Greedy continuations of the prompts, each ending before its first stop token."""
        if not prompts:
            return []
        width = max(map(len, prompts))
        rows = [[self.pad] * (width - len(prompt)) + prompt for prompt in prompts]
        ids = torch.tensor(rows, device=self.device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device).bool()
        state = self.prefill(ids, None if real.all() else real)
        continuations: list[list[int]] = [[] for _ in prompts]
        live = set(range(len(prompts)))
        for step in range(max_new_tokens):
            for i in sorted(live):
                token = int(state.ids[i])
                if token in stop_ids:
                    live.discard(i)
                else:
                    continuations[i].append(token)
            if not live or step == max_new_tokens - 1:
                break
            state = self.decode(state)
        return continuations

    def prefill(self, ids: Tensor, padding: Tensor | None = None) -> State:
        """Feed prompts [B, T]; the state's `ids` are the most likely next tokens."""
        cache = self._cache()
        out = self.forward(ids.to(self.device), cache, padding)
        return State(cache, out.logits[:, -1].argmax(-1), ids.shape[1], padding)

    def decode(self, state: State) -> State:
        """Feed one token per sequence."""
        padding = None
        if state.padding is not None:
            padding = torch.cat([state.padding, state.padding.new_ones(len(state.ids), 1)], 1)
        out = self.forward(state.ids[:, None], state.cache, padding)
        return State(state.cache, out.logits[:, -1].argmax(-1), state.length + 1, padding)

    def verify(self) -> None:
        """Raise `Refused` if the plan should have evicted and no cache ever shrank."""
        if self.plan.chain("cache_keep") and self.shrunk is False:
            raise Refused("the cache was to evict and never did: every text is shorter than the budget")

    def forward(self, ids: Tensor, cache: Any, padding: Tensor | None = None) -> Any:
        """One pass over tokens [B, T] that extends `cache`; logits of the last ones alone."""
        return self._extend(ids, cache, padding, logits_to_keep=1)

    def _extend(self, ids: Tensor, cache: Any, padding: Tensor | None = None, **options: Any) -> Any:
        """What the model makes of tokens [B, T] that are put into `cache`; `options` are those of `feed`."""
        slots = cache if isinstance(cache, SlotCache) else None
        keywords = self._describe_padding(padding, ids.shape[1])
        if slots is not None:
            real = None if padding is None else padding[:, -ids.shape[1] :]
            if real is not None and not cache.get_seq_length():
                real = nn.functional.pad(real, (count_soft(self.model), 0), value=True)
            slots.expect(real)
            keywords.pop("attention_mask", None)  # evicted slots have no column in it; `SlotCache.mask` knows them
        with self._run_plan(slots):
            out = feed(self.model, {"input_ids": ids, **keywords}, cache, plan=self.plan, **options)
        if slots is not None:
            slots.settle()
            self.shrunk = bool(self.shrunk) or slots.shrunk
        return out

    def _cache(self) -> Any:
        if self.plan.streams:
            return SlotCache(len(Blocks(self.model)), self.plan)
        return DynamicCache(config=self.model.config)

    @staticmethod
    def _describe_padding(mask: Tensor | None, last: int | None = None) -> dict[str, Tensor]:
        """Arguments that tell the model which tokens [B, T] are padding; positions count real tokens only."""
        if mask is None or bool(mask.all()):
            return {}
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return {"attention_mask": mask.long(), "position_ids": positions[:, -(last or mask.shape[1]) :]}

    @contextlib.contextmanager
    def _run_plan(self, cache: SlotCache | None = None) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if cache is not None:
                # The cache's own links come first and live as long as the forward pass.
                for chain, link in (("attend_mask", cache.mask), ("attend_observe", cache.observe)):
                    self.plan.chain(chain).insert(0, link)
                    stack.callback(self.plan.chain(chain).remove, link)
            yield


def score_targets(logits: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What logits [N, V] say in these rows [M] of targets [M]: log-probabilities, and whether each is the likeliest."""
    return logits.log_softmax(-1)[rows, targets], logits.argmax(-1)[rows] == targets
