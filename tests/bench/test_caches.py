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
from effbench.nn.infer.engine import State, open_engine
from effbench.nn.run import ModelRun
from effbench.sources import Source

pytestmark = pytest.mark.slow

CONTEXT, STEPS = 2048, 12
EVICTING = (
    "random_eviction(keep=0.25)",
    "h2o(keep=0.25)",
    "snapkv(keep=0.25)",
    "streaming_llm(sinks=4, window=508)",
    "sliding_window(window=512)",
)
SHARING = ("mqa()",)  # heads of keys and values: three in the model
ENCODING = ("kv_quant()", "kv_quant(key_bits=2, value_bits=2)", "kivi()")


def opened(recipe: str) -> ModelRun:
    """A random model of SmolLM2-135M's shape under a recipe."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
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


def decode(recipe: str) -> tuple[float, int]:
    """Seconds of a decoding step behind `CONTEXT` tokens, and bytes of the cache."""
    engine = open_engine(opened(recipe))
    ids = torch.randint(1, 49000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    state = engine.decode(engine.prefill(ids))
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        state = engine.decode(state)
        times.append(time.perf_counter() - begin)
    return statistics.median(times), count_bytes(state)


def count_bytes(state: State) -> int:
    """Bytes that a cache holds."""
    if isinstance(state.cache, SlotCache):
        return int(state.cache.nbytes().sum())
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers)


def test_smaller_caches_decode_about_as_fast_as_plain(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    plain, size = decode("")
    lines, slow = [f"plain: {1000 * plain:.1f} ms, {size / 1e6:.1f} MB"], []
    for recipe in (*EVICTING, *SHARING, *ENCODING):
        seconds, held = decode(recipe)
        lines.append(f"{recipe}: {seconds / plain:.2f} of plain's time, {held / size:.3f} of its bytes")
        if recipe not in ENCODING and seconds > 1.3 * plain:
            slow.append(recipe)
        assert recipe not in SHARING or held * 3 == size
    with capsys.disabled():
        print(f"\none token after {CONTEXT}, shape of SmolLM2-135M:", *lines, sep="\n  ")
    assert not slow
