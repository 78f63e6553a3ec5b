"""Influence functions: examples whose weight in training would lower the loss of a target most (Koh & Liang, 2017)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.core.views import Example
from effbench.methods.select._target import Aimed
from effbench.nn.train.example_gradients import (
    ROLES,
    Matrix,
    count_numbers,
    find_gradients,
    find_matrices,
    multiply_hessian,
)
from effbench.nn.train.examples import batches
from effbench.nn.train.passes import go_through
from effbench.nn.train.unlabelled import require_told

MOST = 2**12  # numbers in the subset of which the Hessian is written out
ROUNDS = 100  # of conjugate gradients, at most
ENOUGH = 1e-5  # of the norm of the right-hand side that may be left then


@dataclass(frozen=True)
class Influence(Aimed):
    """Ranks by g . H^-1 g_z: how fast the target's loss falls as example z counts more (eq. 2 with the sign turned,
    so that larger is better).

    g is the gradient of the mean loss of the target, g_z that of the example, H the Hessian of the mean loss of the
    train set, all with respect to the linears of `roles` in the last `blocks`, at the model as it is: put fit() in
    front for the trained one. `hessian="identity"` is the inner product of gradients.
    """

    paper = "arXiv:1703.04730"
    caveats = (
        "the paper's H is that of all parameters at an optimum; here of some, at the model as it is, and the identity "
        "unless told",
    )
    type = "data selection"
    usual = 0.2
    trials = ({}, {"hessian": "cg", "roles": ("v",), "sample": 4, "damping": 100.0})

    hessian: Literal["identity", "exact", "cg"] = "identity"  # exact: written out, of at most 4096 numbers, a small
    # model's; cg: by conjugate gradients (3)
    damping: float = 0.01  # is added to the diagonal of the Hessian
    sample: int = 256  # examples that the Hessian is a mean over, drawn by the seed
    blocks: int = 1  # the last ones, whose linears are looked at
    roles: tuple[str, ...] = ("v",)  # of the linears: q, k, v, o, gate, up, down

    def check(self) -> None:
        super().check()
        self.require(self.damping >= 0, "damping must not be negative")
        self.require(min(self.sample, self.blocks) > 0, "sample and blocks must be at least 1")
        self.require(bool(self.roles) and {*self.roles} <= {*ROLES}, f"roles are some of {', '.join(ROLES)}")

    def score(self, examples: Sequence[Example], run: Run) -> Tensor:
        require_told(examples)
        parts = find_matrices(run, self.blocks, self.roles)
        aim = self.solve(self._mean_gradient(self.find_target(run), parts, run), parts, examples, run)
        state = {"scores": torch.zeros(len(examples), dtype=torch.float64)}

        def visit(places: list[int], batch: dict[str, Tensor]) -> None:
            _, gradients = find_gradients(run.model, parts, batch)
            state["scores"][places] = (gradients @ aim.to(gradients)).double().cpu()

        go_through(run, self.key, examples, state, visit)
        return state["scores"]

    def _mean_gradient(self, examples: Sequence[Example], parts: Sequence[Matrix], run: Run) -> Tensor:
        """[P] float64: the gradient of the mean loss over examples."""
        state = {"sum": torch.zeros(sum(count_numbers(parts)), dtype=torch.float64)}

        def visit(places: list[int], batch: dict[str, Tensor]) -> None:
            state["sum"] += find_gradients(run.model, parts, batch)[1].sum(0).double().cpu()

        go_through(run, f"{self.key}-{self.aim}", examples, state, visit)
        return state["sum"] / len(examples)

    def solve(self, vector: Tensor, parts: Sequence[Matrix], examples: Sequence[Example], run: Run) -> Tensor:
        """[P]: (H + damping I)^-1 times a vector. Raises `Unsupported` where H + damping I is not positive.

        Conjugate gradients look only along the directions that they take.
        """
        if self.hessian == "identity":
            return vector
        few = random.Random(f"{run.seed}/influence").sample(examples, min(self.sample, len(examples)))
        dtype = torch.promote_types(next(run.model.parameters()).dtype, torch.float32)

        def multiply(vectors: Tensor) -> Tensor:
            given = vectors.to(run.device, dtype)
            products = [multiply_hessian(run.model, parts, batch, given) for _, batch in batches(run, few)]
            return sum(products).double().cpu() / len(few) + self.damping * vectors  # type: ignore[union-attr]

        if self.hessian == "cg":
            return find_solution(lambda v: multiply(v[None])[0], vector)
        if len(vector) > MOST:
            raise Unsupported(
                f"{self}: {len(vector)} numbers are too many to write their Hessian out, which takes {MOST} at most: "
                "give hessian='cg'"
            )
        matrix = multiply(torch.eye(len(vector), dtype=torch.float64))
        return divide((matrix + matrix.T) / 2, vector)


def divide(matrix: Tensor, vector: Tensor) -> Tensor:
    """x [P] with A x = vector for a symmetric matrix A [P, P]. Raises `Unsupported` where A is not positive."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise Unsupported(describe_curve(-float(torch.linalg.eigvalsh(matrix)[0])))
    return torch.cholesky_solve(vector[:, None], factor)[:, 0]


def describe_curve(down: float) -> str:
    """Why there is no answer where the damped loss curves downwards by so much."""
    return (
        f"the loss curves downwards by {max(0.0, down):.2g} where it was looked at, so that influences have no "
        "meaning: give a damping= that is larger by more than that"
    )


def find_solution(multiply: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """x with A x = vector by conjugate gradients. Raises `Unsupported` where A is not positive or takes too long."""
    x, rest = torch.zeros_like(vector), vector.clone()
    direction = rest.clone()
    for _ in range(ROUNDS):
        if rest.norm() <= ENOUGH * vector.norm():
            return x
        product = multiply(direction)
        along = direction @ product
        if along <= 0:
            raise Unsupported(describe_curve(float(-along / (direction @ direction))))
        step = (rest @ rest) / along
        x = x + step * direction
        new = rest - step * product
        direction = new + (new @ new) / (rest @ rest) * direction
        rest = new
    raise Unsupported(f"conjugate gradients do not arrive in {ROUNDS} rounds: give a larger damping=")
