"""What tests of caches share: toys, and a Llama written out in float64 whose caches are plain rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effbench.checks import VOCABULARY, toy_run
from effbench.core.recipe import parse
from effbench.nn.infer.cache import SlotCache
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.run import ModelRun

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt2", "gpt_neox")
GROUPED = {"num_key_value_heads": 2}


def text(length: int, seed: int = 0) -> list[int]:
    """Random tokens."""
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run_of(steps: str, architecture: str = "llama", **shape: Any) -> ModelRun:
    """A toy run under a recipe."""
    run = toy_run(architecture, shape=shape)
    for step in parse(steps).steps:
        run.apply(step)
    return run


def logprobs(run: ModelRun, pairs: list[tuple[list[int], list[int]]], **settings: Any) -> list[float]:
    """Of all tokens of all continuations."""
    return [value for scored in open_engine(run).score(pairs, **settings) for value in scored.token_logprobs]


def fill(run: ModelRun, ids: list[int], prompt: int) -> SlotCache:
    """The caches of one text, whose first tokens are the prompt; the others come one by one."""
    engine, cache = open_engine(run), SlotCache(len(Blocks(run.model)), run.infer)
    engine.forward(torch.tensor([ids[:prompt]]), cache)
    cache.settle(ends_prompt=True)
    for token in ids[prompt:]:
        engine.forward(torch.tensor([[token]]), cache)
        cache.settle()
    return cache


def kept(layer: Any) -> list[list[int]]:
    """Places of the tokens that each head of one row holds, in order."""
    places = layer.places().expand(1, layer.heads, -1)[0]
    valid = layer.valid()
    valid = torch.ones_like(places, dtype=torch.bool) if valid is None else valid.expand(1, *places.shape)[0]
    return [row[mask].tolist() for row, mask in zip(places, valid, strict=True)]


@dataclass(frozen=True)
class Form:
    """How keys, or values, are rounded: so many tokens of a head together, once."""

    round: Callable[[Tensor], Tensor]  # of a unit [unit, D]
    unit: int = 1
    flush: int = 1  # tokens that are rounded at a time
    retain: int = 0  # newest tokens that stay as they are
    nbytes: int = 0  # of a unit that is rounded


class Rule:
    """A cache of one layer and one sequence that holds everything; a method is what a subclass does differently."""

    late = False  # whether keys are rotated when they are read, and not before they are cached

    def __init__(self, *forms: Form) -> None:
        self.keys = self.values = torch.zeros(0)
        self.alive = torch.zeros(0, dtype=torch.bool)  # [H, T]
        self.weights = torch.zeros(0)  # [H, G, t, T] of the last pass
        self.forms = forms  # of keys and of values; none: as they come
        self.slots: list[list[int]] = []  # places that each head holds; an evicted one as long as its unit stays
        self.units: list[list[int]] = []  # of keys and of values of each head, that are rounded
        self.cached: list[Tensor] = []  # keys and values [H, T, D], rounded where they are

    def stood(self) -> Tensor:
        """[H, T] where keys are rotated to."""
        return torch.arange(self.alive.shape[1]).expand(self.alive.shape)

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of keys and values [H, T, D]."""
        if not self.forms:
            return keys, values
        old = self.cached[0].shape[1] if self.cached else 0
        fresh = [keys[:, old:], values[:, old:]]
        self.cached = [torch.cat(both, 1) for both in zip(self.cached, fresh, strict=True)] if old else fresh
        return self.cached[0], self.cached[1]

    def encode(self) -> None:
        """After a pass has settled: let go of units that nothing is left of, then round what is due."""
        for head, alive in enumerate(self.alive.tolist() if self.forms else []):
            if len(self.slots) == head:
                self.slots.append([])
                self.units.append([0, 0])
            slots, units = self.slots[head], self.units[head]
            slots += range(slots[-1] + 1 if slots else 0, len(alive))
            wholes = [
                [set(slots[i * form.unit : (i + 1) * form.unit]) for i in range(count)]
                for form, count in zip(self.forms, units, strict=True)
            ]
            stay = {place for place in slots if alive[place]}
            for whole in [*wholes[1], *wholes[0]]:
                stay |= whole if whole & stay else set()
            slots[:] = [place for place in slots if place in stay]
            for which, form in enumerate(self.forms):
                units[which] = sum(bool(whole & stay) for whole in wholes[which])
                held = units[which] * form.unit
                due = max(0, len(slots) - held - form.retain) // form.flush * form.flush
                for start in range(held, held + due, form.unit):
                    places = slots[start : start + form.unit]
                    self.cached[which][head, places] = form.round(self.cached[which][head, places])
                    units[which] += 1

    def settle(self, first: bool) -> None:
        """After a pass."""

    def keep(self, head: int, places: list[int]) -> None:
        self.alive[head] = False
        self.alive[head, places] = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, theta: float) -> Tensor:
        """[Hq, t, D] of unrotated queries, keys and values of new tokens [Hq or H, t, D]."""
        new = torch.ones(k.shape[:2], dtype=torch.bool)
        if self.keys.numel():
            k, v, new = (torch.cat(both, 1) for both in ((self.keys, k), (self.values, v), (self.alive, new)))
        self.keys, self.values, self.alive = k, v, new
        heads, length, width = k.shape
        stood, more = self.stood(), q.shape[1]
        groups = len(q) // heads
        q = turn(q, stood[:, -more:].repeat_interleave(groups, 0), theta).view(heads, groups, more, width)
        keys, values = self.stored(k if self.late else turn(k, stood, theta), v)
        keys = turn(keys, stood, theta) if self.late else keys
        later = torch.arange(length) > torch.arange(length - more, length)[:, None]
        scores = (q @ keys[:, None].mT / width**0.5).masked_fill(later, -torch.inf)
        self.weights = scores.masked_fill(~self.alive[:, None, None], -torch.inf).softmax(-1)
        return (self.weights @ values[:, None]).view(-1, more, width)


class HeavyHitters(Rule):
    """Algorithm 1 of the paper with accumulated attention, head by head."""

    def __init__(self, keep: float | None, budget: int, recent: float, *forms: Form) -> None:
        super().__init__(*forms)
        self.share, self.budget, self.recent = keep, budget, recent
        self.mass = torch.zeros(0)

    def settle(self, first: bool) -> None:
        heads, length = self.alive.shape
        if first and self.share is not None:
            self.budget = round(self.share * length)
        if first:
            self.mass = torch.zeros(heads, 0, dtype=torch.float64)
        self.mass = torch.nn.functional.pad(self.mass, (0, length - self.mass.shape[1])) + self.weights.sum((1, 2))
        newest = round(self.budget * self.recent)
        for head in range(heads):
            alive = self.alive[head].nonzero()[:, 0].tolist()
            recent = [j for j in alive if j >= length - newest]
            old = sorted((j for j in alive if j < length - newest), key=lambda j: -float(self.mass[head, j]))
            self.keep(head, recent + old[: self.budget - len(recent)])


class Votes(Rule):
    """Votes of the observation window, averaged over neighbours; once."""

    def __init__(self, capacity: int, window: int, kernel: int, *forms: Form) -> None:
        super().__init__(*forms)
        self.capacity, self.kernel = capacity, kernel
        self.window = window if window < capacity else max(1, capacity // 2)

    def settle(self, first: bool) -> None:
        heads, length = self.alive.shape
        if not first or length <= self.capacity:
            return
        before, reach = length - self.window, self.kernel // 2
        votes = self.weights[:, :, -self.window :, :before].sum((1, 2))
        for head in range(heads):
            pooled = [float(votes[head, max(0, j - reach) : j + reach + 1].sum()) for j in range(before)]
            best = sorted(range(before), key=lambda j, pooled=pooled: -pooled[j])[: self.capacity - self.window]
            self.keep(head, [*best, *range(before, length)])


class Sinks(Rule):
    """Sinks and the newest; keys are rotated to their rank among those held, when they are read."""

    late = True

    def __init__(self, sinks: int, window: int, *forms: Form) -> None:
        super().__init__(*forms)
        self.sinks, self.window = sinks, window

    def stood(self) -> Tensor:
        return (self.alive.cumsum(1) - 1).clamp(min=0)

    def settle(self, first: bool) -> None:
        heads, length = self.alive.shape
        for head in range(heads):
            self.keep(head, [j for j in range(length) if j < self.sinks or j >= length - self.window])


def round_range(x: Tensor, dims: tuple[int, ...], bits: int | str) -> Tensor:
    """Numbers that share the given dimensions, between their least and largest in 2^bits steps, or as scaled E4M3."""
    if bits == 16:
        return x
    if bits == "fp8":
        step = x.abs().amax(dims, keepdim=True) / 448
        # by hand: 3 bits of mantissa, exponents from -6
        scaled = x / step
        unit = 2.0 ** (scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
        return (scaled / unit).round() * unit * step
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    step = (high - low) / (2 ** int(bits) - 1)
    return low + step * ((x - low) / step).round()


def turn(x: Tensor, places: Tensor, theta: float) -> Tensor:
    """[H, T, D] rotated to places [H, T]."""
    half = x.shape[-1] // 2
    angle = places[..., None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def plain_llama(model: Any, ids: list[int], prompt: int, rules: list[Any]) -> Tensor:
    """[T, V] logits of a toy Llama in float64: first the prompt in one pass, then token by token."""
    config, weights = model.config, {name: value.double() for name, value in model.state_dict().items()}
    theta = float(config.rope_parameters["rope_theta"])

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    found = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, len(ids)))]:
        x = weights["model.embed_tokens.weight"][torch.tensor(ids[start:end])]
        for number, rule in enumerate(rules):
            layer = f"model.layers.{number}"
            h = norm(x, f"{layer}.input_layernorm")
            heads = (linear(h, f"{layer}.self_attn.{part}_proj") for part in "qkv")
            qkv = (part.unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for part in heads)
            x = x + linear(rule.attend(*qkv, theta).transpose(0, 1).flatten(1), f"{layer}.self_attn.o_proj")
            h = norm(x, f"{layer}.post_attention_layernorm")
            gated = torch.nn.functional.silu(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
            x = x + linear(gated, f"{layer}.mlp.down_proj")
        for rule in rules:
            rule.settle(start == 0)
            rule.encode()
        found.append(linear(norm(x, "model.norm"), "lm_head"))
    return torch.cat(found)


def compare(run: ModelRun, prompt: int, length: int, rules: list[Any], exact: float = 2e-5) -> SlotCache:
    """Check the engine's logits of a text against the float64 Llama under `rules`; the caches that were filled.

    The prompt ends before its last token, which is read from what has settled.
    """
    ids = text(length)
    plain = plain_llama(run.model, ids, prompt - 1, rules)[prompt - 1 : -1]
    found = Engine(run.model, run.infer).predict([(ids[:prompt], ids[prompt:])])[0]
    torch.testing.assert_close(found.double(), plain, atol=exact, rtol=0)
    cache = fill(run, ids, prompt - 1)
    for layer, rule in zip(cache.slot_layers, rules, strict=True):
        assert kept(layer) == [row.nonzero()[:, 0].tolist() for row in rule.alive]
    return cache
