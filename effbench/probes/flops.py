"""Floating-point operations, counted while they run, beside the 2d rule of thumb."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from effbench.core.errors import Unsupported
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.linear import top_linears
from effbench.probes import Reading
from effbench.probes.inputs import random_ids
from effbench.probes.memory import elements

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun


CONTEXT = 128  # where the settings do not say


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`score_flops_per_token_c<context>`, `decode_flops_per_token_c<context>` and `flops_2d`."""
    engine, reading = open_engine(run), Reading()
    context = min(settings.get("flops_context") or CONTEXT, engine.max_length - 1)
    ids = random_ids(run, 1, context)
    with torch.inference_mode():
        scoring = counted(lambda: engine.logits(ids))
        state = engine.prefill(ids)
        decoding = counted(lambda: engine.decode(state))
    counter = "torch FlopCounterMode, a multiply-add is 2, attention counted as if unmasked"
    reading.add(f"score_flops_per_token_c{context}", scoring / context, f"{counter}; {context} tokens at once")
    reading.add(f"decode_flops_per_token_c{context}", decoding, f"{counter}; one token after {context}")
    weights = sum(elements(module) for _, module in top_linears(run.model))
    reading.add("flops_2d", 2 * weights, "2 x entries of all linears with the head, as if dense, per token")
    return reading


def counted(work: Callable[[], object]) -> int:
    """FLOPs of `work`. Raises `Unsupported` when an op ran that nobody said how to count."""
    cpu_attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter, _Foreign() as foreign:
        work()
    if foreign.ops:
        raise Unsupported(f"no FLOP formula is registered for {', '.join(sorted(foreign.ops))}")
    return int(counter.get_total_flops())


def _attention(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


class _Foreign(TorchDispatchMode):
    """Collects ops that are not torch's own and have no FLOP formula: they would count as free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if func.namespace not in ("aten", "prim", "prims") and packet not in flop_registry:
            self.ops.add(str(packet))
        return func(*args, **(kwargs or {}))
