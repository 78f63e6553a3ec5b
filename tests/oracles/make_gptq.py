"""Integer codes of llm-compressor's GPTQ on a small matrix, in ten settings."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from golden import write
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import apply_activation_ordering, factorize_hessian
from torch import Tensor

OUT, IN, GROUP, BLOCK, DAMP = 32, 128, 32, 32, 0.01
# name: bits, group size (None: per row), symmetric, act-order
SETTINGS: dict[str, tuple[int, int | None, bool, bool]] = {
    "b4_row_sym": (4, None, True, False),
    "b4_row_asym": (4, None, False, False),
    "b4_group_sym": (4, GROUP, True, False),
    "b4_group_asym": (4, GROUP, False, False),
    "b4_group_asym_act": (4, GROUP, False, True),
    "b4_row_sym_act": (4, None, True, True),
    "b3_group_asym": (3, GROUP, False, False),
    "b2_group_asym_act": (2, GROUP, False, True),
    "b8_row_sym": (8, None, True, False),
    "b8_group_asym": (8, GROUP, False, False),
}
MARGIN = 3e-5  # least distance from a tie, in steps: more than arithmetic differs between processors


def layer(seed: int) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator) * 0.02
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5 + torch.eye(IN)
    inputs = torch.randn(4 * IN, IN, generator=generator) @ mixing * (0.5 + torch.rand(IN, generator=generator))
    return weight, 2 * inputs.T @ inputs / len(inputs)


def margin(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int) -> float:
    """Least distance from a rounding tie that the loop meets, in float64; weights in the order of the loop."""
    work, upper, least = weight.double(), factor.double(), 1.0
    for i in range(IN):
        s, z = scale[:, group[i]].double(), zero[:, group[i]].double()
        at = work[:, i] / s + z
        inside = at[(at > -0.6) & (at < 2**bits - 0.4)]
        least = min(least, float((inside - inside.floor() - 0.5).abs().min()))
        error = (work[:, i] - s * (at.round().clamp(0, 2**bits - 1) - z)) / upper[i, i]
        work[:, i:] -= error[:, None] * upper[i, i:]
    return least


def codes(seed: int) -> tuple[dict[str, Tensor], float]:
    weight, hessian = layer(seed)
    found = {"weight": weight, "hessian": hessian}
    none = torch.zeros(1, dtype=torch.bool)
    for act in (False, True):
        w, h = weight[None].clone(), hessian[None].clone()
        w, h, order = apply_activation_ordering(w, h, "static" if act else None)
        found["factor_act" if act else "factor"] = factorize_hessian(w, h, DAMP, none)[0].clone()
        if order is not None:
            found["order"] = order[0]
    least = 1.0
    for name, (bits, size, symmetric, act) in SETTINGS.items():
        arguments = QuantizationArgs(
            num_bits=bits,
            symmetric=symmetric,
            strategy="channel" if size is None else "group",
            group_size=size,
            actorder="static" if act else None,
        )
        parts = weight.unflatten(1, (-1, size or IN))
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
        quantized, _, fallback = quantize_weight(
            weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, arguments, BLOCK, DAMP
        )
        assert not fallback.any()
        per_weight = scale.repeat_interleave(size or IN, 1)
        middle = 2 ** (bits - 1)  # codes are stored unsigned
        unsigned = zero.float() + middle
        code = (quantized[0] / per_weight).round() + unsigned.repeat_interleave(size or IN, 1)
        found |= {f"{name}.scale": scale, f"{name}.zero": unsigned, f"{name}.codes": code.to(torch.uint8)}
        order = found["order"] if act else torch.arange(IN)
        factor = found["factor_act" if act else "factor"]
        least = min(least, margin(weight[:, order], factor, scale, unsigned, order // (size or IN), bits))
    return found, least


if __name__ == "__main__":
    seed, least = 0, 0.0
    while least < MARGIN:
        tensors, least = codes(seed)
        seed += 1
    write(
        "gptq",
        __file__,
        ["llmcompressor", "compressed-tensors"],
        tensors,
        seed=seed - 1,
        margin=least,
        block=BLOCK,
        damp=DAMP,
        settings=SETTINGS,
    )
