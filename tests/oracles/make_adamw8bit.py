"""Twenty steps of bitsandbytes' AdamW8bit on a processor, on a tensor of 8-bit states and on one too small for them.

On a processor bitsandbytes looks the nearest level up in a table over 2^16 places, which is off for numbers between
them. Elsewhere, and here for other types than float32, it searches among the levels: `nearest` is with that search,
`table` as it comes.
"""

from __future__ import annotations

import math

import bitsandbytes
import torch
from bitsandbytes.backends.cpu import ops
from bitsandbytes.functional import create_dynamic_map
from golden import write
from torch import Tensor

SHAPES = {"large": (17, 241), "small": (40,)}  # 4,097 numbers: a block of the 17 is not full
LR, DECAY, STEPS = 1e-2, 0.1, 20


def search(values: Tensor, code: Tensor, absmax: Tensor, out: Tensor, blocksize: int) -> None:
    """In the place of theirs: the same op on float64, which searches."""
    codes, factors = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, blocksize)
    out.copy_(codes)
    absmax.copy_(factors)


def run(starts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors after all steps, and the states of the large one."""
    weights = {name: start.clone().requires_grad_() for name, start in starts.items()}
    optimizer = bitsandbytes.optim.AdamW8bit(weights.values(), lr=LR, weight_decay=DECAY)
    for step in range(STEPS):
        for name, weight in weights.items():
            weight.grad = math.cos(0.3 * step) * starts[name] + math.sin(0.2 * step) * starts[name].flip(-1)
        optimizer.step()
    state = optimizer.state[weights["large"]]
    states = {name: state[name] for name in ("state1", "state2", "absmax1", "absmax2")}
    return {name: weight.detach().clone() for name, weight in weights.items()} | states


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    starts = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tensors = {f"{name}.start": start for name, start in starts.items()}
    tensors |= {"signed": create_dynamic_map(True), "unsigned": create_dynamic_map(False)}
    tensors |= {f"{name}.table": tensor for name, tensor in run(starts).items() if name in SHAPES}
    ops._quant_blockwise_fp32_direct = search
    tensors |= {f"{name}.nearest": tensor for name, tensor in run(starts).items()}
    write("adamw8bit", __file__, ["bitsandbytes"], tensors, lr=LR, weight_decay=DECAY, steps=STEPS)
