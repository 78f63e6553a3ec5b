"""Places in a model where a `Swap` may put a module of its own."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from effbench.core.views import Site, SiteKind
from effbench.nn.model.blocks import Blocks

if TYPE_CHECKING:
    from effbench.core.run import Run


def find_sites(run: Run, kinds: Iterable[SiteKind]) -> list[Site]:
    """The places of these kinds that methods may touch, in the order of the model."""
    view = Blocks(run.model)
    found = {"linear": _linears, "attention": _parts, "mlp": _parts, "embedding": _embedding, "norm": _norms}
    places = [(path, kind, role, block) for kind in kinds for path, role, block in found[kind](view, kind)]
    return [
        Site(path, kind, role, block, zlib.crc32(f"{run.seed}/{path}".encode()))
        for path, kind, role, block in places
        if run.targeted(path)
    ]


def _linears(view: Blocks, kind: str) -> Iterator[tuple[str, str, int | None]]:
    for path, _ in view.linears():
        yield path, view.role(path), view.number(path)


def _parts(view: Blocks, kind: str) -> Iterator[tuple[str, str, int | None]]:
    name = view.names.attention if kind == "attention" else view.names.mlp
    for block in range(len(view) if name else 0):  # OPT's blocks hold their MLP loose
        yield view.path(block, name), kind, block


def _norms(view: Blocks, kind: str) -> Iterator[tuple[str, str, int | None]]:
    """Those of the blocks and, where there is one, the last."""
    for block in range(len(view)):
        yield from ((view.path(block, name), kind, block) for name in view.names.norms)
    if view.names.norm in dict(view.model.named_modules()):
        yield view.names.norm, kind, None


def _embedding(view: Blocks, kind: str) -> Iterator[tuple[str, str, int | None]]:
    yield view.names.embedding, kind, None
