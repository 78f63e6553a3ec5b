"""Swap: targeted linears are replaced by trainable ones and everything else is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from effbench.core.errors import Unsupported
from effbench.nn.model.linear import check_module, kept, replace

if TYPE_CHECKING:
    from effbench.core.kinds import Swap
    from effbench.core.run import Run


def apply(run: Run, method: Swap) -> None:
    """Replace what the method wants; it settles after a fit. Raises `Unsupported` where no linear is a target."""
    run.settle()
    run.model.requires_grad_(False)
    linears = run.linears()
    chosen = [path for path in linears if method.wants(path)]
    if not chosen:
        names = sorted({path.rpartition(".")[2] for path in linears})
        raise Unsupported(f"none of the linears is a target; they are called {', '.join(names)}")
    with torch.random.fork_rng(devices=[]):  # new parameters depend on the seed alone, not on what was drawn before
        torch.manual_seed(run.seed)
        for path in chosen:
            held = kept(linears[path]) is not None
            module = method.replace(linears[path])
            check_module(module, method, "replace", linears[path])
            replace(run.model, path, module.to(run.device))
            run.note_swap(module, method, held)
