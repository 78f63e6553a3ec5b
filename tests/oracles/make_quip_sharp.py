"""QuIP# of small matrices by its authors' code, in three widths, with and without tuning passes."""

from __future__ import annotations

import sys
import types
from importlib import import_module

import torch
from golden import clone, write
from torch import Tensor

REPOSITORY, COMMIT = "Cornell-RelaxML/quip-sharp", "1d8f873e9a2a8b86b12bb1064c312c5689b77d98"
FOLDER = clone(REPOSITORY, COMMIT, "lib", absent=("quiptools_cuda", "fast_hadamard_transform", "glog"))


def hold(name: str) -> types.ModuleType:
    """A package of theirs without what its __init__ imports: evaluation, CUDA operators."""
    package = types.ModuleType(name)
    package.__path__ = [str(FOLDER.joinpath(*name.split(".")))]
    sys.modules[name] = package
    return package


lib, utils, _, _ = hold("lib"), hold("lib.utils"), hold("lib.codebook"), hold("lib.algo")
lib.utils = utils
for part in ("math_utils", "matmul_had"):
    vars(utils).update(vars(import_module(f"lib.utils.{part}")))
utils.clean = lambda: None
quip = import_module("lib.algo.quip")
CODEBOOKS = {
    2: ("latticee8_padded12", "E8P12_codebook", 0.9),  # the scale of their scripts
    3: ("latticee8_padded12_rvq3bit", "E8P12RVQ3B_codebook", 0),
    4: ("latticee8_padded12_rvq4bit", "E8P12RVQ4B_codebook", 0),
}
SHAPES = ((32, 64), (24, 72))  # a power of 2 on both sides; 12 and 36 times one
TUNED = (0, 2)
SIGMA, SEED = 0.01, 0


def draw_signs(out: int, width: int) -> dict[int, Tensor]:
    """Signs by size, of inputs first."""
    generator = torch.Generator().manual_seed(SEED)
    return {size: torch.randint(2, (size,), generator=generator) * 2.0 - 1 for size in (width, out)}


def compress(weight: Tensor, hessian: Tensor, bits: int, passes: int) -> Tensor:
    module, name, scale = CODEBOOKS[bits]
    arguments = types.SimpleNamespace(
        use_fp64=False, rescale_WH=False, incoh_mode="had", lora_rank=0, scale_override=scale, no_use_buffered=True,
        resid_scale_override=-1, quip_tune_iters=passes,
    )  # fmt: skip
    codebook = getattr(import_module(f"lib.codebook.{module}"), name)()
    codebook.maybe_pack_idxs = lambda codes: codes
    hessian = utils.regularize_H(hessian.clone(), len(hessian), SIGMA)
    return quip.quantize(hessian, weight, 0, codebook, arguments)[0]


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(SEED)
    tensors, normal = {}, torch.randn
    for out, width in SHAPES:
        case = f"{out}x{width}"
        weight = normal(out, width, generator=generator) * 0.02
        inputs = normal(256, width, generator=generator) * (0.2 + torch.rand(width, generator=generator))
        tensors |= {f"{case}.weight": weight, f"{case}.inputs": inputs.half()}
        hessian = inputs.half().float().T @ inputs.half().float() / len(inputs)
        signs = draw_signs(out, width)
        torch.randn = lambda size, signs=signs, **_: signs[size]  # they take the signs of normal numbers
        for bits in CODEBOOKS:
            for passes in TUNED:
                tensors[f"{case}.b{bits}.tuned{passes}"] = compress(weight, hessian, bits, passes)
    facts = {"shapes": SHAPES, "tuned": TUNED, "sigma": SIGMA}
    write("quip_sharp", __file__, [], tensors, seed=SEED, source=f"{REPOSITORY}@{COMMIT}", **facts)
