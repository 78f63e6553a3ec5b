"""What the GPTQ authors' code makes of matrices whose width groups do not divide: rounded, and by its loop.

The ends of the range of every group are set so that its scale is a number of 11 bits, which is the same in float16.
Scales that the loop finds in weights it has changed are rounded to float16, in which they are stored.
"""

from __future__ import annotations

import torch
from golden import clone, write
from torch import Tensor, nn

REPOSITORY, COMMIT = "IST-DASLab/gptq", "2d65066eeb06a5c9ff5184d8cebdf33662c67faf"
clone(REPOSITORY, COMMIT, "gptq.py", "quant.py")

from gptq import GPTQ  # noqa: E402
from quant import Quantizer  # noqa: E402

OUT, TOKENS = 4, 48
EACH = 3.0  # size of one more token for every input, which is not stored
CASES = ((576, 128), (100, 64), (100, 128))  # width and group size: 4.5 groups, 1.6, and less than one
BITS = (3, 4)
# name: symmetric, searched for the least error
GRIDS = {"plain": (False, False), "symmetric": (True, False), "mse": (False, True)}
# name: static groups, act-order
LOOPS = {"static": (True, False), "static_act": (True, True), "dynamic": (False, False), "dynamic_act": (False, True)}


def make_weight(width: int, size: int, bits: int, generator: torch.Generator) -> Tensor:
    """[out, width] whose groups have a scale s of 11 bits, and the range from -z s to (2^bits - 1 - z) s."""
    parts = []
    for number in [size] * (width // size) + [width % size]:
        part = torch.randn(OUT, number, generator=generator) * 0.02
        top = 2**bits - 1
        scale = ((part.amax(1) - part.amin(1)) / top).half().float()[:, None]
        low = -torch.randint(1, top, (OUT, 1), generator=generator) * scale
        part = part.clamp(low, low + top * scale)
        part[:, 3:4], part[:, 5:6] = low, low + top * scale
        parts.append(part)
    return torch.cat(parts, 1)


class StoredQuantizer(Quantizer):
    """Theirs, whose scales are numbers of float16."""

    def find_params(self, x: Tensor, weight: bool = False) -> None:
        super().find_params(x, weight)
        self.scale = self.scale.half().float()


def round_groups(weight: Tensor, size: int, bits: int, symmetric: bool, mse: bool) -> Tensor:
    """Each group on the grid of its own range."""
    parts = []
    for part in weight.split(size, 1):
        grid = StoredQuantizer() if symmetric or mse else Quantizer()
        grid.configure(bits, perchannel=True, sym=symmetric, mse=mse)
        grid.find_params(part, weight=True)
        parts.append(grid.quantize(part))
    return torch.cat(parts, 1)


def run_loop(weight: Tensor, inputs: Tensor, size: int, bits: int, static: bool, act: bool) -> Tensor:
    linear = nn.Linear(weight.shape[1], OUT, bias=False)
    linear.weight.data = weight.clone()
    loop = GPTQ(linear)
    loop.quantizer = Quantizer() if static else StoredQuantizer()
    loop.quantizer.configure(bits, perchannel=True, sym=False)
    loop.add_batch(inputs, None)  # as one sequence; they average over sequences, which is a factor
    loop.fasterquant(groupsize=size, actorder=act, static_groups=static)
    return linear.weight.data


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for width, size in CASES:
        tokens = torch.randn(TOKENS, width, generator=generator) * (0.2 + torch.rand(width, generator=generator))
        tensors[f"{width}.g{size}.tokens"] = tokens.half()
        inputs = torch.cat([tokens.half().float(), EACH * torch.eye(width)])
        for bits in BITS:
            name = f"{width}.g{size}.b{bits}"
            weight = make_weight(width, size, bits, generator)
            tensors[f"{name}.weight"] = weight
            for grid, (symmetric, mse) in GRIDS.items():
                tensors[f"{name}.rounded.{grid}"] = round_groups(weight, size, bits, symmetric, mse)
            for loop, (static, act) in LOOPS.items():
                tensors[f"{name}.{loop}"] = run_loop(weight, inputs, size, bits, static, act)
    facts = {"each": EACH, "cases": CASES, "bits": BITS, "grids": GRIDS, "loops": LOOPS}
    write("gptq_authors", __file__, [], tensors, seed=0, source=f"{REPOSITORY}@{COMMIT}", **facts)
