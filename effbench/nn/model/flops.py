"""Floating-point operations, counted while they run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from effbench.core.errors import Unsupported


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of `work`, which computes what it computes uncounted, bit for bit.

    Raises `Unsupported` when an op ran that nobody said how to count.
    """
    with (
        FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter,
        _Foreign(counter.flop_registry) as foreign,
    ):
        work()
    if foreign.ops:
        raise Unsupported(f"no FLOP formula is registered for {', '.join(sorted(foreign.ops))}")
    return int(counter.get_total_flops())


def _attend(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attend_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


def _multiply_groups(a: Any, b: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    """Of rows [S, K] each by the matrix of its group [E, K, N], or of columns [M, S] by rows [S, N] in groups."""
    rows, width = a
    return int(2 * rows * width * b[-1])


UNKNOWN = {  # to the counter: attention of processors, and experts
    torch.ops.aten._grouped_mm: _multiply_groups,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attend,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attend_backward,
}


# Namespaces of ops that torch's counter knows, or that compute next to nothing: sums over ranks are such.
FREE = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "_dtensor", "fsdp")


class _Foreign(TorchDispatchMode):
    """Collects ops that are not torch's own and have no FLOP formula: they would count as free.

    An op without a formula that has a kernel of its own runs it: the counter would take it apart into ops that round
    otherwise (SiLU's gradient is such).
    """

    def __init__(self, counted: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = counted
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if asked is not None:  # DTensor asks what an op would give: nothing is computed
            with _disable_current_modes(), asked:
                return func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if func.namespace not in FREE and packet not in self.counted:
            self.ops.add(str(packet))
        own = any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in ("CPU", "CUDA"))
        with _disable_current_modes() if own and packet not in self.counted else contextlib.nullcontext():
            return func(*args, **(kwargs or {}))
