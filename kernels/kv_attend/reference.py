"""Attention of one new token of each row over keys and values of which the oldest are in few bits."""

import torch
from torch import Tensor

from effbench.kernels.kv_dequantize.reference import kv_dequantize


def kv_attend(
    query: Tensor,
    key_words: Tensor,
    key_scale: Tensor,
    key_low: Tensor,
    key_tail: Tensor,
    value_words: Tensor,
    value_scale: Tensor,
    value_low: Tensor,
    value_tail: Tensor,
    key_bits: int,
    value_bits: int,
    unit: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Queries [N, G, D] of heads that share keys; outputs [N, G, D] and logarithms [N, G] of the softmax's denominator.

    Keys: K units of `unit` tokens, each of whose channels is a group of `kv_quantize`: words [N, K, D, W], scale and
    least number [N, K, D, 1]; then L tokens as they came, [N, L, D]. Values: M tokens in C groups of D / C channels,
    words [N, M, C, V], scale and least number [N, M, C, 1]; then P tokens as they came. K unit + L = M + P >= 1.
    Both are decoded as by `kv_dequantize`; scores, softmax and sums are in float32 (float64 for float64 queries).
    Outputs of two parts of a cache are those of the whole when they are weighed by the softmax of their logarithms.
    """
    rows, width, parts = len(query), query.shape[2], value_words.shape[2]
    keys = kv_dequantize(key_words, key_scale, key_low, key_bits, unit).transpose(2, 3).reshape(rows, -1, width)
    values = kv_dequantize(value_words, value_scale, value_low, value_bits, width // parts).flatten(2)
    wide = torch.promote_types(query.dtype, torch.float32)
    keys = torch.cat([keys.to(wide), key_tail.to(wide)], 1)
    values = torch.cat([values.to(wide), value_tail.to(wide)], 1)
    scores = query.to(wide) @ keys.mT * scaling
    total = scores.logsumexp(-1)
    return ((scores - total[..., None]).exp() @ values).to(query.dtype), total
