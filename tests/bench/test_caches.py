"""What a decoding step costs through each cache, beside plain decoding, where arithmetic decides and not Python."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.checks import ToyData, toy_tokenizer
from effbench.core.recipe import parse
from effbench.nn.infer.cache import SlotCache
from effbench.nn.infer.engine import Engine, State, open_engine
from effbench.nn.run import ModelRun
from effbench.sources import Source

pytestmark = pytest.mark.slow

CONTEXT, STEPS = 2048, 24
PART = 5  # of SmolLM2-135M's layers and vocabulary one in so many: layers are alike, and a step costs the same ratio
EVICTING = (
    "random_eviction(keep=0.25)",
    "h2o(keep=0.25)",
    "snapkv(keep=0.25)",
    "sliding_window(window=512)",
)
ROTATING = ("streaming_llm(sinks=4, window=508)",)  # for each token all keys that are held are rotated anew
SHARING = ("mqa()",)  # heads of keys and values: three in the model
ENCODING = ("kv_quant()", "kv_quant(key_bits=2, value_bits=2)", "kivi()")


def opened(recipe: str) -> ModelRun:
    """A random model under a recipe, of SmolLM2-135M's width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30 // PART,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152 // PART,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    source = Source(name="shape", kind="shape", path=None, tokenizer=None, digest="shape")
    device = torch.device("cpu")
    run = ModelRun(source, model, lambda: model, toy_tokenizer(), ToyData(), device=device, storage=torch.float32)
    for step in parse(recipe).steps:
        run.apply(step)
    return run


def start(recipe: str) -> tuple[Engine, State]:
    """A model under a recipe behind `CONTEXT` tokens, and warm."""
    engine = open_engine(opened(recipe))
    ids = torch.randint(1, 49152 // PART, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    return engine, engine.decode(engine.prefill(ids))


def decode(plain: tuple[Engine, State], other: tuple[Engine, State]) -> tuple[float, float]:
    """Seconds of a decoding step of the other and its ratio to plain, medians of steps in turns: what else a machine
    does slows both."""
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        plain[0].decode(plain[1])
        between = time.perf_counter()
        other[0].decode(other[1])
        seconds.append((between - begin, time.perf_counter() - between))
    plain[0].crop(plain[1], STEPS)
    return statistics.median(own for _, own in seconds), statistics.median(own / first for first, own in seconds)


def count_bytes(state: State) -> int:
    """Bytes that a cache holds."""
    if isinstance(state.cache, SlotCache):
        return int(state.cache.nbytes().sum())
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers)


def test_smaller_caches_decode_about_as_fast_as_plain(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    plain = start("")
    size = count_bytes(plain[1])
    lines, slow = [], []
    for recipe in (*EVICTING, *ROTATING, *SHARING, *ENCODING):
        other = start(recipe)
        held = count_bytes(other[1])
        seconds, ratio = decode(plain, other)
        lines.append(f"{recipe}: {1000 * seconds:.1f} ms, {ratio:.2f} of plain's, {held / size:.3f} of its bytes")
        if recipe not in ENCODING and ratio > (1.8 if recipe in ROTATING else 1.3):
            slow.append(recipe)
        assert recipe not in SHARING or held * 3 == size
    with capsys.disabled():
        shape = f"{30 // PART} layers of SmolLM2-135M, {size / 1e6:.1f} MB plain"
        print(f"\none token after {CONTEXT}, {shape}:", *lines, sep="\n  ")
    assert not slow
