"""Figures on memory and counts that are often stated, each with the right one and why they differ."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Claim:
    """One figure."""

    name: str
    what: str
    stated: str
    figure: int  # the right one
    unit: str
    why: str


CLAIMS = (
    Claim(
        "lora_matrix",
        "numbers that LoRA of rank 16 trains beside a matrix of 4096 x 4096",
        "131,072, 0.78 % of the matrix",
        131_072,
        "numbers",
        "it is right: r (d_in + d_out); a model has one such product for each linear that is adapted",
    ),
    Claim(
        "prefix_heads",
        "numbers in prefixes of 20 tokens for 32 blocks of width 4096 where each head has its own keys and values",
        "5,242,880",
        5_242_880,
        "numbers",
        "it is right for the prefixes alone; the network that makes them in training is not counted",
    ),
    Claim(
        "prefix_groups",
        "the same for Llama-3.1-8B, whose 32 query heads share 8 heads of keys and values",
        "5,242,880",
        1_310_720,
        "numbers",
        "prefixes are keys and values: 2 L Lp kv_heads head_dim, not 2 L Lp d",
    ),
    Claim(
        "llama65b_weights",
        "weights of LLaMA-65B in 16 bits",
        "130 GB",
        130_571_321_344,
        "bytes",
        "it is right for 65.3 billion parameters; trained in mixed precision there are float32 masters as well",
    ),
    Claim(
        "llama65b_optimizer",
        "optimizer of a full fine-tuning of LLaMA-65B with AdamW",
        "260 GB",
        783_427_928_064,
        "bytes",
        "260 GB are two moments in 16 bits; AdamW has two in float32 and a float32 copy of the weights",
    ),
    Claim(
        "llama65b_total",
        "a full fine-tuning of LLaMA-65B, without activations",
        "~520 GB",
        1_044_570_570_752,
        "bytes",
        "16 bytes a parameter: 16-bit weights and gradients, float32 masters and two float32 moments",
    ),
    Claim(
        "qlora65b_weights",
        "weights of LLaMA-65B in NF4",
        "32.5 GB",
        34_459_538_624,
        "bytes",
        "4 bits for each parameter are not all: factors of blocks take 0.127 bit a weight with double quantization, "
        "and embedding, head and norms stay in 16 bits",
    ),
    Claim(
        "qlora65b_optimizer",
        "optimizer of QLoRA of rank 16 on all linears of LLaMA-65B",
        "~1 GB",
        1_599_078_400,
        "bytes",
        "two float32 moments of 199.9 million numbers; the stated figure has no rank, and holds up to rank 10",
    ),
    Claim(
        "qlora65b_gradients",
        "gradients of the same",
        "~0.5 GB",
        799_539_200,
        "bytes",
        "float32 like the numbers that are trained; in 16 bits they would be 0.4 GB",
    ),
    Claim(
        "qlora65b_total",
        "QLoRA of rank 16 on LLaMA-65B, without activations",
        "~34 GB",
        37_657_695_424,
        "bytes",
        "the sum: weights in NF4, the product in float32, its gradients and its two moments",
    ),
    Claim(
        "qlora70b_total",
        "QLoRA of rank 16 on Llama-2-70B, without activations, which is to train on 2 GPUs of 24 GB",
        "fits 2 x 24 GB",
        39_677_105_344,
        "bytes",
        "more than one GPU of 24 GB holds and less than two: it fits where weights are divided (19.8 GB each, blocks "
        "computed again), not where each process holds them all, as under DDP",
    ),
    Claim(
        "llama70b_cache",
        "keys and values of 4096 tokens of Llama-2-70B in 16 bits, 8 heads for 64 of queries",
        "8x less than with 64 heads",
        1_342_177_280,
        "bytes",
        "the ratio is right (10.7 GB with 64 heads); the size B L H T d, which is often given, lacks the factor 2 for "
        "keys and values and the bytes of a number",
    ),
    Claim(
        "checkpointing_every_compute",
        "operations of a step of training whose every block is computed again, for 3 without",
        "~2x: 6",
        4,
        "operations",
        "a backward pass takes twice a forward pass, and one forward pass is added: 1.33x",
    ),
    Claim(
        "checkpointing_every_memory",
        "bytes that 32 blocks of width 4096 keep of 4096 tokens in 16 bits, each computed again, beside one block's",
        "O(1)",
        1_073_741_824,
        "bytes",
        "the input of each block is kept, L of them: what is constant is the one block that is computed again",
    ),
    Claim(
        "checkpointing_sqrt_memory",
        "the same where every sixth block keeps its input, beside those of the six that are computed again",
        "O(sqrt L)",
        201_326_592,
        "bytes",
        "it is right for the inputs that are kept, 6 of 32; while six blocks are computed again, what these keep is "
        "there too, and a block keeps more than its input",
    ),
    Claim(
        "zero1",
        "bytes of each of 64 processes under ZeRO stage 1 for 7.5 billion parameters, without activations",
        "d + 12 d / N: 8.9 GB",
        31_406_250_000,
        "bytes",
        "weights and gradients are 2 + 2 bytes a parameter, whole in every process: 4 + 12 / N",
    ),
    Claim(
        "zero2",
        "the same under stage 2",
        "d + 14 d / N or 2 d + 12 d / N: 9.1 or 16.4 GB",
        16_640_625_000,
        "bytes",
        "gradients are divided as well: 2 + 14 / N",
    ),
    Claim(
        "zero3",
        "the same under stage 3",
        "16 d / N: 1.9 GB",
        1_875_000_000,
        "bytes",
        "it is right; the weights of one block are whole for a moment, in the forward and in the backward pass",
    ),
)
