"""How much of a model is zero."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from effbench.nn.model.linear import dense_weight, top_linears


class Sparsity(NamedTuple):
    """Shares of exact zeros, whatever made them."""

    linears: float  # in the matrices of all linears but the head
    model: float  # among all parameters, linears by their matrices; what is tied counts once


def measure_sparsity(model: nn.Module) -> Sparsity:
    """The shares of zeros in a model; packed linears are decoded one after the other."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    zeros = size = head_zeros = head_size = 0
    matrices: set[nn.Parameter] = set()
    for module in {linear: None for _, linear in top_linears(model)}:
        matrices |= {parameter for name, parameter in module.named_parameters() if name != "bias"}
        weight = dense_weight(module)
        found = int((weight == 0).sum())
        if module is head:
            head_zeros, head_size = found, weight.numel()
        else:
            zeros, size = zeros + found, size + weight.numel()
    others = [parameter for parameter in model.parameters() if parameter not in matrices]
    all_zeros = zeros + head_zeros + sum(int((parameter == 0).sum()) for parameter in others)
    return Sparsity(zeros / size, all_zeros / (size + head_size + sum(parameter.numel() for parameter in others)))
