"""Memory: what is fed in the place of the beginning of a prompt.

It is embeddings, each of which stands where a token stands, or the keys and values of tokens that were read with others
in front of them. The method in the slot `memory` of the plan makes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.views import Segments

if TYPE_CHECKING:
    from effbench.core.run import Run


@dataclasses.dataclass(frozen=True, eq=False)
class KeyValues:
    """Keys, rotated to where they stand, and values [Hkv, n, D] of each layer: of n tokens behind others that are gone.

    Tokens that follow have positions behind all of them.
    """

    keys: list[Tensor]
    values: list[Tensor]
    before: int  # tokens that stood in front, which nothing that follows sees

    @property
    def kept(self) -> int:
        """Tokens whose keys and values these are."""
        return self.keys[0].shape[1]


# Of a prompt: ids, embeddings [H] that stand in the place of one, and in front of all, where they are, keys and values.
Tokens = Sequence[int | Tensor | KeyValues]


def count_kept(tokens: Tokens) -> int:
    """Tokens that a query at the end sees; what stands in the place of one counts as one."""
    return sum(token.kept if isinstance(token, KeyValues) else 1 for token in tokens)


def count_places(tokens: Tokens) -> int:
    """Positions that tokens take."""
    return sum(token.before + token.kept if isinstance(token, KeyValues) else 1 for token in tokens)


def find_lead(encode: Callable[[str], list[int]], segments: Segments, ids: Sequence[int]) -> int:
    """How many of the tokens of a prompt stand before its question; all but the last where it has none.

    A token of both belongs to the question.
    """
    if not segments.question:
        return max(0, len(ids) - 1)
    lead = encode(dataclasses.replace(segments, question="").text().rstrip())
    same = next((i for i, pair in enumerate(zip(lead, ids, strict=False)) if pair[0] != pair[1]), len(lead))
    return min(same, len(ids) - 1)


def remember(run: Run, ids: list[int], lead: int) -> Tokens:
    """Tokens of a prompt, of which the first `lead` have become memory where the plan of the run says so.

    They stay as they are where memory would be no shorter. Raises `Unsupported` for a plan whose texts another model
    checks, which cannot read it.
    """
    method = run.infer.slot("memory")
    if method is None:
        return ids
    if run.infer.slot("decoder") is not None:
        raise Unsupported(f"{run.infer.owner('decoder')} has another model read the prompt, which has no {method}")
    made: Tokens | None = method.remember(ids[:lead], run)
    if made is None or count_kept(made) >= lead:
        return ids
    run.infer.act(method)
    return [*made, *ids[lead:]]
