"""Decoding over a static cache: the same tokens as the engine's, from a graph that is replayed."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from effbench.checks import toy_run
from effbench.core.recipe import parse_step
from effbench.core.run import InferPlan
from effbench.machine import capture
from effbench.nn.infer import graphs
from effbench.nn.infer.engine import Engine
from effbench.tiny import MODEL

COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "eos_token_id": 1}
GATED = COMMON | {"intermediate_size": 96, "initializer_range": 0.3}
CONFIGS = {
    "llama": LlamaConfig(**GATED, num_key_value_heads=2, max_position_embeddings=64),
    "llama-yarn": LlamaConfig(
        **GATED,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3": Qwen3Config(**GATED, num_key_value_heads=4, head_dim=16, max_position_embeddings=64),
    "mistral": MistralConfig(**GATED, num_key_value_heads=8, sliding_window=40, max_position_embeddings=64),
    "opt": OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, init_std=0.3),
    "gpt2": GPT2Config(vocab_size=96, n_positions=64, n_embd=64, n_layer=2, n_head=8, initializer_range=0.3),
    "neox": GPTNeoXConfig(**GATED, max_position_embeddings=64),
}
NEW = 12


class Recorded:
    """A graph made of what ran: on replay the same operations on the same tensors, nothing of Python around them."""

    made: list[Recorded] = []

    def __init__(self, step, device):
        self.ops = []
        with _Recorder(self.ops):
            step()
        Recorded.made.append(self)

    @torch.inference_mode()
    def __call__(self):
        for function, args, kwargs, kept in self.ops:
            for old, new in zip(kept, tree_flatten(function(*args, **kwargs))[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def waits(self):
        """Operations that bring a number to the host: on a GPU they cannot be captured."""
        return [function for function, *_ in self.ops if function is torch.ops.aten._local_scalar_dense.default]


class _Recorder(TorchDispatchMode):
    def __init__(self, ops):
        super().__init__()
        self.ops = ops

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.ops.append((function, args, kwargs or {}, tree_flatten(out)[0]))
        return out


@pytest.fixture
def recorded(monkeypatch):
    """Makes a processor one more device that captures."""
    monkeypatch.setitem(capture.CAPTURES, "cpu", Recorded)
    monkeypatch.setattr(Recorded, "made", [])


def engine_of(config, seed=0, plan=None):
    torch.manual_seed(seed)
    return Engine(AutoModelForCausalLM.from_config(config).eval(), plan or InferPlan())


def decoded(decoder, ids, new=NEW):
    """Tokens [B, new + 1]."""
    state = decoder.prefill(ids)
    found = [state.ids.clone()]
    for _ in range(new):
        state = decoder.decode(state)
        found.append(state.ids.clone())
    assert state.length == ids.shape[1] + new
    return torch.stack(found, 1)


def prompts(vocabulary, batch=3, length=9, seed=0):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_static_cache_decodes_what_a_growing_one_does(name, recorded):
    engine = engine_of(CONFIGS[name])
    implementation = engine.model.config._attn_implementation
    (decoder,), how = graphs.decoders([engine], prompts(96), NEW)
    assert isinstance(decoder, graphs.StaticDecoder) and how == "cuda graph over a static cache"
    assert not Recorded.made[0].waits()
    for seed in (0, 1):  # the second prompt meets what the first has left
        ids = prompts(96, seed=seed)
        expected = decoded(engine, ids)
        assert len(expected.unique()) > 5
        assert torch.equal(decoded(decoder, ids), expected)
    assert engine.model.config._attn_implementation == implementation


def test_the_embedded_model_decodes_the_same_tokens(recorded):
    engine = Engine(LlamaForCausalLM.from_pretrained(MODEL).eval(), InferPlan())
    ids = prompts(engine.model.config.vocab_size, batch=2, length=20)
    (decoder,), _ = graphs.decoders([engine], ids, NEW)
    assert torch.equal(decoded(decoder, ids), decoded(engine, ids))


def test_a_rewound_cache_goes_on_as_a_shorter_one(recorded):
    engine = engine_of(CONFIGS["llama"])
    ids = prompts(96)
    (decoder,), _ = graphs.decoders([engine], ids, NEW)
    found = decoded(decoder, ids)
    state = decoder.rewind(ids.shape[1])
    again = torch.stack([(state := decoder.decode(state)).ids.clone() for _ in range(NEW)], 1)
    assert state.length == ids.shape[1] + NEW
    longer = torch.cat([ids, found[:, -1:]], 1)  # the token generated last was fed after the prompt
    (other,), _ = graphs.decoders([engine], longer, NEW - 1)
    assert torch.equal(again, decoded(other, longer, NEW - 1))


def test_a_full_cache_says_so(recorded):
    engine = engine_of(CONFIGS["opt"])
    ids = prompts(96)
    (decoder,), _ = graphs.decoders([engine], ids, 2)
    state = decoder.decode(decoder.decode(decoder.prefill(ids)))
    with pytest.raises(ValueError, match="holds 11 tokens and is full"):
        decoder.decode(state)


def test_addresses_stay(recorded):
    engine = engine_of(CONFIGS["gpt2"])
    (decoder,), _ = graphs.decoders([engine], prompts(96), NEW)

    def addresses(state):
        layers = state.cache.layers
        tensors = [state.ids, *(t for layer in layers for t in (layer.keys, layer.values, layer.cumulative_length))]
        return [tensor.data_ptr() for tensor in tensors]

    first = addresses(decoder.prefill(prompts(96)))
    assert first == addresses(decoder.decode(decoder.prefill(prompts(96, seed=1))))


def test_what_cannot_be_captured_is_eager_and_says_why(recorded, monkeypatch):
    plain, ids = engine_of(CONFIGS["llama"]), prompts(96)

    def how(*engines):
        found, kind = graphs.decoders(engines, ids, NEW)
        assert found == list(engines)
        return kind

    evicting, observing = InferPlan(), InferPlan()
    evicting.chain("cache_keep").append(object())
    observing.chain("attend_observe").append(lambda module, weights: None)
    assert how(engine_of(CONFIGS["llama"], plan=evicting), plain) == "eager (the cache evicts or encodes)"
    for step in ("kivi()", "sliding_window()", "streaming_llm()"):
        run = toy_run()
        run.apply(parse_step(step))
        assert how(plain, engine_of(CONFIGS["llama"], plan=run.infer)) == "eager (the cache evicts or encodes)"
    assert how(plain, engine_of(CONFIGS["llama"], plan=observing)) == "eager (attention is changed)"
    narrow = MistralConfig(**GATED, sliding_window=12, max_position_embeddings=64)
    assert how(engine_of(narrow)) == "eager (attention slides over 12 tokens)"

    def waits(step, device):
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    monkeypatch.setitem(capture.CAPTURES, "cpu", waits)
    assert how(plain) == "eager (not captured: called a synchronizing CUDA operation)"
    monkeypatch.delitem(capture.CAPTURES, "cpu")
    assert how(plain) == "eager (no graphs on cpu)"


def test_a_full_device_is_not_a_reason_to_go_on_eagerly(monkeypatch):
    def full(step, device):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setitem(capture.CAPTURES, "cpu", full)
    with pytest.raises(torch.OutOfMemoryError, match="planted"):
        graphs.decoders([engine_of(CONFIGS["llama"])], prompts(96), NEW)


class FakeCuda:
    """The calls of `captured` in their order, without a device."""

    def __init__(self, monkeypatch):
        self.log = []
        self.mode = 0
        fake = self

        class Stream:
            def __init__(self, device=None):
                fake.log.append("stream")

            def wait_stream(self, other):
                fake.log.append("wait")

        class Graph:
            def replay(self):
                fake.log.append("replay")

        @contextlib.contextmanager
        def graph(cuda_graph, stream=None):
            fake.log.append("begin")
            yield
            fake.log.append("end")

        names = {
            "device": lambda device: contextlib.nullcontext(),
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda device=None: SimpleNamespace(wait_stream=lambda other: fake.log.append("join")),
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(fake, "mode", mode),
        }
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_graph_is_captured_after_warm_steps_and_one_that_may_not_wait(monkeypatch):
    fake = FakeCuda(monkeypatch)
    replay = capture.capture(lambda: fake.log.append(f"step {fake.mode}"), torch.device("cuda"))
    replay()
    warm = ["step 0"] * capture.WARM_UPS
    assert fake.log == ["stream", "wait", *warm, "step error", "join", "begin", "step 0", "end", "replay"]


def test_a_step_that_waits_is_found_before_capture(monkeypatch):
    fake = FakeCuda(monkeypatch)

    def step():
        if fake.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        capture.capture(step, torch.device("cuda"))
    assert fake.mode == 0 and "begin" not in fake.log


GROUPED = [
    pytest.param("cpu", torch.float32, 1e-5),
    pytest.param("cuda", torch.float32, 1e-4, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("device", "dtype", "tolerance"), GROUPED)
def test_grouped_attention_is_attention_over_the_tokens_held(device, dtype, tolerance, groups):
    torch.manual_seed(0)
    query = torch.randn(3, 2 * groups, 1, 64, device=device, dtype=dtype)
    key, value = torch.randn(2, 3, 2, 48, 64, device=device, dtype=dtype)
    for held in (1, 17, 48):
        mask = torch.zeros(1, 1, 1, 48, device=device, dtype=dtype)
        mask[..., held:] = float("-inf")
        out, _ = graphs.attend_grouped(None, query, key, value, mask, scaling=0.3)
        ours, theirs = (t[:, :, :held].double().repeat_interleave(groups, 1) for t in (key, value))
        weights = (query.double() @ ours.transpose(2, 3) * 0.3).softmax(-1)
        torch.testing.assert_close(out.double(), (weights @ theirs).transpose(1, 2), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_decode_the_same_tokens_on_the_device(name):
    engine = engine_of(CONFIGS[name])
    engine = Engine(engine.model.cuda(), InferPlan())
    (decoder,), how = graphs.decoders([engine], prompts(96).cuda(), NEW)
    assert how == "cuda graph over a static cache"
    for seed in (0, 1):
        ids = prompts(96, seed=seed).cuda()
        assert torch.equal(decoded(decoder, ids), decoded(engine, ids))


@pytest.mark.gpu
def test_a_model_that_waits_is_eager_on_the_device_and_leaves_it_usable():
    engine = engine_of(CONFIGS["llama"])
    engine = Engine(engine.model.cuda(), InferPlan())
    engine.model.lm_head.register_forward_hook(lambda module, args, out: None if float(out.sum()) > 1e30 else out)
    ids = prompts(96).cuda()
    found, how = graphs.decoders([engine], ids, NEW)
    assert found == [engine] and how.startswith("eager (not captured: ")
    assert torch.randn(4, device="cuda").isfinite().all()  # the generator did not stay in capture
    assert decoded(engine, ids).shape == (3, NEW + 1)
