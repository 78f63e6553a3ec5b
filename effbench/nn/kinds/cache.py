"""Cache: the engine's caches evict by `keep`, and hold what `encode` makes of keys and values (the slot `encoder`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effbench.core.kinds import Cache
    from effbench.core.run import Run


def apply(run: Run, method: Cache) -> None:
    """Put the method where every cache of the inference plan finds it, see `effbench.nn.infer.cache`."""
    if method.evicts:
        run.infer.chain("cache_keep").append(method)
