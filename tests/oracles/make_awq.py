"""AWQ of Llama blocks by its authors' code: channel scales, codes and scales of clipped groups, and plain rounding."""

from __future__ import annotations

import copy

import torch
from golden import clone, write
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

REPOSITORY, COMMIT = "mit-han-lab/llm-awq", "d6e797a42b9ef7778de8ee2352116e0f48a78d61"
clone(REPOSITORY, COMMIT, "awq", absent=("awq_inference_engine",))

from awq.quantize.auto_clip import apply_clip, auto_clip_block  # noqa: E402
from awq.quantize.auto_scale import apply_scale, auto_scale_block  # noqa: E402
from awq.quantize.quantizer import pseudo_quantize_tensor  # noqa: E402

COMMON = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SHAPES: dict[str, dict[str, int]] = {
    "equal": COMMON | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
    "grouped": COMMON | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
WIDTHS = {"equal": (2, 3, 4), "grouped": (3,)}  # thresholds reach the end of their range at 2 bits
GROUP, LENGTH = 32, 256
GRID = {"zero_point": True, "q_group_size": GROUP}


def make_block(config: LlamaConfig) -> nn.Module:
    """A block of weights that float16 holds."""
    block = LlamaDecoderLayer(config, 0).eval()
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.weight.data = 0.2 + torch.rand(64) ** 4 * 8  # uneven channels, for something to scale
    return block.half().float()


def quantize(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """Codes [out, in], and the scales [out, groups] by which they are found and, in their code, decoded."""
    dense, scale, zero = pseudo_quantize_tensor(weight, bits, **GRID, get_scale_zp=True)
    step, offset = (part.repeat_interleave(GROUP, 1) for part in (scale, zero))
    return {"codes": ((dense / step).round() + offset).to(torch.uint8), "step": scale}


def compress(block: nn.Module, hidden: Tensor, calls: dict[str, object], bits: int) -> dict[str, Tensor]:
    features: dict[str, Tensor] = {}
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    names = {module: name for name, module in linears.items()}

    def catch(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        features.setdefault(names[module], given[0].clone())

    for module in names:
        module.register_forward_pre_hook(catch)
    block(hidden, **calls)
    scales = auto_scale_block(block, calls, bits, GRID, features)
    apply_scale(block, scales, features)
    apply_clip(block, auto_clip_block(block, bits, GRID, features))
    found = {f"channel.{layers[0]}": scale for _, layers, scale in scales}
    for name, module in linears.items():
        found |= {f"{key}.{name}": value for key, value in quantize(module.weight.data, bits).items()}
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    hidden = torch.randn(2, LENGTH, 64).half()  # 512 tokens, so that the clip search takes all of them
    tensors = {"hidden": hidden}
    for case, shape in SHAPES.items():
        config = LlamaConfig(**shape, attn_implementation="sdpa")
        block = make_block(config)
        tensors |= {f"{case}.before.{name}": value.half() for name, value in block.state_dict().items()}
        places = LlamaRotaryEmbedding(config)(hidden.float(), torch.arange(LENGTH)[None])
        calls = {"position_embeddings": places, "attention_mask": None}
        for bits in WIDTHS[case]:
            with torch.no_grad():
                found = compress(copy.deepcopy(block), hidden.float(), calls, bits)
                plain = quantize(block.mlp.up_proj.weight, bits)
            found |= {f"plain.{key}": value for key, value in plain.items()}
            tensors |= {f"{case}.b{bits}.{name}": value for name, value in found.items()}
    write(
        "awq",
        __file__,
        ["transformers"],
        tensors,
        seed=0,
        source=f"{REPOSITORY}@{COMMIT}",
        shapes=SHAPES,
        widths=WIDTHS,
        group=GROUP,
    )
