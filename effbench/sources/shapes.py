"""Public configurations of real models, for `model=shape:NAME`: the true shape with random weights.

Figures are those of the models' published `config.json`. No torch here: names are checked before anything runs.
"""

from __future__ import annotations

from typing import Any


def _llama(hidden: int, layers: int, heads: int, kv: int, mlp: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        **more,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


_QWEN3 = {"model_type": "qwen3", "head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
_LLAMA_70B = _llama(8192, 80, 64, 8, 28672, 128256, **_rope(5e5))

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, max_position_embeddings=4096),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000, max_position_embeddings=4096),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000, max_position_embeddings=4096),
    "llama-65b": _llama(8192, 80, 64, 64, 22016, 32000, max_position_embeddings=2048),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, head_dim=64, tie_word_embeddings=True, **_rope(5e5)),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, head_dim=128, tie_word_embeddings=True, **_rope(5e5)),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256, **_rope(5e5)),
    "llama-3.1-70b": _LLAMA_70B,
    "llama-3.3-70b": _LLAMA_70B,
    "mistral-7b": _llama(4096, 32, 32, 8, 14336, 32768, **_rope(1e6))
    | {"model_type": "mistral", "sliding_window": None},
    "qwen3-0.6b": _llama(1024, 28, 16, 8, 3072, 151936, tie_word_embeddings=True, **_rope(1e6)) | _QWEN3,
    "qwen3-1.7b": _llama(2048, 28, 16, 8, 6144, 151936, tie_word_embeddings=True, **_rope(1e6)) | _QWEN3,
    "qwen3-4b": _llama(2560, 36, 32, 8, 9728, 151936, tie_word_embeddings=True, **_rope(1e6)) | _QWEN3,
    "qwen3-8b": _llama(4096, 36, 32, 8, 12288, 151936, **_rope(1e6)) | _QWEN3,
    "qwen3-14b": _llama(5120, 40, 40, 8, 17408, 151936, **_rope(1e6)) | _QWEN3,
    "qwen3-32b": _llama(5120, 64, 64, 8, 25600, 151936, **_rope(1e6)) | _QWEN3,
    # Not a published model: as deep as one of 7 billion parameters, and narrow enough for two cores.
    "deep-tiny": _llama(128, 32, 4, 4, 256, 1024, max_position_embeddings=2048, tie_word_embeddings=True, **_rope(1e6)),
    # Not a published model: a mixture of experts small enough for two cores.
    "moe-tiny": _llama(128, 4, 4, 4, 256, 1024, max_position_embeddings=2048, **_rope(1e6))
    | {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "opt-125m": {
        "model_type": "opt",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "vocab_size": 50272,
        "word_embed_proj_dim": 768,
        "max_position_embeddings": 2048,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
}
