"""Key-value caches that keep fewer tokens or fewer bits, as layers of transformers' own cache.

A slot is a cached token of one key-value head. Padding is never cached. A cache changes in two steps: `update`, inside
of a forward pass, appends what the pass brings; `settle`, after it, lets the plan's methods evict and then encodes what
is due. What the plan's methods observe (attention received, queries of the prompt that vote) lives in the layer, so
that caches of one plan do not know of each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from effbench.core.errors import Unsupported
from effbench.core.run import InferPlan
from effbench.core.views import Codec, Slots
from effbench.nn.infer.store import Count, Store, even, gather, pack, place


class Layer(CacheLayerMixin):
    """What all layers have in common: which tokens are offered, and what a query may see of those held."""

    is_croppable = True

    def __init__(self, index: int, plan: InferPlan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.plan = plan
        self.real: Tensor | None = None  # bool [B, T] of the tokens to come, True where no padding; None: all are real
        self.seen: Count = 0  # tokens offered, by row, padding not counted
        self.prompt: Count | None = None  # those of the prompt; None until it has ended
        self.width = 0  # tokens offered, padding too
        self.fresh = torch.zeros(0)  # [B, T] places of the tokens of this pass among those of their row

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def offer(self, keys: Tensor) -> Tensor | None:
        """Count in tokens [B, Hkv, T, D]; returns which of them are real [B, T], None if all are."""
        batch, _, length, _ = keys.shape
        real, self.real = self.real, None
        before = torch.as_tensor(self.seen, device=keys.device).view(-1, 1)
        if real is None:
            self.fresh = (before + torch.arange(length, device=keys.device)).expand(batch, -1)
            self.seen = self.seen + length
        else:
            self.fresh = (before + real.cumsum(1) - 1).masked_fill(~real, -1)  # padding sees nothing
            self.seen = even((before[:, 0] + real.sum(1)).expand(batch))
        self.width += length
        self.is_initialized = True
        return real

    def skip(self, count: Tensor) -> None:
        """Have the first token stand behind so many [B] that were offered and are gone; before any is."""
        self.seen = even(count)

    def spread(self, count: Count) -> Tensor:
        """A number of each row as [B]."""
        return torch.as_tensor(count, device=self.fresh.device).expand(len(self.fresh))

    def get_seq_length(self) -> int:
        """Tokens offered, held or not, with their padding."""
        return self.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of transformers' own mask, which nothing reads: see `mask` of the layer."""
        return self.width + query_length, 0

    def get_max_length(self) -> int:
        return -1


class SlotLayer(Layer):
    """A layer that evicts and encodes. Rows are those of sequences and heads, B x Hkv, or of sequences where heads are
    joined."""

    def __init__(self, index: int, plan: InferPlan) -> None:
        super().__init__(index, plan)
        encoder = plan.slot("encoder")
        self.codecs: tuple[Codec | None, Codec | None] = (None, None) if encoder is None else encoder.codecs()
        self.joined = any(codec is not None and codec.joined for codec in self.codecs)
        self.at_once = any(codec is not None and codec.at_once for codec in self.codecs)
        self.observing = any(method.observes for method in plan.chain("cache_keep"))
        self.voting = max((method.observed for method in plan.chain("cache_keep")), default=0)
        self.stores: tuple[Store, Store] | None = None  # of keys and of values
        self.place: Tensor | None = None  # int32 [N, S] where the token of each slot stands; None: slot s holds token s
        self.dead: Tensor | None = None  # bool [N, S] slots that were evicted inside of an encoded unit; None: none
        self.mass: Tensor | None = None  # float32 [N, S] attention received
        self.paid: list[Tensor] = []  # [N, S] of it from each token behind the prompt that has not settled
        self.voters: tuple[Tensor, Tensor] | None = None  # last queries [B, Hq, W, D] of the prompt, places [B, W]
        self.scaling = 1.0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens [B, Hkv, T, D]; return all keys and values held, [B, Hkv, S, D]."""
        batch, heads, length, _ = key_states.shape
        skipped = self.stores is None and not (isinstance(self.seen, int) and self.seen == 0)
        real = self.offer(key_states)
        new = [states.flatten(0, 1) for states in (key_states, value_states)]
        if self.joined:
            new = [states.transpose(1, 2).flatten(2) for states in (key_states, value_states)]
        each = len(new[0]) // batch  # rows of a sequence
        rows = None if real is None else real.repeat_interleave(each, 0)
        if self.stores is None:
            empty = [Store(codec, states[:, :0], 0) for codec, states in zip(self.codecs, new, strict=True)]
            self.stores = (empty[0], empty[1])
            self.mass = new[0].new_zeros(len(new[0]), 0, dtype=torch.float32) if self.observing else None
            self.place = new[0].new_zeros(len(new[0]), 0, dtype=torch.int32) if skipped else None
        held = self.stores[0].lengths
        if self.place is not None:
            self.place = self._grow(self.place, held, self.fresh.int().repeat_interleave(each, 0), rows)
        if self.dead is not None:
            self.dead = self._grow(self.dead, held, self.dead.new_zeros(len(self.dead), length), rows)
        if self.mass is not None:
            self.mass = self._grow(self.mass, held, self.mass.new_zeros(len(self.mass), length), rows)
        for store, states in zip(self.stores, new, strict=True):
            store.append(states, rows)
        if self.at_once:
            self._flush()
        keys, values = (store.decode() for store in self.stores)
        if self.joined:
            keys, values = (held.unflatten(2, (heads, -1)).transpose(1, 2) for held in (keys, values))
            return keys, values
        return keys.unflatten(0, (batch, heads)), values.unflatten(0, (batch, heads))

    @staticmethod
    def _grow(held: Tensor, counts: Count, new: Tensor, real: Tensor | None) -> Tensor:
        if real is None and isinstance(counts, int):
            return torch.cat([held, new], 1)
        return place(held, counts, new, real)[0]

    @property
    def heads(self) -> int:
        """Heads of keys and values."""
        assert self.stores is not None
        return len(self.stores[0].tail) // len(self.fresh)

    def _slots(self) -> int:
        assert self.stores is not None
        return int(torch.as_tensor(self.stores[0].lengths).max())

    def _longest(self) -> int:
        """Tokens offered of the longest row."""
        return int(torch.as_tensor(self.seen).max())

    def places(self) -> Tensor:
        """[B, Hkv or 1, S] where the token of each slot stands."""
        if self.place is not None:
            by_row: Tensor = self.place.unflatten(0, (len(self.fresh), -1))
            return by_row
        return torch.arange(self._slots(), device=self.fresh.device).expand(len(self.fresh), 1, -1)

    def valid(self) -> Tensor | None:
        """[B, Hkv or 1, S] which slots hold a token; None: all do."""
        assert self.stores is not None
        lengths = self.stores[0].lengths
        found: Tensor | None = None
        if not isinstance(lengths, int):
            found = torch.arange(self._slots(), device=lengths.device) < lengths[:, None]
        if self.dead is not None:
            found = ~self.dead if found is None else found & ~self.dead
        if found is None:
            return None
        found = found.unflatten(0, (len(self.fresh), -1))
        return found[:, :1] if self.place is None and self.dead is None else found

    def mask(self, window: int | None = None) -> Tensor | None:
        """bool [B, Hkv or 1, T, S]: what each query of this pass may see, at most `window` tokens back.

        None: every slot up to its own, of which the last slots are those of the queries.
        """
        length, slots, valid = self.fresh.shape[1], self._slots(), self.valid()
        reach = _nearest(window, self.plan.slot("reach"))
        if (
            valid is None
            and (length == 1 or (self.place is None and length == slots))
            and (reach is None or reach >= self._longest())
        ):
            return None
        if self.plan.slot("rope") is not None:  # a distance is one of slots
            places, queries = self.ranks()
            return see(queries, places, valid, reach)
        return see(self.fresh[:, None], self.places(), valid, reach)

    def ranks(self) -> tuple[Tensor, Tensor]:
        """Which of the slots held keys [B, Hkv or 1, S] and queries [B, Hkv or 1, T] are, from 0.

        Where no slot `rope` counts positions inside of the cache: where their tokens stand.
        """
        places, valid = self.places(), self.valid()
        if self.place is None or self.plan.slot("rope") is None:
            return places, self.fresh[:, None].clamp(min=0)
        if valid is None:  # new tokens stand in the last slots
            ranks = torch.arange(places.shape[-1], device=places.device).expand(len(places), 1, -1)
            return ranks, ranks[..., -self.fresh.shape[1] :]
        before = (places[:, :, None] < self.fresh[:, None, :, None]) & valid[:, :, None]
        return (valid.cumsum(-1) - 1).clamp(min=0), before.sum(-1)

    def observe(self, weights: Tensor) -> None:
        """Count in attention [B, Hkv, G, T, S] that slots receive from the queries of a group."""
        assert self.mass is not None
        paid = weights.float().sum(2).flatten(0, 1)
        self.mass += paid.sum(1)
        if self.prompt is not None:  # drafts may be taken back
            self.paid += paid.unbind(1)

    def remember(self, query: Tensor, scaling: float) -> None:
        """Keep the last queries [B, Hq, T, D] of the prompt, which vote where it ends."""
        if not self.voting or self.prompt is not None:
            return
        self.scaling = scaling
        queries, places = query, self.fresh
        if self.voters is not None:
            queries, places = torch.cat([self.voters[0], query], 2), torch.cat([self.voters[1], places], 1)
        self.voters = queries[:, :, -self.voting :].clone(), places[:, -self.voting :].clone()

    def settle(self, ends_prompt: bool) -> None:
        """After a forward pass: let go of what no query will see, evict, then encode."""
        first = ends_prompt and self.prompt is None
        if first:
            self.prompt = self.seen
        if self.stores is None:
            return
        reach = self.plan.slot("reach")
        if reach is not None and self.plan.slot("rope") is None and reach.reach < self._longest():
            places, valid = self.places(), self.valid()
            self.plan.act(reach)
            near = places >= (self.spread(self.seen) - reach.reach)[:, None, None]
            self._keep(near if valid is None else near & valid)
        for method in self.plan.chain("cache_keep"):
            if first or method.evicts_later:
                self._evict(method, first)
        self.voters = None if self.prompt is not None else self.voters
        self.paid = []
        self._flush()

    def _flush(self) -> None:
        """Encode what is due."""
        for store in self.stores or ():
            if store.flush():
                self.plan.act(self.plan.slot("encoder"))

    def _evict(self, method: Any, first: bool) -> None:
        seen = prompt = self.spread(self.seen)
        if self.prompt is not None:
            prompt = self.spread(self.prompt)
            prompt = torch.where(prompt > 0, prompt, seen)
        capacity = method.capacity(prompt)
        if bool((capacity >= self.spread(self.held())).all()):
            return
        self.plan.act(method)
        batch, heads = len(self.fresh), self.heads
        places, valid = self.places().expand(batch, heads, -1), self.valid()
        valid = torch.ones_like(places, dtype=torch.bool) if valid is None else valid.expand(batch, heads, -1)
        mass = None if self.mass is None else self.mass.unflatten(0, (batch, heads))
        votes = self._count_votes(places, valid, method.observed) if first and method.observed else None
        view = Slots(self.index, places, valid, seen, capacity, mass, votes)
        score = method.score(view, self.plan.state(method))
        if first and (score.shape != places.shape or bool(score[valid].isnan().any())):
            raise ValueError(f"{method}: scores are numbers of the shape {tuple(places.shape)}, not {score!r:.200}")
        score = score.float().masked_fill(~valid, -torch.inf)
        newest = places >= (seen - method.recents(capacity))[:, None, None]
        score = score.masked_fill(newest & valid, torch.inf)
        best = score.argsort(dim=-1, descending=True, stable=True)  # of equal ones the older stays
        least = int(capacity.min())
        if bool((capacity == least).all()):
            stay = torch.zeros_like(valid).scatter(-1, best[..., :least], True)
        else:
            stay = best.argsort(-1) < capacity[:, None, None]
        self._keep(stay & valid)

    def _count_votes(self, places: Tensor, valid: Tensor, window: int) -> Tensor:
        """[B, Hkv, W, S] attention of the last queries of the prompt, summed over the heads of a group."""
        assert self.voters is not None and self.stores is not None
        queries, stood = self.voters[0][:, :, -window:], self.voters[1][:, -window:]
        keys = self.stores[0].decode().unflatten(0, places.shape[:2])
        scores = queries.unflatten(1, (keys.shape[1], -1)) @ keys[:, :, None].transpose(3, 4) * self.scaling
        hidden = ~see(stood[:, None], places, valid, None)[:, :, None]
        votes: Tensor = scores.float().masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num().sum(2)
        return votes

    def _keep(self, stay: Tensor) -> None:
        """Let go of slots but those that stay [B, Hkv or 1, S]; inside of an encoded unit they are marked."""
        assert self.stores is not None
        rows = stay.expand(-1, self.heads, -1).flatten(0, 1)
        keys, values = self.stores
        wide = keys.widen(values.widen(rows.clone()))
        if self.place is None:
            self.place = self.places().int().expand(-1, self.heads, -1).flatten(0, 1)
        for store in self.stores:
            store.keep(wide)
        index, _ = pack(wide)
        self.place = gather(self.place, index)
        self.mass = None if self.mass is None else gather(self.mass, index)
        dead = gather(~rows, index)
        self.dead = dead if bool((wide & ~rows).any()) else None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every row (a negative number), as after rejected drafts.

        What was evicted for them does not come back: crop before the cache settles.
        """
        if self.stores is None or not tokens_to_remove:
            return
        count = abs(tokens_to_remove)
        left = self.spread(self.seen) - count
        for paid in self.paid[-count:]:
            assert self.mass is not None
            self.mass[:, : paid.shape[1]] -= paid
        del self.paid[-count:]
        places, valid, whole = self.places(), self.valid(), self.place is None
        stay = places < left[:, None, None]
        self._keep(stay if valid is None else stay & valid)
        if whole and self.dead is None:
            self.place = None
        self.seen, self.width = even(left), self.width - count

    def select(self, rows: Tensor) -> SlotLayer:
        """A copy for some rows [M] of the batch."""
        new = SlotLayer(self.index, self.plan)
        new.width, new.scaling, new.is_initialized = self.width, self.scaling, self.is_initialized
        new.fresh = self.fresh[rows] if len(self.fresh) else self.fresh
        new.seen = self.seen if isinstance(self.seen, int) else even(self.seen[rows])
        new.prompt = even(self.prompt[rows]) if isinstance(self.prompt, Tensor) else self.prompt
        if self.stores is not None:
            inner = (rows[:, None] * self.heads + torch.arange(self.heads, device=rows.device)).flatten()
            new.stores = (self.stores[0].select(inner), self.stores[1].select(inner))
            for name in ("place", "dead", "mass"):
                value = getattr(self, name)
                setattr(new, name, None if value is None else value[inner, : new._slots()])
        return new

    def held(self) -> Count:
        """Slots held by the fullest head of each row, what is marked as evicted not counted."""
        if self.stores is None:
            return 0
        lengths = self.stores[0].lengths
        if self.dead is None and isinstance(lengths, int):
            return lengths
        valid = self.valid()
        assert valid is not None
        return valid.sum(-1).max(-1).values

    def changed(self) -> Tensor:
        """bool [B]: which rows hold less than all their tokens as they came."""
        short = self.spread(self.held()) < self.spread(self.seen)
        for store in self.stores or ():
            units = torch.as_tensor(store.units, device=short.device).expand(len(store.tail))
            short = short | (units > 0).unflatten(0, (len(short), -1)).any(1)
        return short

    def nbytes(self) -> Tensor:
        """[B] bytes held: of keys and values with what decodes them, and of what says where slots stand and count."""
        if self.stores is None:
            return torch.zeros(len(self.fresh))
        slot = sum(value.element_size() for value in (self.place, self.dead, self.mass) if value is not None)
        rows = self.stores[0].lengths * slot + sum(store.nbytes for store in self.stores)
        wide = torch.as_tensor(rows, device=self.fresh.device).expand(len(self.stores[0].tail))
        found: Tensor = wide.unflatten(0, (len(self.fresh), -1)).sum(1)
        return found


class RingLayer(Layer):
    """A rolling buffer: the token at place p of a row stands in slot p modulo the window, whatever was there."""

    observing = at_once = False

    def __init__(self, index: int, plan: InferPlan) -> None:
        super().__init__(index, plan)
        self.window = int(plan.slot("reach").reach)
        self.keys: Tensor | None = None  # [B, Hkv, W, D]
        self.values: Tensor | None = None
        self.place: Tensor | None = None  # int32 [B, W]; -1: empty
        self.new: list[Tensor] = []  # keys and values of the passes since it settled, [B, Hkv, T, D]
        self.stood: Tensor | None = None  # [B, T] where they stand; -1: padding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens [B, Hkv, T, D]; return all keys and values held, [B, Hkv, S, D]."""
        self.offer(key_states)
        pair = [key_states, value_states]
        self.new = pair if not self.new else [torch.cat(both, 2) for both in zip(self.new, pair, strict=True)]
        self.stood = self.fresh if self.stood is None else torch.cat([self.stood, self.fresh], 1)
        if self.keys is None or self.values is None:
            return self.new[0], self.new[1]
        return torch.cat([self.keys, self.new[0]], 2), torch.cat([self.values, self.new[1]], 2)

    def mask(self, window: int | None = None) -> Tensor | None:
        """bool [B, 1, T, S]: what each query of this pass may see."""
        assert self.stood is not None
        places = self.stood if self.place is None else torch.cat([self.place, self.stood], 1)
        return see(
            self.fresh[:, None], places[:, None], (places >= 0)[:, None], _nearest(window, self.plan.slot("reach"))
        )

    def ranks(self) -> tuple[Tensor, Tensor]:
        """Never asked: under the slot `rope` there is no ring."""
        raise NotImplementedError

    def observe(self, weights: Tensor) -> None:
        """Never told: a ring observes nothing."""
        raise NotImplementedError

    def remember(self, query: Tensor, scaling: float) -> None:
        """Nothing: no query votes."""

    def settle(self, ends_prompt: bool) -> None:
        """After a forward pass: write what is new into the ring."""
        if self.stood is None:
            return
        if self.place is None or self.keys is None or self.values is None:
            self.keys, self.values = (new[:, :, :0] for new in self.new)
            self.place = self.stood[:, :0].int()
        more = min(self.window, int(self.stood.max()) + 1) - self.place.shape[1]
        if more > 0:  # the ring opens as it is filled
            self.keys, self.values = (nn.functional.pad(ring, (0, 0, 0, more)) for ring in (self.keys, self.values))
            self.place = nn.functional.pad(self.place, (0, more), value=-1)
        if int(self.spread(self.seen).max()) >= self.window:
            self.plan.act(self.plan.slot("reach"))
        near = self.stood >= torch.as_tensor(self.seen, device=self.stood.device).view(-1, 1) - self.window
        row, column = ((self.stood >= 0) & near).nonzero(as_tuple=True)
        slot = self.stood[row, column] % self.window
        self.place[row, slot] = self.stood[row, column].int()
        for ring, new in zip((self.keys, self.values), self.new, strict=True):
            ring[row, :, slot] = new[row, :, column]
        self.new, self.stood = [], None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every row (a negative number). Raises `ValueError` for settled ones, which have
        taken the place of older tokens."""
        count = abs(tokens_to_remove)
        if count > (0 if self.stood is None else self.stood.shape[1]):
            raise ValueError("tokens that have settled in a ring cannot be taken out of it again")
        if not count or self.stood is None:
            return
        self.seen = even(self.spread(self.seen) - (self.stood[:, -count:] >= 0).sum(1))
        self.new, self.stood = [new[:, :, :-count] for new in self.new], self.stood[:, :-count]
        self.width -= count

    def select(self, rows: Tensor) -> RingLayer:
        """A copy for some rows [M] of the batch."""
        new = RingLayer(self.index, self.plan)
        new.width, new.is_initialized, new.fresh = self.width, self.is_initialized, self.fresh[rows]
        new.seen = self.seen if isinstance(self.seen, int) else even(self.seen[rows])
        for name in ("keys", "values", "place", "stood"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else value[rows])
        new.new = [value[rows] for value in self.new]
        return new

    def held(self) -> Count:
        """Slots of each row that hold a token."""
        if self.place is None:
            return self.seen
        return even((self.place >= 0).sum(1))

    def changed(self) -> Tensor:
        """bool [B]: which rows hold less than all their tokens."""
        return self.spread(self.seen) > self.spread(self.held())

    def nbytes(self) -> Tensor:
        """[B] bytes held, of the ring and of what says where its tokens stand."""
        held = [value for value in (self.keys, self.values, self.place, *self.new) if value is not None]
        return torch.full((len(self.fresh),), sum(value.nbytes for value in held) // max(1, len(self.fresh)))


class SlotCache(Cache):
    """A cache of layers that settle."""

    def __init__(self, layers: int, plan: InferPlan) -> None:
        ring = plan.slot("reach") is not None and not (
            plan.chain("cache_keep") or any(plan.slot(name) is not None for name in ("encoder", "rope"))
        )
        self.slot_layers: list[SlotLayer | RingLayer] = [
            (RingLayer if ring else SlotLayer)(i, plan) for i in range(layers)
        ]
        evicting = plan.chain("cache_keep")
        if evicting and any(isinstance(layer, SlotLayer) and layer.joined for layer in self.slot_layers):
            raise Unsupported(f"{evicting[0]} evicts head by head, and {plan.slot('encoder')} holds heads together")
        super().__init__(layers=[*self.slot_layers])

    def expect(self, real: Tensor | None) -> None:
        """Say which of the next tokens [B, T] are real."""
        for layer in self.slot_layers:
            layer.real = real

    def skip(self, count: Tensor) -> None:
        """Have the first token of each row stand behind so many [B] that are gone already."""
        for layer in self.slot_layers:
            layer.skip(count)

    def settle(self, ends_prompt: bool = False) -> None:
        """Evict and encode in every layer. The first time that the prompt is said to have ended counts."""
        for layer in self.slot_layers:
            layer.settle(ends_prompt)

    def select(self, rows: Tensor) -> SlotCache:
        """A copy for some rows [M] of the batch, each as often as it is named."""
        new = SlotCache(0, self.slot_layers[0].plan)
        new.slot_layers = [layer.select(rows) for layer in self.slot_layers]
        new.layers = [*new.slot_layers]
        return new

    @property
    def seen(self) -> Count:
        """Tokens offered, by row, padding not counted: the next token's place."""
        return self.slot_layers[0].seen

    def changed(self) -> Tensor:
        """bool [B]: which rows hold less than all their tokens as they came, in some layer."""
        return torch.stack([layer.changed() for layer in self.slot_layers]).any(0)

    def kept(self) -> Tensor:
        """[B] share of the tokens that is held, by the fullest head of each layer, mean over layers."""
        held = torch.stack([layer.spread(layer.held()) for layer in self.slot_layers]).double()
        return held.mean(0) / self.slot_layers[0].spread(self.seen)

    def nbytes(self) -> Tensor:
        """[B] bytes held between forward passes, by row, in all layers."""
        return torch.stack([layer.nbytes() for layer in self.slot_layers]).sum(0)


def see(queries: Tensor, places: Tensor, valid: Tensor | None, reach: int | None) -> Tensor:
    """bool [B, H, T, S]: which slots, at `places` [B, H, S], queries at [B, H, T] see: those up to their own, `reach`.

    Either may be the same for all heads, H = 1.
    """
    behind = queries[..., None] - places[:, :, None, :]
    seen = behind >= 0
    if reach is not None:
        seen &= behind < reach
    return seen if valid is None else seen & valid[:, :, None, :]


def _nearest(window: int | None, method: Any) -> int | None:
    bounds = [bound for bound in (window, None if method is None else method.reach) if bound is not None]
    return min(bounds, default=None)
