"""Scoring and generation through the inference plan: probes measure what a method really leaves behind.

Under a plan whose caches evict or encode a prompt is fed but for its last tokens; then the cache settles, and what is
held back is fed: all that is scored or generated is read from what is left. The continuation follows `block` tokens at
a time, because in one block an evicting cache is never read. Without such a plan a continuation is scored in one
forward pass. Either way the head sees a slice of the hidden states at a time, so that the memory of scoring does not
grow with text times vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from effbench.core.errors import Unsupported
from effbench.core.run import InferPlan, Run
from effbench.nn.infer.beams import search
from effbench.nn.infer.cache import SlotCache
from effbench.nn.infer.memory import KeyValues, Tokens, count_places
from effbench.nn.infer.sampling import Sampling
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


class Use(NamedTuple):
    """What the last token that was scored or generated of one prompt was read from."""

    changed: bool  # whether the cache held less than all tokens as they came
    kept: float  # share of the tokens that it held
    nbytes: int  # that it held
    seen: int  # tokens that it had been offered


@dataclasses.dataclass
class State:
    """A batch in the middle of generation."""

    cache: Any
    ids: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0))  # [B] the token to be fed next
    length: int = 0  # tokens in the cache
    padding: Tensor | None = None  # bool [B, length], True where real; None when nothing is padded
    gone: Tensor | None = None  # [B] tokens that stood before those in the cache; None: none, or the cache knows

    def select(self, rows: Tensor) -> None:
        """Go on with rows [M] of the batch, each as often as it is named; between forward passes that have settled."""
        if isinstance(self.cache, SlotCache):
            self.cache = self.cache.select(rows)
        else:
            self.cache.batch_select_indices(rows)
        self.ids = self.ids[rows] if len(self.ids) else self.ids
        self.padding = None if self.padding is None else self.padding[rows]
        self.gone = None if self.gone is None else self.gone[rows]


def open_engine(run: Run, model: Any = None, vocabulary: int | None = None) -> Engine:
    """Scores and generates with the model of a run under its plan, or with another model under one of its own.

    Of its tokens the first so many, or all.
    """
    plan = run.infer if model is None else attention.adopt(InferPlan(), model)
    engine = Engine(run.model if model is None else model, plan, run.pad, vocabulary=vocabulary)
    engine.progress = run.progress
    return engine


class Engine:
    """Runs `model` under `plan`."""

    def __init__(
        self, model: Any, plan: InferPlan, pad: int = 0, chunk: int | None = None, vocabulary: int | None = None
    ) -> None:
        self.model = model
        self.plan = plan
        self.pad = pad
        self.chunk = chunk  # tokens of a prompt in one forward pass; None: all
        self.vocabulary = vocabulary  # ids from 0 on that it predicts; None: all rows of the head
        self.device = next(model.parameters()).device
        self.progress: Callable[[str, int, int], None] = lambda unit, done, total: None  # told after batches it scores
        self.uses: list[Use] = []  # of the prompts of the last call, where caches settle
        self.read_uses: list[Use] = []  # of those that were read last

    @property
    def max_length(self) -> int:
        """Positions the model has."""
        return count_positions(self.model) - count_front(self.model)

    @property
    def room(self) -> int | None:
        """Tokens that a prompt and its continuation may have; None where positions are counted inside of the cache."""
        return self.max_length if self.plan.slot("rope") is None else None

    def check_room(self, tokens: int) -> None:
        """Raise `Unsupported` for more tokens than there are positions."""
        if self.room is not None and tokens > self.room:
            raise Unsupported(f"{tokens} tokens in {self.room} positions")

    def logits(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, V] float32 logits of tokens [B, T], `mask` True where real (padding on the right or the left)."""
        with torch.no_grad():
            out = feed(self.model, {"input_ids": ids.to(self.device), **self._describe_padding(mask)}, plan=self.plan)
        logits: Tensor = out.logits.float()
        return logits

    def hidden(self, ids: Tensor, padding: dict[str, Tensor] | None = None) -> Tensor:
        """[B, T, H] last hidden states of tokens [B, T], of which the head makes logits."""
        with torch.no_grad():
            out = feed(self.model, {"input_ids": ids.to(self.device), **(padding or {})}, body=True, plan=self.plan)
        states: Tensor = out.last_hidden_state
        return states

    def slice_logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """float32 logits [n, V] of hidden states [N, H] in their order, at most `SLICE_BYTES` at a time."""
        rows = max(1, SLICE_BYTES[self.device.type] // (4 * self.model.config.vocab_size))
        for part in hidden.split(rows):
            yield self.head(part)

    def score(
        self,
        pairs: Sequence[tuple[Tokens, list[int]]],
        block: int | None = None,
        batch_tokens: int = 8192,
        hold: Sequence[int] | None = None,
    ) -> list[Scored]:
        """Log-likelihood of each continuation given its context (at least one token), in the order given.

        `block` is the number of tokens per forward pass after the context; None is all of them, or 1 under a plan
        that evicts or encodes. `hold` are the last tokens of each context that are fed once the cache has settled, by
        default 1. Raises `Unsupported` where a pair is longer than the model's positions.
        """
        decoder = self.plan.slot("decoder")
        if decoder is not None:  # what it generates is what its verifier would
            scored: list[Scored] = decoder.verifier.score(pairs, block, batch_tokens)
            return scored
        self.uses = []
        self.check_room(max((count_places(context) + len(more) - 1 for context, more in pairs), default=0))
        if self.plan.streams or block is not None or any(map(_has_states, (context for context, _ in pairs))):
            found: dict[int, Scored] = {}
            for i, states in self.stream(pairs, block or 1, batch_tokens, hold):
                target = torch.tensor(pairs[i][1])
                found[i] = Scored.of(*self._score_at(states, torch.arange(len(target)), target))
            return [found[i] for i in range(len(pairs))]
        return self._score_whole(pairs, batch_tokens)

    def _score_whole(self, pairs: Sequence[tuple[Tokens, list[int]]], batch_tokens: int) -> list[Scored]:
        """Scores of pairs of ids in one forward pass each."""
        # The last token is never fed, so the one-token choices of a question share one row.
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            rows.setdefault((*_name(context), *continuation[:-1]), []).append(i)
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
            self.progress("text", len(rows) - len(order), len(rows))
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

    def stream(
        self,
        pairs: Sequence[tuple[Tokens, list[int]]],
        block: int = 1,
        batch_tokens: int = 8192,
        hold: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The number of each pair, longest contexts first, and hidden states [n, H] that predict its continuation.

        Read through caches that settle; continuations of one context share its cache until they part.
        """
        hold = hold or [1] * len(pairs)
        owners: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(pairs):
            owners.setdefault((hold[i], *_name(context)), []).append(i)
        groups = sorted(owners.values(), key=lambda members: -len(pairs[members[0]][0]))
        self.uses = [Use(False, 1.0, 0, 0)] * len(pairs)
        while groups:
            size = max(1, batch_tokens // max(1, len(pairs[groups[0][0]][0])))
            batch, groups = groups[:size], groups[size:]
            firsts = [members[0] for members in batch]
            state, last = self.read([pairs[i][0] for i in firsts], [hold[i] for i in firsts], apart=True)
            branches: dict[tuple[int, ...], list[int]] = {}
            for row, members in enumerate(batch):
                for i in members:
                    branches.setdefault((row, *pairs[i][1][:-1]), []).append(i)
            states, uses = self._continue(state, last, [b[0] for b in branches], [b[1:] for b in branches], block)
            for place, members in enumerate(branches.values()):
                for i in members:
                    self.uses[i] = uses[place]
                    yield i, states[place]
            self.progress("context", len(owners) - len(groups), len(owners))

    def predict(
        self, pairs: Sequence[tuple[Tokens, list[int]]], hold: Sequence[int] | None = None, block: int = 1
    ) -> list[Tensor]:
        """float32 logits [n, V] of what is predicted at each token of continuations, as `stream` reads them."""
        decoder = self.plan.slot("decoder")
        if decoder is not None:
            verified: list[Tensor] = decoder.verifier.predict(pairs, block=block)
            return verified
        self.check_room(max((count_places(context) + len(more) - 1 for context, more in pairs), default=0))
        found = {i: torch.cat([*self.slice_logits(states)]) for i, states in self.stream(pairs, block, hold=hold)}
        return [found[i] for i in range(len(pairs))]

    def _continue(
        self, state: State, last: Tensor, rows: list[int], tokens: Sequence[tuple[int, ...]], block: int
    ) -> tuple[list[Tensor], list[Use]]:
        """Hidden states [1 + n, H] of rows of a batch that go on with n tokens each, the first the last [B, H] before.

        With them, what was read last.
        """
        states = [[last[row]] for row in rows]
        width = max(map(len, tokens))
        uses = [self.read_uses[row] for row in rows]
        if not width:
            return [torch.stack(parts) for parts in states], uses
        if rows != list(range(len(last))):
            state.select(torch.tensor(rows, device=self.device))
        for start in range(0, width, block):
            part = [list(row[start : start + block]) for row in tokens]
            uses = self.note(state, uses, [bool(row) for row in part])
            out = self.extend(state, *self._batch(part, left=False))
            for row, found, fed in zip(states, out.last_hidden_state, part, strict=True):
                row.extend(found[: len(fed)])
            self.settle(state)
        return [torch.stack(parts) for parts in states], uses

    def read(
        self,
        prompts: Sequence[Tokens],
        hold: Sequence[int] | None = None,
        apart: bool = False,
        croppable: bool = False,
    ) -> tuple[State, Tensor]:
        """Feed prompts, all but the last `hold` tokens of each before the cache settles; hidden states [B, H]
        of the last tokens.

        Where caches do not settle nothing is held back, unless it is to be read `apart` all the same. A `croppable`
        state may be cropped, also where the model's own window has passed.
        """
        state = State(self._cache(croppable))
        prompts = self._put_in_front(state, prompts)
        rests = prompts
        if apart or isinstance(state.cache, SlotCache):
            ends = [
                max(0, len(prompt) - held) for prompt, held in zip(prompts, hold or [1] * len(prompts), strict=True)
            ]
            rests = [prompt[end:] for prompt, end in zip(prompts, ends, strict=True)]
            ids, real = self._batch([prompt[:end] for prompt, end in zip(prompts, ends, strict=True)])
            if not ids.shape[1] and count_soft(self.model):  # a soft prompt is read before the cache settles, too
                ids = torch.full((len(prompts), 1), self.pad, device=self.device)
                real = torch.zeros_like(ids, dtype=torch.bool)
            size = self.chunk or max(1, ids.shape[1])
            for start in range(0, ids.shape[1], size):
                part = slice(start, start + size)
                self.extend(state, ids[:, part], None if real is None else real[:, part])
            self.settle(state, ends_prompt=True)
        self.read_uses = self.note(state, [], [True] * len(prompts))
        out = self.extend(state, *self._batch(rests))
        self.settle(state)
        return state, out.last_hidden_state[:, -1]

    def _put_in_front(self, state: State, prompts: Sequence[Tokens]) -> Sequence[Tokens]:
        """Put keys and values that stand in front of prompts into a cache that is empty; the rest of the prompts.

        Raises `Unsupported` where the cache holds keys of another form.
        """
        fronts = [[token for token in prompt if isinstance(token, KeyValues)] for prompt in prompts]
        some = next(itertools.chain.from_iterable(fronts), None)
        if some is None:
            return prompts
        if count_soft(self.model) or self.plan.slot("rope") or attention.find_holder(self.model):
            raise Unsupported("keys and values of a memory stand behind no soft prompt, and cannot be rotated anew")
        none = KeyValues([keys[:, :0] for keys in some.keys], [values[:, :0] for values in some.values], 0)
        given = [front[0] if front else none for front in fronts]
        width = max(memory.kept for memory in given)
        gaps = [width - memory.kept for memory in given]
        real = torch.arange(width, device=self.device) >= torch.tensor([gaps], device=self.device).T
        gone = torch.tensor([memory.before for memory in given], device=self.device)
        if isinstance(state.cache, SlotCache):
            state.cache.skip(gone)
            state.cache.expect(real if any(gaps) else None)
        else:
            state.padding, state.gone = real, gone
        for layer in range(len(some.keys)):
            held = [(memory.keys[layer], memory.values[layer]) for memory in given]
            padded = [[pad(part, (0, 0, gap, 0)) for part in parts] for parts, gap in zip(held, gaps, strict=True)]
            keys, values = (torch.stack(parts) for parts in zip(*padded, strict=True))
            state.cache.update(keys, values, layer)
        state.length = width
        return [prompt[len(front) :] for prompt, front in zip(prompts, fronts, strict=True)]

    def _batch(self, rows: Sequence[Tokens], left: bool = True) -> tuple[Tensor, Tensor | None]:
        """Tokens of rows, [B, T] ids or [B, T, H] embeddings, padded on one side; which are real, None if all are."""
        width = max(map(len, rows))
        gaps = [width - len(row) for row in rows]
        fill: list[Tokens] = [[self.pad] * gap for gap in gaps]
        even = [[*gap, *row] if left else [*row, *gap] for gap, row in zip(fill, rows, strict=True)]
        ids = torch.tensor([[t if isinstance(t, int) else self.pad for t in row] for row in even], device=self.device)
        real = None
        if any(gaps):
            place, sizes = torch.arange(width, device=self.device), torch.tensor([gaps], device=self.device).T
            real = place >= sizes if left else place < width - sizes
        if not any(map(_has_states, rows)):
            return ids.view(len(rows), width), real
        embedded = self.model.get_input_embeddings()(ids).detach()
        for row, tokens in zip(embedded, even, strict=True):
            for place_, token in enumerate(tokens):
                if isinstance(token, Tensor):
                    row[place_] = token.detach()
        return embedded, real

    def generate(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        stop_ids: set[int],
        hold: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continuations of the prompts, each ending before its first stop token; greedy unless they are sampled.

        `hold` is that of `score`. `numbers` are names of the prompts, by which they are sampled: a text depends on its
        number, not on the call that it is made in; by default 0, 1, ... Raises `Unsupported` where texts would be
        longer than the model's positions.
        """
        if not prompts:
            return []
        numbers = range(len(prompts)) if numbers is None else numbers
        self.check_room(max(map(count_places, prompts)) + max_new_tokens)
        decoder = self.plan.slot("decoder")
        if decoder is not None:
            self.plan.act(self.plan.owner("decoder"))
            made: list[list[int]] = decoder.generate(self, prompts, max_new_tokens, stop_ids, sampling, numbers)
            return made
        chances = None if sampling is None else sampling.chances(numbers)
        with torch.no_grad():
            state, last = self.read(prompts, hold)
            uses = self.read_uses
            continuations: list[list[int]] = [[] for _ in prompts]
            live = set(range(len(prompts)))
            for step in range(max_new_tokens):
                logits = self.head(last)
                ids = logits.argmax(-1) if sampling is None or chances is None else sampling.draw(logits, chances)
                for i in sorted(live):
                    token = int(ids[i])
                    if token in stop_ids:
                        live.discard(i)
                    else:
                        continuations[i].append(token)
                if not live or step == max_new_tokens - 1:
                    break
                uses = self.note(state, uses, [i in live for i in range(len(prompts))])
                last = self.extend(state, ids[:, None]).last_hidden_state[:, -1]
                self.settle(state)
        self.uses = uses
        return continuations

    def search(
        self,
        prompts: Sequence[Tokens],
        beams: int,
        max_new_tokens: int,
        stop_ids: set[int],
        length_penalty: float = 1.0,
    ) -> list[list[int]]:
        """Likeliest continuations that `beams` rows for each prompt find, as `beams.search`; see `generate`."""
        decoder = self.plan.slot("decoder")
        if decoder is not None:
            found: list[list[int]] = decoder.verifier.search(prompts, beams, max_new_tokens, stop_ids, length_penalty)
            return found
        return search(self, prompts, beams, max_new_tokens, stop_ids, length_penalty)

    def prefill(self, ids: Tensor) -> State:
        """Feed prompts [B, T], all but the last token before the cache settles; `ids` are the likeliest next ones."""
        state = State(self._cache())
        ids = ids.to(self.device)
        if isinstance(state.cache, SlotCache) and ids.shape[1] > 1:
            self.extend(state, ids[:, :-1])
            self.settle(state, ends_prompt=True)
            ids = ids[:, -1:]
        return self._step(state, ids)

    def decode(self, state: State) -> State:
        """Feed one token per sequence."""
        return self._step(state, state.ids[:, None])

    def _step(self, state: State, ids: Tensor) -> State:
        out = self.extend(state, ids, body=False, logits_to_keep=1)
        self.settle(state)
        state.ids = out.logits[:, -1].argmax(-1)
        return state

    def forward(self, ids: Tensor, cache: Any) -> Any:
        """One pass over tokens [B, T] that extends `cache`; logits of the last ones alone."""
        return self.extend(State(cache), ids, body=False, logits_to_keep=1)

    def extend(self, state: State, ids: Tensor, real: Tensor | None = None, body: bool = True, **options: Any) -> Any:
        """What the model makes of tokens [B, T], or embeddings [B, T, H], that are put into the cache of `state`.

        `real` is True where they are no padding; `options` are those of `feed`.
        """
        cache, (batch, width) = state.cache, ids.shape[:2]
        inputs = {"input_ids": ids} if ids.ndim == 2 else {"inputs_embeds": ids}
        if isinstance(cache, SlotCache):
            shown = real
            if real is not None and not cache.get_seq_length():
                shown = pad(real, (count_soft(self.model), 0), value=True)
            cache.expect(shown)
            soft = count_soft(self.model) if cache.get_seq_length() else 0
            seen = torch.as_tensor(cache.seen, device=ids.device).expand(batch)[:, None] - soft
            new = torch.ones(batch, width, dtype=torch.bool, device=ids.device) if real is None else real
            inputs["position_ids"] = (seen + new.cumsum(1) - 1).clamp(min=0)
        elif real is not None or state.padding is not None or state.gone is not None:
            held = state.padding
            if held is None:
                held = torch.ones(batch, state.length, dtype=torch.bool, device=ids.device)
            new = torch.ones(batch, width, dtype=torch.bool, device=ids.device) if real is None else real
            state.padding = torch.cat([held, new], 1)
            inputs |= self._describe_padding(state.padding, width, state.gone)
        state.length += width
        with torch.no_grad():
            return feed(self.model, inputs, cache, body, plan=self.plan, **options)

    def head(self, states: Tensor) -> Tensor:
        """float32 logits [N, V] of hidden states [N, H]."""
        with torch.no_grad():
            logits: Tensor = self.model.get_output_embeddings()(states)[:, : self.vocabulary].float()
        return logits

    def crop(self, state: State, tokens: int) -> None:
        """Forget the last tokens fed, before the cache has settled. Not for batches with padding."""
        if tokens:
            state.cache.crop(-tokens)
            state.length -= tokens

    def settle(self, state: State, ends_prompt: bool = False) -> None:
        """After a forward pass: let the cache evict and encode."""
        if isinstance(state.cache, SlotCache):
            with torch.no_grad():
                state.cache.settle(ends_prompt)

    def note(self, state: State, before: list[Use], reading: list[bool]) -> list[Use]:
        """What rows that are about to be read are read from; of the others what was so before."""
        cache, rows = state.cache, len(reading)
        if not state.length:
            return [Use(False, 1.0, 0, 0) for _ in reading]
        if isinstance(cache, SlotCache):
            seen = torch.as_tensor(cache.seen).expand(rows).tolist()
            found = zip(cache.changed().tolist(), cache.kept().tolist(), cache.nbytes().tolist(), seen, strict=True)
            now = [Use(*row) for row in found]
        else:
            counts = [state.length] * rows if state.padding is None else state.padding.sum(1).tolist()
            token = sum(part[0, :, :1].nbytes for layer in cache.layers for part in (layer.keys, layer.values))
            counts = [count + count_soft(self.model) for count in counts]
            now = [Use(False, 1.0, token * count, count) for count in counts]
        return [now[i] if read else before[i] for i, read in enumerate(reading)]

    def _cache(self, croppable: bool = False) -> Any:
        if self.plan.streams:
            return SlotCache(len(Blocks(self.model)), self.plan)
        return DynamicCache() if croppable else DynamicCache(config=self.model.config)

    @staticmethod
    def _describe_padding(
        mask: Tensor | None, last: int | None = None, gone: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Arguments that tell the model which tokens [B, T] are padding; positions count real tokens only, and those
        [B] that are gone from in front of them."""
        if mask is None or (bool(mask.all()) and gone is None):
            return {}
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        positions = positions if gone is None else positions + gone[:, None]
        return {"attention_mask": mask.long(), "position_ids": positions[:, -(last or mask.shape[1]) :]}


def _has_states(tokens: Tokens) -> bool:
    return any(not isinstance(token, int) for token in tokens)


def _name(tokens: Tokens) -> tuple[int, ...]:
    """What tells prompts apart."""
    return tuple(token if isinstance(token, int) else id(token) for token in tokens)


def score_targets(logits: Tensor, targets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What logits [N, V] say in these rows [M] of targets [M]: log-probabilities, and whether each is the likeliest."""
    return logits.log_softmax(-1)[rows, targets], logits.argmax(-1)[rows] == targets
