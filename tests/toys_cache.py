"""What tests of caches share: toys, and a Llama written out in float64 whose caches are plain rules."""

from __future__ import annotations

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


class Rule:
    """A cache of one layer and one sequence that holds everything; a method is what a subclass does differently."""

    def __init__(self) -> None:
        self.keys = self.values = torch.zeros(0)
        self.alive = torch.zeros(0, dtype=torch.bool)  # [H, T]
        self.weights = torch.zeros(0)  # [H, G, t, T] of the last pass

    def stood(self) -> Tensor:
        """[H, T] where keys are rotated to."""
        return torch.arange(self.alive.shape[1]).expand(self.alive.shape)

    def stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of keys and values [H, T, D]."""
        return keys, values

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
        keys, values = self.stored(turn(k, stood, theta), v)
        later = torch.arange(length) > torch.arange(length - more, length)[:, None]
        scores = (q @ keys[:, None].mT / width**0.5).masked_fill(later, -torch.inf)
        self.weights = scores.masked_fill(~self.alive[:, None, None], -torch.inf).softmax(-1)
        return (self.weights @ values[:, None]).view(-1, more, width)


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
