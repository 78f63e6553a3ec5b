"""Head pruning: the attention heads to which the loss is least sensitive go (Michel et al., 2019)."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effbench.core.errors import Diverged, Unsupported
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.structure import find_cuttable, heads, keep_groups


@torch.enable_grad()
def importance(run: Run, view: Blocks, absolute: Literal["sequence", "token"] = "token") -> list[Tensor]:
    """Of every block, [query heads] float64: the mean of |dL/dgate| at gates of 1 on the heads' outputs.

    The magnitude is taken before the mean over `absolute`, so that opposite signs do not cancel: of a whole
    sequence's gate, or of a gate of each token's own.
    """
    sequences = run.calibration()
    dtype = next(run.model.parameters()).dtype
    gates = []
    with contextlib.ExitStack() as stack:
        for index, block in enumerate(view.blocks):
            size = (sequences.shape[1], heads(view, index).queries)
            gates.append(torch.ones(size, dtype=dtype, device=run.device, requires_grad=True))
            hook = _multiply_by(gates[-1])
            stack.callback(block.get_submodule(view.names.out).register_forward_pre_hook(hook).remove)
        total = [torch.zeros(gate.shape[1], dtype=torch.float64, device=run.device) for gate in gates]
        for ids in sequences:
            ids = ids[None].to(run.device)
            loss = run.model(input_ids=ids, labels=ids, use_cache=False).loss
            for score, gradient in zip(total, torch.autograd.grad(loss, gates), strict=True):
                gradient = gradient.double()
                score += gradient.sum(0).abs() if absolute == "sequence" else gradient.abs().mean(0)
    if not all(torch.isfinite(score).all() for score in total):
        raise Diverged("gradients of the loss are not finite during calibration")
    return [score / len(sequences) for score in total]


def _multiply_by(gate: Tensor) -> Any:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return ((args[0].unflatten(-1, (gate.shape[1], -1)) * gate[..., None]).flatten(-2),)

    return multiply


@dataclass(frozen=True)
class HeadPruning(Method):
    """Heads of the whole model are ranked together and really leave it, with their keys and values in the cache.

    The published ranking is made once (`rounds=1`). Under grouped queries a key-value head goes with all query heads
    it serves; its importance is the sum of theirs, which bounds the first-order effect of removing them together. The
    most important head of every block stays.
    """

    paper = "arXiv:1905.10650"
    published = "head_pruning()"
    type = "post-training"
    weight_update = "none"
    needs = {"grad"}
    settles = True
    identity = {"sparsity": 0.0}
    trials = ({"sparsity": 0.25},)  # the default is less than one of the few key-value heads of a toy

    sparsity: float = 0.2  # fraction of the heads, rounded down to whole (key-value) heads
    normalize: bool = True  # divide by the l2 norm of the block's importances, or compare them as they are
    # Magnitudes of what are averaged, see `importance`: of tokens in the authors' code, of sequences in their formula.
    absolute: Literal["sequence", "token"] = "token"
    rounds: int = 1  # rankings; after each an equal share of the heads goes

    def check(self) -> None:
        self.require(0 <= self.sparsity < 1, "sparsity must be in [0, 1)")
        self.require(self.rounds > 0, "rounds must be at least 1")

    def apply(self, run: Run) -> None:
        if self.sparsity == 0:
            return
        view = Blocks(run.model)
        chosen = find_cuttable(run, view, (*view.names.qkv, view.names.out))
        left = {index: list(range(heads(view, index).groups)) for index in chosen}  # by their first numbers
        total = sum(map(len, left.values()))
        number = int(total * self.sparsity + 1e-9)
        if number == 0:
            raise Unsupported(f"less than one of {total} key-value heads")
        if number > total - len(chosen):
            raise Unsupported(f"{number} of {total} key-value heads would leave a block with none")
        removed: dict[int, list[int]] = {index: [] for index in chosen}
        rounds = min(self.rounds, number)
        for turn in range(rounds):
            quota = number * (turn + 1) // rounds - number * turn // rounds
            for index, gone in self._lowest(run, view, chosen, quota).items():
                removed[index] += [left[index][head] for head in gone]
                stay = [head for head in range(len(left[index])) if head not in gone]
                left[index] = [left[index][head] for head in stay]
                keep_groups(view, index, torch.tensor(stay))
        heads_by_path = {view.path(i, view.names.attention): sorted(gone) for i, gone in removed.items() if gone}
        run.log.removed.append({"step": str(self), "key_value_heads": heads_by_path})

    def _lowest(self, run: Run, view: Blocks, chosen: list[int], quota: int) -> dict[int, list[int]]:
        """By block, the present numbers of the `quota` least important key-value heads, one of each block spared."""
        ranking = []
        scores = importance(run, view, self.absolute)
        for index in chosen:
            score = scores[index] / (scores[index].norm() + 1e-20) if self.normalize else scores[index]
            score = score.unflatten(0, (-1, heads(view, index).share)).sum(1)
            order = score.argsort(stable=True).tolist()
            ranking += [(float(score[head]), index, head) for head in order[:-1]]
        lowest: dict[int, list[int]] = {}
        for _, index, head in sorted(ranking)[:quota]:
            lowest.setdefault(index, []).append(head)
        return lowest
