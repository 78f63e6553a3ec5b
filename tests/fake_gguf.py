"""A small Llama in a GGUF file, with a vocabulary of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WIDTH, INNER, HEADS, LAYERS = 64, 96, 4, 2
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = "In 1961 it's 12,345 men.  DON'T you?\n\n  Äé 日本 ▁x\tA1b22 'Sir' e\u0301 /\n"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TYPES = {"token_embd.weight": "Q8_0", "blk": "Q4_1"}


def learn(whole: str = " ".join([TEXT, "it's men DON'T you we we'll 1961 12345"] * 3)) -> tuple[list[str], list[str]]:
    """A byte-level vocabulary, after the control tokens, and its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(whole.split(" "), trainer)
    body = json.loads(tokenizer.to_str())["model"]
    return sorted(body["vocab"], key=body["vocab"].__getitem__), [" ".join(pair) for pair in body["merges"]]


TOKENS, MERGES = learn()


def write(path: Path, types: dict[str, str] = TYPES, extra: tuple[str, ...] = (), **metadata: Any) -> Path:
    """A Llama of random weights; `types` by name of a tensor or by `blk`, metadata over the usual, None leaves out."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    usual: dict[str, Any] = {
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": INNER,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": WIDTH // HEADS,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.token_type": [3] * len(CONTROLS) + [1] * (len(TOKENS) - len(CONTROLS)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    for key, value in (usual | metadata).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{name}.weight"] = shape
    for name, shape in (shapes | dict.fromkeys(extra, (8,))).items():
        norm = len(shape) == 1
        values = (1 + rng.normal(0, 0.01, shape) if norm else rng.normal(0, 0.3, shape)).astype(np.float32)
        kind = GGMLQuantizationType["F32" if norm else types.get(name) or types[name.partition(".")[0]]]
        packed = values if kind.name == "F32" else quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
