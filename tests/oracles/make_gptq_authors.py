"""What the GPTQ authors' code makes of matrices whose width groups of 128 do not divide: rounded, and by its loop.

The ends of the range of every group are set so that its scale is a number of 11 bits, which is the same in float16.
"""

from __future__ import annotations

import torch
from golden import clone, write
from torch import Tensor, nn

REPOSITORY, COMMIT = "IST-DASLab/gptq", "2d65066eeb06a5c9ff5184d8cebdf33662c67faf"
clone(REPOSITORY, COMMIT, "gptq.py", "quant.py")

from gptq import GPTQ  # noqa: E402
from quant import Quantizer  # noqa: E402

OUT, SIZE, TOKENS = 8, 128, 96
EACH = 3.0  # size of one more token for every input, which is not stored
# name: static groups, act-order
LOOPS = {"static": (True, False), "static_act": (True, True), "dynamic": (False, False), "dynamic_act": (False, True)}


def make_weight(width: int, bits: int, generator: torch.Generator) -> Tensor:
    """[out, width] whose groups have a scale s of 11 bits, and the range from -z s to (2^bits - 1 - z) s."""
    parts = []
    for size in [SIZE] * (width // SIZE) + [width % SIZE]:
        part = torch.randn(OUT, size, generator=generator) * 0.02
        top = 2**bits - 1
        scale = ((part.amax(1) - part.amin(1)) / top).half().float()[:, None]
        low = -torch.randint(1, top, (OUT, 1), generator=generator) * scale
        part = part.clamp(low, low + top * scale)
        part[:, 3:4], part[:, 5:6] = low, low + top * scale
        parts.append(part)
    return torch.cat(parts, 1)


def quantizer(bits: int) -> Quantizer:
    found = Quantizer()
    found.configure(bits, perchannel=True, sym=False)
    return found


def round_groups(weight: Tensor, bits: int) -> Tensor:
    """Each group on the grid of its own range."""
    parts = []
    for part in weight.split(SIZE, 1):
        grid = quantizer(bits)
        grid.find_params(part, weight=True)
        parts.append(grid.quantize(part))
    return torch.cat(parts, 1)


def run_loop(weight: Tensor, inputs: Tensor, bits: int, static: bool, act: bool) -> Tensor:
    linear = nn.Linear(weight.shape[1], OUT, bias=False)
    linear.weight.data = weight.clone()
    loop = GPTQ(linear)
    loop.quantizer = quantizer(bits)
    loop.add_batch(inputs, None)  # as one sequence; they average over sequences, which is a factor
    loop.fasterquant(groupsize=SIZE, actorder=act, static_groups=static)
    return linear.weight.data


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for width in (576, 100):
        tokens = torch.randn(TOKENS, width, generator=generator) * (0.2 + torch.rand(width, generator=generator))
        tensors[f"{width}.tokens"] = tokens.half()
        inputs = torch.cat([tokens.half().float(), EACH * torch.eye(width)])
        for bits in (3, 4):
            name = f"{width}.b{bits}"
            weight = make_weight(width, bits, generator)
            tensors |= {f"{name}.weight": weight, f"{name}.rounded": round_groups(weight, bits)}
            for loop, (static, act) in LOOPS.items():
                tensors[f"{name}.{loop}"] = run_loop(weight, inputs, bits, static, act)
    write("gptq_authors", __file__, [], tensors, seed=0, source=f"{REPOSITORY}@{COMMIT}", each=EACH, loops=LOOPS)
