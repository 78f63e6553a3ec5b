"""Cache: the engine's caches evict, encode or forget as the plan says, see `effbench.nn.infer.cache`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effbench.core.kinds import Cache
    from effbench.core.run import Run


def apply(run: Run, method: Cache) -> None:
    """Put a method that evicts where every cache of the inference plan finds it; slots are written by `attach`."""
    if method.evicts:
        run.infer.chain("cache_keep").append(method)
        run.infer.open(method, run)
