"""QuIP#: randomised Hadamard transforms on both sides, then lattice codes by block LDLQ (Tseng et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.core.kinds import Weights
from effbench.core.views import Layer
from effbench.formats.lattice import E8PLinear, encode, rotate
from effbench.kernels.e8p_linear.cases import RESIDUAL_SCALE
from effbench.kernels.e8p_linear.reference import E8PMatrix
from effbench.kernels.hadamard.matrices import factors

SPAN = 8  # weights that share a lattice point
SCALE = {2: 0.9, 3: 0.98, 4: 1.03}  # spread of the rotated weights over the codebook, as the authors set it


def block_ldl(hessian: Tensor, span: int = SPAN) -> Tensor:
    """L [n, n] of H = L D L^T: lower triangular in blocks of `span`, identity blocks on its diagonal."""
    lower = torch.linalg.cholesky(hessian.double())
    columns = lower.unflatten(1, (-1, span))  # [n, n / span, span]
    diagonal = columns.unflatten(0, (-1, span)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [n / span, span, span]
    return (columns.transpose(0, 1) @ torch.linalg.inv(diagonal)).transpose(0, 1).flatten(1).to(hessian.dtype)


def ldlq(weight: Tensor, hessian: Tensor, bits: int, tune_iters: int) -> tuple[Tensor, Tensor | None]:
    """Codes of `weight` [out, in] (divided by its scale), eight inputs at a time from the last to the first.

    Block LDLQ: with H = L D L^T, block k becomes Q(W_k + (W - W^) L_k) of the errors W - W^ of the blocks behind it:
    LDLQ of QuIP (arXiv:2307.13304) with blocks of 8 for single inputs. Then `tune_iters` passes of coordinate descent,
    which the authors' code adds, round every block again, given all the others.
    """
    lower = block_ldl(hessian)
    one = torch.ones((), device=weight.device)
    left = weight.T.clone(memory_format=torch.contiguous_format)  # W - W^ [in, out], all of W to begin with
    parts: dict[int, tuple[Tensor, Tensor | None]] = {}

    def settle(start: int, target: Tensor) -> None:
        """Encode `target` [8, out] as the block at `start`."""
        codes, residual = parts[start] = encode(target.T.unsqueeze(1), bits)  # [out, 1, 8]
        points = E8PMatrix(codes, one, residual, RESIDUAL_SCALE[bits]).dense(SPAN)
        left[start : start + SPAN] = (weight[:, start : start + SPAN] - points).T

    # Block LDLQ: the rows of L below the block say how much of each later error a block takes over.
    starts = range(weight.shape[1] - SPAN, -1, -SPAN)
    for start in starts:
        stop = start + SPAN
        settle(start, left[start:stop] + lower[stop:, start:stop].T @ left[stop:])
    # Coordinate descent on the proxy loss, tr((W - W^) H (W - W^)^T): with all other blocks fixed, its minimum over
    # block k lies at W_k + sum over j != k of (W - W^)_j H_jk H_kk^-1, which is then rounded. `settled + gain @ left`
    # is that target.
    rows = hessian.unflatten(0, (-1, SPAN))  # [in / 8, 8, in]
    own = rows.unflatten(2, (-1, SPAN)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [in / 8, 8, 8]
    gain = torch.linalg.solve(own, rows).flatten(0, 1)  # H_kk^-1 H_k of every block k, [in, in]
    for _ in range(tune_iters):
        for start in starts:
            stop = start + SPAN
            settled = weight.T[start:stop] - left[start:stop]
            settle(start, settled + gain[start:stop] @ left)
    codes, residual = zip(*(parts[start] for start in reversed(starts)), strict=True)
    return torch.cat(codes, 1), None if bits == 2 else torch.cat(residual, 1)


@dataclass(frozen=True)
class QuIPSharp(Weights):
    """E8P12 at 2 bits, residual codes on top of it at 3 and 4. The published method without its fine-tuning.

    Every linear is rotated and encoded by itself; the authors stack q/k/v and gate/up first.
    """

    paper = "arXiv:2402.04396"
    caveats = (
        "without the fine-tuning of the paper",
        "Hessians of inputs that compressed blocks produced; the authors take those of the original model",
    )
    type = "PTQ"
    weight_update = "block LDLQ"
    needs = {"hessian"}
    trials = ({"tune_iters": 1}, {"bits": 3, "tune_iters": 1}, {"bits": 4, "tune_iters": 0})

    bits: int = 2  # 2, 3 or 4
    tune_iters: int = 10  # passes of coordinate descent after LDLQ
    scale: float | None = None  # spread over the codebook; None: by bits
    sigma_reg: float = 0.01  # of the mean Hessian diagonal, added to every diagonal entry

    def check(self) -> None:
        self.require(self.bits in SCALE, f"bits must be one of {tuple(SCALE)}")
        self.require(self.tune_iters >= 0, "tune_iters must not be negative")
        self.require(self.scale is None or self.scale > 0, "scale must be positive")
        self.require(self.sigma_reg > 0, "sigma_reg must be positive")

    def check_shape(self, out: int, width: int) -> None:
        if width % SPAN:
            raise ValueError(f"width {width} is not a multiple of {SPAN}")
        for size in (out, width):
            factors(size)  # of its Hadamard matrix

    def compress(self, layer: Layer) -> nn.Module:
        if layer.kept is not None:
            raise Unsupported(f"{layer.name}: rotated weights cannot keep the zeros of pruned ones")
        out, width = layer.weight.shape
        # Step 1, incoherence processing: random signs and a Hadamard transform on both sides, of W and of H alike.
        generator = torch.Generator().manual_seed(layer.seed)
        signs_in, signs_out = (
            (torch.randint(2, (size,), generator=generator) * 2.0 - 1).to(layer.weight.device) for size in (width, out)
        )
        hessian = layer.inputs.second_moment
        hessian = hessian / hessian.diagonal().mean().clamp(min=1e-30)
        hessian.diagonal().add_(self.sigma_reg)
        hessian = rotate(hessian, signs_in, signs_in)
        weight = rotate(layer.weight, signs_in, signs_out)
        # Step 2, block LDLQ. The weights, nearly Gaussian now, are scaled so that the codebook covers them.
        scale = weight.square().mean().sqrt().clamp(min=1e-12) / (self.scale or SCALE[self.bits])
        codes, residual = ldlq(weight / scale, hessian, self.bits, self.tune_iters)
        return E8PLinear.of(codes, scale, signs_in, signs_out, residual, bias=layer.bias)
