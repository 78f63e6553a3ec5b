"""What torchao 0.7, the last with delayed scaling, makes of a linear in float8 over eight steps.

The folder of that version is the argument: it stands in front of the torchao of the other scripts. Its own
`sync_float8_amax_and_scale_history` rolls copies of the histories, and so remembers one step, whatever `history_len`
is; here the functions that it calls roll histories that stay.
"""

from __future__ import annotations

import sys

sys.path.insert(0, sys.argv[1])

import torch
from golden import write
from torch import Tensor, nn
from torchao.float8.config import CastConfig, DelayedScalingConfig, Float8LinearConfig, ScalingType
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_linear_utils import _update_history_stack
from torchao.float8.float8_utils import amax_history_to_scale_stack

OUT, IN, HISTORY = 24, 40, 3
SIZES = (1.0, 3.0, 0.5, 0.1, 0.1, 0.1, 20.0, 0.2)  # of inputs and gradients, step by step: a history forgets


def tensors() -> dict[str, Tensor]:
    """Inputs, weights and gradients of each step, and what comes of them; scales begin at 1, without a look ahead."""
    generator = torch.Generator().manual_seed(0)
    delayed = CastConfig(scaling_type=ScalingType.DELAYED)
    config = Float8LinearConfig(
        cast_config_input=delayed,
        cast_config_weight=delayed,
        cast_config_grad_output=delayed,
        delayed_scaling_config=DelayedScalingConfig(history_len=HISTORY),
        emulate=True,
    )
    model = nn.Sequential(Float8Linear.from_float(nn.Linear(IN, OUT, bias=False), config))
    layer = model[0]
    layer.is_amax_initialized = True
    parts = {"input": torch.float8_e4m3fn, "weight": torch.float8_e4m3fn, "grad_output": torch.float8_e5m2}
    histories = {name: torch.zeros(1, HISTORY) for name in parts}
    steps: dict[str, list[Tensor]] = {name: [] for name in ("x", "weight", "g", "y", "x.grad", "weight.grad", "scales")}
    for size in SIZES:
        x = (size * torch.randn(7, IN, generator=generator)).requires_grad_()
        g = size * 1e-2 * torch.randn(7, OUT, generator=generator)
        layer.weight.data = 0.3 * torch.randn(OUT, IN, generator=generator)
        layer.weight.grad = None
        scales = torch.stack([getattr(layer, f"fp8_scale_{name}") for name in parts]).flatten()
        y = model(x)
        y.backward(g)
        found = (x, layer.weight, g, y, x.grad, layer.weight.grad, scales)
        for name, tensor in zip(steps, found, strict=True):
            steps[name].append(tensor.detach().clone())
        for name, kind in parts.items():
            _update_history_stack(getattr(layer, f"fp8_amax_{name}").view(1, 1), histories[name])
            new = amax_history_to_scale_stack(histories[name], kind, "max")
            getattr(layer, f"fp8_scale_{name}").copy_(new.view(()))
    return {name: torch.stack(values) for name, values in steps.items()}


if __name__ == "__main__":
    write("float8_delayed", __file__, ["torchao"], tensors(), history=HISTORY, seed=0)
