"""Fronts of Pareto: which rows no other beats, how sure that is, and which cannot be left out for certain.

Two questions are answered of each row, because they are two. How likely is it on the front, as far as the data say? And
would data like these be seen if it were? The first is the share of draws in which nothing dominates it. It splits
between rows that are alike: of ten equal ones each has about a tenth, and none may be excluded for that. So a row is
excluded by a test of its own: only where some other row is better in everything, by more than the best of so many
others would be by chance.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from effbench.stats.paired import Floats

LEVEL = 0.05  # how often a row of the true front may be excluded
ROBUST = 0.9  # probability from which on a row is of the robust front
DRAWS = 3999

Status = Literal["robust", "open", "excluded"]


class Membership(msgspec.Struct, frozen=True, gc=False):
    """What is known of a row and the front."""

    drawn: bool  # on the front of the values as they are
    probability: float  # of being on the true one
    excluded: bool  # dominated beyond chance

    @property
    def status(self) -> Status:
        """Whether it is of the robust front, excluded from any, or cannot be."""
        return "excluded" if self.excluded else "robust" if self.probability >= ROBUST else "open"


def find_front(values: Floats) -> NDArray[np.bool_]:
    """Which rows are on the front, [..., rows], of values [aims, ..., rows], of which less is better.

    A row is dominated where another is nowhere worse and somewhere better. Equal rows do not dominate each other.
    """
    front = np.empty(values.shape[1:], dtype=bool)
    for row in range(values.shape[-1]):
        worse = values[..., row : row + 1] < values
        better = values[..., row : row + 1] > values
        front[..., row] = ~(~_any_aim(worse) & _any_aim(better)).any(axis=-1)
    return front


def judge_rows(values: Floats, draws: Floats) -> list[Membership]:
    """The membership of each row: `values` are [aims, rows], less is better, and `draws` of them [aims, draws, rows].

    What is equal in all draws is known exactly. Rows must be drawn together where their noise is common.
    """
    drawn, chances = find_front(values), find_front(draws).mean(axis=0)
    return [
        Membership(bool(drawn[row]), float(chances[row]), not drawn[row] and _is_excluded(values, draws, row))
        for row in range(values.shape[1])
    ]


def _is_excluded(values: Floats, draws: Floats, row: int) -> bool:
    """Whether a row is dominated beyond chance.

    Were it on the front, it would truly be better than each other row in something. So another row's case is as weak as
    the weakest of its aims, and the strongest case of all is compared with what the strongest would be by chance
    (Westfall and Young's least p), over all rows that could dominate it.
    """
    others = np.arange(values.shape[1]) != row
    gaps = values[:, row : row + 1] - values[:, others]  # by how much the others are better, [aims, others]
    centred = draws[..., row : row + 1] - draws[..., others] - gaps[:, None]
    noisy = centred.max(axis=1) > centred.min(axis=1)
    able = ~_any_aim(~noisy & (gaps < 0)) & _any_aim(noisy | (gaps > 0))
    if (able & ~_any_aim(noisy)).any():
        return True  # without any noise
    cases = noisy & able
    if not cases.any():
        return False
    count = draws.shape[1] + 1
    chances = (1 + np.count_nonzero(centred >= gaps[:, None], axis=1)) / count
    strongest = float(np.where(noisy, chances, 0.0).max(axis=0)[able].min())
    if strongest >= LEVEL or strongest * np.count_nonzero(cases) < LEVEL:  # without correction, and with Bonferroni's
        return strongest < LEVEL
    by_case = centred.transpose(0, 2, 1)[cases]  # [cases, draws]
    rank = max(1, int(strongest * (count - 1)))  # draws of a case that are as strong as that
    bounds = np.partition(by_case, -rank, axis=1)[:, -rank, None]
    return bool((1 + np.count_nonzero((by_case >= bounds).any(axis=0))) / count < LEVEL)


def _any_aim(holds: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(holds.any(axis=0))
