"""Weights: every targeted linear is compressed, block by block, with the statistics that the method needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effbench.core.kinds import Weights
from effbench.nn.calibration import BlockInputs, walk
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import check_module, dense_weight, replace, wrong_return

if TYPE_CHECKING:
    from effbench.core.run import Run


def apply(run: Run, method: Weights) -> None:
    """Settle what is pending, let the method look at the whole model, and compress it.

    Raises `Unsupported` for a mixture of experts.
    """
    Blocks(run.model).check_dense()
    run.settle()
    stream(run, method, method.prepare(run))


@torch.no_grad()
def stream(run: Run, method: Weights, prepared: Any = None) -> None:
    """Compress every targeted linear of every block with `method`, from the first block to the last."""
    verb = "compress" if type(method).compress_block is Weights.compress_block else "compress_block"
    for inputs in walk(run, method.needs, prepared):
        number = len(inputs.view.shared_inputs(inputs.module))
        for stage in [slice(i, i + 1) for i in range(number)] if method.true_sequence else [slice(number)]:
            shared = inputs.view.shared_inputs(inputs.module)[stage]  # as earlier stages have left the block
            inputs.gather(shared, method.needs)
            inputs.fold(shared, method.scales(inputs, shared))
            modules = method.compress_block(inputs, shared)
            if not isinstance(modules, dict):
                raise wrong_return(method, verb, modules, "a dict of modules by path")
            for path, module in modules.items():
                check_module(module, method, verb, run.model.get_submodule(path))
                run.log.layers[path] = measure_error(inputs.dense_weight(path), dense_weight(module), inputs, path)
                replace(run.model, path, module)
        if method.sequential:
            inputs.outputs = inputs.forward()


def measure_error(before: Tensor, after: Tensor, inputs: BlockInputs, path: str) -> dict[str, float]:
    """Relative error of the weights [out, in], and of the outputs where the inputs' second moment is known."""
    delta = after - before
    errors = {"weight_error": float(delta.norm() / before.norm().clamp(min=1e-30))}
    statistics = inputs.statistics(path)
    if statistics is not None and "hessian" in statistics.needs:
        moment = statistics.second_moment.float()
        full = ((before @ moment) * before).sum().clamp(min=1e-30)
        errors["output_error"] = float(((delta @ moment) * delta).sum().div(full).clamp(min=0).sqrt())
    return errors
