"""Paged AdamW: optimizer states leave the device's memory when that is full (QLoRA, Dettmers et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from effbench import ops
from effbench.core.errors import Unavailable
from effbench.core.kinds import Train
from effbench.core.run import Run
from effbench.kernels.adamw8bit.reference import BLOCK

SMALLEST = 4096  # numbers of a tensor whose states are stored in 8 bits


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in 8 bits, block by block; those of small tensors are float32 (arXiv:2110.02861)."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8})
        self.register_load_state_dict_post_hook(_restore_types)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients that there are."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state, packed = self.state[parameter], parameter.numel() >= SMALLEST
        if not state:
            state["step"] = 0
            for name in ("m", "v"):
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8 if packed else torch.float32)
                if packed:  # any code is zero while the factors are
                    state[f"{name}_absmax"] = parameter.new_zeros(-(-parameter.numel() // BLOCK), dtype=torch.float32)
        state["step"] += 1
        settings = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        if packed:
            ops.load("adamw8bit")(parameter, gradient, **state, **settings)
        else:
            before = torch.tensor(state["step"] - 1.0)
            moments = [state["m"]], [state["v"]]
            adamw([parameter], [gradient], *moments, [], [before], amsgrad=False, maximize=False, **settings)


def _restore_types(optimizer: torch.optim.Optimizer) -> None:
    """Loading brings what optimizers hold to the type of the parameters; codes are exact in each."""
    for state in optimizer.state.values():
        for name in ("m", "v"):
            if f"{name}_absmax" in state:
                state[name], state[f"{name}_absmax"] = state[name].byte(), state[f"{name}_absmax"].float()


@dataclass(frozen=True)
class PagedAdamW(Train):
    """AdamW whose arithmetic paging leaves as it is; on a processor there is nothing to page, and the record says so.

    On a GPU bitsandbytes' own runs. With 8 bits the states are stored in dynamic quantization, 256 to a block.
    """

    paper = "arXiv:2305.14314"
    published = (
        "nf4(double_quant=True), lora(rank=64, alpha=16, dropout=0.1), paged_adamw(), bf16(), "
        "fit(lr=0.0002, batch_size=16, schedule='constant', warmup=0.0, clip=0.3)"
    )
    caveats = ("after a resume states on a GPU stay there until the fit ends",)
    type = "optimizer states"
    weight_update = "training"
    trials = ({"bits": 8}, {})

    bits: Literal[32, 8] = 32  # of each number of the states

    def optimizer(self, groups: list[dict[str, Any]], run: Run) -> Any:
        if run.device.type != "cuda":
            run.log.notes["paging"] = f"none on {run.device.type}: states of the optimizer stay where they are"
            return torch.optim.AdamW(groups) if self.bits == 32 else AdamW8bit(groups)
        try:
            from bitsandbytes import optim
        except ImportError as error:
            raise Unavailable(
                f"paging on a GPU is bitsandbytes', which cannot be imported ({error}): pip install 'effbench[peers]'"
            ) from None
        return (optim.PagedAdamW32bit if self.bits == 32 else optim.PagedAdamW8bit)(groups)
