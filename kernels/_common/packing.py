"""Codes of a few bits packed in int32 words: least significant bits first, dense across word boundaries.

Code i of a row occupies its bits [i * bits, (i + 1) * bits); only the last word of a row is padded. This is the
`pack-quantized` layout of compressed-tensors, so 3 bits put 32 codes into 3 words.
"""

import torch
from torch import Tensor


def word_count(n: int, bits: int) -> int:
    """Words that hold `n` codes."""
    return -(-n * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers in [0, 2^bits) [..., n] as int32 words [..., word_count(n, bits)]."""
    n = codes.shape[-1]
    blocks = torch.nn.functional.pad(codes.to(torch.int32), (0, -n % 32))
    blocks = blocks.view(*blocks.shape[:-1], blocks.shape[-1] // 32, 32)
    words = torch.zeros(*blocks.shape[:-1], bits, dtype=torch.int32, device=codes.device)
    for i in range(32):  # 32 codes fill exactly `bits` words
        word, shift = divmod(i * bits, 32)
        words[..., word] |= blocks[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= blocks[..., i] >> (32 - shift)
    return words.flatten(-2)[..., : word_count(n, bits)].contiguous()


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes of every row of `words`, int32 [..., n]."""
    if 32 % bits == 0:  # no code crosses words: shifting whole words is several times faster than gathering
        shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
        return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)[..., :n]
    start = torch.arange(n, device=words.device, dtype=torch.int32) * bits
    word, shift = start >> 5, start & 31
    in_low = (32 - shift).clamp(max=bits)  # bits of the code in its first word
    codes = words[..., word] >> shift & (1 << in_low) - 1
    high = words[..., (word + 1).clamp(max=words.shape[-1] - 1)]
    return codes | (high & (1 << bits - in_low) - 1) << in_low
