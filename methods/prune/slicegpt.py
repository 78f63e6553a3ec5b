"""SliceGPT: rotate the residual stream to its principal directions and drop the last (Ashkboos et al., 2024)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from effbench.core.errors import Diverged, Unsupported
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.calibration import BlockInputs, walk
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.sliced import Sliced, fuse_norms, slice_block, turn_embeddings, turn_inputs, turn_outputs

DAMP = 0.01  # of the mean energy, added to every direction: the factorisation of a singular matrix stays accurate


def principal(signal: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Principal directions of the tokens in `signal` ([..., width] each), about zero and not about their mean.

    Returns float64 orthonormal columns [width, width] by falling energy and the energies [width], sums of squares
    over all tokens. Raises `Diverged` for a signal that is not finite.
    """
    width = signal[0].shape[-1]
    moment = torch.zeros(width, width, dtype=torch.float64, device=signal[0].device)
    for part in signal:
        x = part.flatten(0, -2).double()
        moment += x.T @ x
    if not torch.isfinite(moment).all():
        raise Diverged(f"{name}: activations are not finite during calibration")
    damp = DAMP * moment.diagonal().mean()
    moment.diagonal().add_(damp)
    energy, directions = torch.linalg.eigh(moment)
    return directions.flip(1), (energy.flip(0) - damp).clamp(min=0)


@dataclass(frozen=True)
class SliceGPT(Method):
    """`slicing` is the part of the width of the residual stream that goes, not of the parameters: every block gains two
    matrices that carry its residuals from one basis to the next.

    Each basis is that of the signal which the model, sliced up to there, really has. By default, as published, the
    stream keeps its full width between the last block and the head.
    """

    paper = "arXiv:2401.15024"
    published = "slicegpt()"
    settles = True
    type = "post-training"
    weight_update = "rotation and slicing"
    needs = {"raw"}

    slicing: float = 0.25  # fraction of the width that is removed
    multiple: int = 8  # the new width is rounded down to a multiple of this
    slice_head: bool = False  # slice between the last block and the head, too
    orientation: Literal["random", "pca"] = "random"  # of the directions kept: matters to rounding only

    def check(self) -> None:
        self.require(0 <= self.slicing < 1, "slicing must be in [0, 1)")
        self.require(self.multiple > 0, "multiple must be at least 1")

    @torch.no_grad()
    def apply(self, run: Run) -> None:
        view = Blocks(run.model)
        full = view.embedding.get_parameter("weight").shape[1]
        width = self._width(full)
        for path, _ in view.linears():
            if not run.targeted(path):
                raise Unsupported(f"{path}: slicing changes every linear, so none can be skipped")
        if width < full and not self.slice_head and run.model.config.model_type == "gpt2":
            raise Unsupported("transformer.ln_f: GPT-2 needs one width from embeddings to head; use slice_head=True")
        # Step 1: norms without weights of their own commute with orthogonal matrices, RMSNorm(X Q) = RMSNorm(X) Q, so
        # turning the stream changes no output: the paper's "computational invariance".
        fuse_norms(view)
        basis: Tensor | None = None
        for inputs in walk(run, self.needs):
            last = inputs.index == len(view) - 1
            path, after = (view.path(inputs.index + step, view.names.norms[0]) for step in (0, 1))
            # Step 2, at every norm: the principal directions of the signal there, in the model sliced up to it.
            if basis is None:
                basis = self._basis(run, inputs.hidden, path, width)
                turn_embeddings(view, basis)
            middle = self._slice_attention(run, inputs, basis, width)
            whole = last and not self.slice_head
            basis = self._slice_mlp(run, inputs, middle, full if whole else width, view.names.norm if last else after)
        # Step 3: the head reads the last basis.
        if basis is not None:
            turn_inputs(view.head, basis)

    def _slice_attention(self, run: Run, inputs: BlockInputs, before: Tensor, width: int) -> Tensor:
        """Slice the first half of a block, whose input comes in the basis `before`; the basis after it."""
        names, hidden, block = inputs.view.names, inputs.hidden, slice_block(inputs.module)
        for name in names.qkv:
            turn_inputs(block.get_submodule(name), before)
        for i, x in enumerate(hidden):
            hidden[i] = x @ before.to(x.dtype)
        # The residual goes back to the full width for now: attention still writes all directions, and which of them are
        # kept follows from the sum.
        block.shortcut_attention = nn.Parameter(before.T.to(hidden[0].dtype))
        added = inputs.replay(block.get_submodule(names.attention))()
        for i, x in enumerate(added):
            hidden[i] = hidden[i] @ block.shortcut_attention + x
        after = self._basis(run, hidden, inputs.view.path(inputs.index, names.norms[1]), width)
        # Now both sides of the sum come in the new basis; the residual by the shortcut Q_before^T Q_after.
        turn_outputs(block.get_submodule(names.out), after)
        block.shortcut_attention = nn.Parameter((before.T @ after).to(hidden[0].dtype))
        return after

    def _slice_mlp(self, run: Run, inputs: BlockInputs, before: Tensor, width: int, path: str) -> Tensor:
        """Slice the second half of a block, whose input is to come in the basis `before`; the basis after it."""
        names, hidden, block = inputs.view.names, inputs.hidden, cast(Sliced, inputs.module)
        for name in names.up:
            turn_inputs(block.get_submodule(name), before)
        for i, x in enumerate(hidden):
            x = x @ before.to(x.dtype)
            hidden[i] = x @ before.T.to(x.dtype) + block.feed(x)
        after = self._basis(run, hidden, path, width)
        turn_outputs(block.get_submodule(names.down), after)
        block.shortcut_mlp = nn.Parameter((before.T @ after).to(hidden[0].dtype))
        return after

    def _basis(self, run: Run, signal: list[Tensor], path: str, width: int) -> Tensor:
        """Float64 orthonormal columns [full width, width]: the subspace that holds most of the signal at a norm."""
        directions, energy = principal(signal, path)
        lost = float(energy[width:].sum() / energy.sum().clamp(min=1e-300))
        run.log.layers[path] = {"energy_lost": lost}
        kept = directions[:, :width]
        if self.orientation == "pca":
            return kept
        generator = torch.Generator().manual_seed(zlib.crc32(f"{run.seed}/{path}".encode()))
        rotation, triangle = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        return kept @ (rotation * triangle.diagonal().sign()).to(kept.device)

    def _width(self, full: int) -> int:
        width = int((1 - self.slicing) * full)
        width -= width % self.multiple
        if width < 1:
            raise Unsupported(f"nothing would be left of a stream of width {full}")
        return width
