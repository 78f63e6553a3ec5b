"""AWQ of one Llama block by its authors' code: channel scales, clipped and rounded weights."""

from __future__ import annotations

import torch
from golden import clone, write
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

REPOSITORY, COMMIT = "mit-han-lab/llm-awq", "d6e797a42b9ef7778de8ee2352116e0f48a78d61"
clone(REPOSITORY, COMMIT, "awq", absent=("awq_inference_engine",))

from awq.quantize.auto_clip import apply_clip, auto_clip_block  # noqa: E402
from awq.quantize.auto_scale import apply_scale, auto_scale_block  # noqa: E402
from awq.quantize.quantizer import pseudo_quantize_tensor  # noqa: E402

SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
BITS, GRID, LENGTH = 3, {"zero_point": True, "q_group_size": 32}, 256

if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=1, attn_implementation="sdpa")
    block = LlamaDecoderLayer(config, 0).eval()
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.weight.data = 0.2 + torch.rand(64) ** 4 * 8  # uneven channels, for something to scale
    hidden = torch.randn(2, LENGTH, 64).half()  # 512 tokens, so that the clip search takes all of them
    tensors = {"hidden": hidden} | {f"before.{name}": value.clone() for name, value in block.state_dict().items()}

    features: dict[str, torch.Tensor] = {}
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    names = {module: name for name, module in linears.items()}

    def catch(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        features.setdefault(names[module], given[0].clone())

    for module in names:
        module.register_forward_pre_hook(catch)
    places = LlamaRotaryEmbedding(config)(hidden.float(), torch.arange(LENGTH)[None])
    calls = {"position_embeddings": places, "attention_mask": None}
    with torch.no_grad():
        block(hidden.float(), **calls)
        scales = auto_scale_block(block, calls, BITS, GRID, features)
        apply_scale(block, scales, features)
        apply_clip(block, auto_clip_block(block, BITS, GRID, features))
        for name, module in linears.items():
            tensors[f"after.{name}"] = pseudo_quantize_tensor(module.weight.data, BITS, **GRID)
    tensors |= {f"scale.{layers[0]}": scale for _, layers, scale in scales}
    write("awq", __file__, ["transformers"], tensors, seed=0, source=f"{REPOSITORY}@{COMMIT}", shape=SHAPE, bits=BITS)
