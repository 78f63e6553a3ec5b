"""Gradients of single examples over a part of the parameters, batch by batch.

Example i of a batch is row i of what a linear reads, x [B, T, in], and of the slope of the objective in what it gives,
s [B, T, out]: the gradient in its weight is the sum of s x^T over the tokens of the row. So one backward pass gives
those of all examples, whatever the container of the weight is; it goes no deeper than to the first linear asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from effbench.core.errors import Unsupported
from effbench.nn.model.beside import Beside
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.feed import feed
from effbench.nn.model.linear import matrix_shape
from effbench.nn.model.structure import fused_rows
from effbench.nn.precision import widen
from effbench.nn.train.batches import Batch
from effbench.nn.train.loss import learned, learned_logits, token_losses
from effbench.nn.train.windows import evaluating

if TYPE_CHECKING:
    from effbench.core.run import Run

Objective = Callable[[Tensor, Batch], Tensor]  # logits [B, T, V] and their batch to a number for each row, [B]
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """The matrix [out, in] that a linear multiplies by, or some of its rows."""

    path: str
    module: nn.Module
    rows: Tensor | None = None  # places; None: all

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's gradient."""
        out, width = matrix_shape(self.module)
        return (out if self.rows is None else len(self.rows), width)

    def gradients(self, x: Tensor, slope: Tensor) -> Tensor:
        """[B, rows, in] from x [B, T, in] and slope [B, T, out]."""
        return torch.einsum("bto,bti->boi", slope if self.rows is None else slope[..., self.rows], x)


@dataclasses.dataclass(frozen=True)
class Factor:
    """A parameter of what is trained beside a linear, such as a factor of a product."""

    path: str
    module: Beside
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example's gradient."""
        return tuple(self.module.get_parameter(self.name).shape)

    def gradients(self, x: Tensor, slope: Tensor) -> Tensor:
        """[B, *shape] from x [B, T, in] and slope [B, T, out]."""
        shell, name = _Addition(self.module), f"beside.{self.name}"

        def objective(parameter: Tensor, x: Tensor, slope: Tensor) -> Tensor:
            added: Tensor = torch.func.functional_call(shell, {name: parameter}, (x,))
            return (added * slope).sum()

        each = torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0, 0))
        found: Tensor = each(self.module.get_parameter(self.name).detach(), x, slope)
        return found


class _Addition(nn.Module):
    """What stands beside a linear adds to its output."""

    def __init__(self, beside: Beside) -> None:
        super().__init__()
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        return self.beside.added(self.beside.read(x))


Part = Matrix | Factor


def find_matrices(run: Run, blocks: int, roles: Sequence[str]) -> list[Matrix]:
    """The matrices of these roles in so many last blocks; of a fused projection the rows that have a role.

    Raises `Unsupported` where there are none.
    """
    view = Blocks(run.model)
    found: list[Matrix] = []
    for path, module in run.linears().items():
        block, role = view.number(path), view.role(path)
        if block is None or block < len(view) - blocks:
            continue
        if role in roles:
            found.append(Matrix(path, module))
        elif role == "qkv":
            found += [
                Matrix(path, module, r) for p, r in zip("qkv", fused_rows(view, block), strict=True) if p in roles
            ]
    if not found:
        raise Unsupported(f"the last {blocks} blocks have no linear of roles {', '.join(roles)} that may be touched")
    return found


def mean_loss(logits: Tensor, batch: Batch) -> Tensor:
    """[B]: the mean cross-entropy of the learned tokens of each row, in nats."""
    return average(token_losses(logits, batch), batch)


def token_margins(logits: Tensor, batch: Batch) -> Tensor:
    """[N]: log(p / (1 - p)) of the learned tokens, p being their probability, from logits [B, T, V]."""
    z = learned_logits(logits, batch)
    label = batch["labels"][:, 1:][learned(batch)][:, None]
    others = z.scatter(1, label, float("-inf"))
    return z.gather(1, label)[:, 0] - others.logsumexp(-1)


def average(values: Tensor, batch: Batch) -> Tensor:
    """[B]: means of values [N] of the learned tokens over those of each row; 0 where there are none."""
    where = learned(batch)
    owner = where.nonzero()[:, 0]
    sums = torch.zeros(len(where), dtype=values.dtype, device=values.device).index_add(0, owner, values)
    return sums / where.sum(1).clamp(min=1)


def find_gradients(
    model: Any, parts: Sequence[Part], batch: Batch, objective: Objective = mean_loss
) -> tuple[Tensor, Tensor]:
    """[B] the objective of each row, and [B, P] its gradients, those of all parts behind each other.

    `batch` has one example a row. Nothing is left in `grad`, and every module is in its mode for evaluation.
    """
    read: dict[nn.Module, Tensor] = {}
    given: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
        read[module] = inputs[0].detach()
        given[module] = output if output.requires_grad else output.requires_grad_()

    modules = list(dict.fromkeys(part.module for part in parts))
    with _frozen(model), _hooked(modules, watch), torch.enable_grad():
        values = objective(feed(model, batch).logits, batch)
        slopes = torch.autograd.grad(values.sum(), [given[module] for module in modules])
    slope = dict(zip(modules, slopes, strict=True))

    def row_by_row(x: Tensor) -> Tensor:
        return widen(x).reshape(len(values), -1, x.shape[-1])

    with torch.no_grad():
        pairs = ((part, row_by_row(read[part.module]), row_by_row(slope[part.module])) for part in parts)
        found = [part.gradients(x, s).flatten(1) for part, x, s in pairs]
    return values.detach(), torch.cat(found, 1)


def count_numbers(parts: Sequence[Part]) -> list[int]:
    """Numbers in one example's gradient, part by part."""
    return [torch.Size(part.shape).numel() for part in parts]


def multiply_hessian(model: Any, parts: Sequence[Matrix], batch: Batch, vectors: Tensor) -> Tensor:
    """[K, P]: the Hessian of the sum of `mean_loss` over the rows of a batch, times each of K vectors [K, P]."""
    device = batch["input_ids"].device
    shifts = [torch.zeros(part.shape, dtype=vectors.dtype, device=device, requires_grad=True) for part in parts]
    at: dict[nn.Module, list[tuple[Matrix, Tensor]]] = {}
    for part, shift in zip(parts, shifts, strict=True):
        at.setdefault(part.module, []).append((part, shift))

    def move(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        for part, shift in at[module]:
            added = nn.functional.linear(inputs[0], shift.to(inputs[0].dtype))
            output = output + added if part.rows is None else output.index_add(-1, part.rows.to(added.device), added)
        return output

    # The fused kernels of attention have no second derivative.
    with _frozen(model), _hooked(list(at), move), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = mean_loss(feed(model, batch).logits, batch).sum()
        slopes = torch.autograd.grad(loss, shifts, create_graph=True)
        slope = torch.cat([each.flatten() for each in slopes])
        products = [torch.autograd.grad(slope, shifts, vector, retain_graph=True) for vector in vectors]
    return torch.stack([torch.cat([each.flatten() for each in product]) for product in products])


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside, and every module is in its mode for evaluation."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluating(model):
        for parameter in needed:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in needed:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Callable[[nn.Module, Any, Tensor], Any]) -> Iterator[None]:
    """Have `hook` see what each module reads and gives, and replace what it gives by what it returns."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
