"""Weighted k-means of the rows of a matrix, each by itself: in one dimension, and so nearly the best there is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FINE = 96  # clusters of the fine quantizer whose ends are the positions that the search chooses from
NEAR = 4  # values by which it then tries to move each end
ROWS = 64  # rows searched at a time


class Sums:
    """Weighted sums over any stretch of rows of ascending values."""

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        """`values` [rows, n] ascending in each row, `weights` [rows, n] with some weight in each row; float64."""
        self.values = values
        self.origin = (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        terms = torch.stack([weights, weights * (values - self.origin)])  # centred: differences stay accurate
        self.mass, self.first = nn.functional.pad(terms.cumsum(2), (1, 0))  # [rows, n + 1] each

    def gain(self, starts: Tensor, stops: Tensor) -> Tensor:
        """[rows, starts, stops]: by how much a cluster of values[start:stop] lowers the inertia."""
        mass, first = (
            total.gather(1, stops).unsqueeze(1) - total.gather(1, starts).unsqueeze(2)
            for total in (self.mass, self.first)
        )
        backwards = mass < 0
        return first.square_().div_(mass.masked_fill_(mass == 0, 1)).masked_fill_(backwards, -torch.inf)

    def means(self, starts: Tensor, stops: Tensor, otherwise: Tensor) -> Tensor:
        """Weighted means of values[start:stop], all [rows, k]; `otherwise` where there is no weight."""
        mass, first = (total.gather(1, stops) - total.gather(1, starts) for total in (self.mass, self.first))
        return torch.where(mass > 0, first / mass + self.origin, otherwise)

    def centres(self, ends: Tensor) -> Tensor:
        """Means [rows, k] of the clusters between the inner ends [rows, k - 1], ascending."""
        n = self.values.shape[1]
        starts, stops = nn.functional.pad(ends, (1, 0)), nn.functional.pad(ends, (0, 1), value=n)
        return self.means(starts, stops, self.values.gather(1, starts.clamp(max=n - 1))).sort(1).values

    def ends(self, centres: Tensor) -> Tensor:
        """Inner ends [rows, k - 1] of the clusters of the values nearest to each of the centres [rows, k]."""
        return torch.searchsorted(self.values, (centres[:, 1:] + centres[:, :-1]) / 2, right=True)


def lloyd(sums: Sums, centres: Tensor, fixed: Tensor | None = None, iterations: int = 300) -> Tensor:
    """Weighted k-means of every row from given centres [rows, k], until nothing moves; ascending, float64.

    A centre stays where it is if no weight is nearest to it, or if it is `fixed` (bool [rows, k]).
    """
    n = sums.values.shape[1]
    for _ in range(iterations):
        ends = sums.ends(centres)
        moved = sums.means(nn.functional.pad(ends, (1, 0)), nn.functional.pad(ends, (0, 1), value=n), centres)
        if fixed is not None:
            moved = torch.where(fixed, centres, moved)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def best_ends(sums: Sums, positions: Sequence[Tensor]) -> Tensor:
    """The best inner ends [rows, k - 1] of k clusters, end c being one of positions[c] [rows, ascending].

    In one dimension clusters are stretches of the sorted values, so dynamic programming over their ends finds the
    best of all choices (Wang and Song, 2011).
    """
    # total[c] is the most that clusters 0..c can gain if cluster c ends at each of its positions:
    # total_c(j) = max over i of total_(c-1)(i) + gain(i, j), with the i that attains it kept in `choices`.
    rows, n = sums.values.shape
    origin, last = (torch.full((rows, 1), end, device=sums.values.device) for end in (0, n))
    total, choices = sums.gain(origin, positions[0]).squeeze(1), []
    before, shared = positions[0], None
    for stops in (*positions[1:], last):
        if not (stops is before is shared):  # ends that choose from the same positions share one table
            table, shared = sums.gain(before, stops), stops if stops is before else None
        total, choice = (total.unsqueeze(2) + table).max(1)
        choices.append(choice)
        before = stops
    # Back from the last end, each choice names the end before it.
    place = torch.zeros_like(last)
    ends = []
    for stops, choice in zip(reversed(positions), reversed(choices), strict=True):
        place = choice.gather(1, place)
        ends.append(stops.gather(1, place))
    return torch.cat(ends[::-1], 1)


def best_centres(sums: Sums, weights: Tensor, k: int) -> Tensor:
    """Centres [rows, k] of the best weighted k-means of every row, or one within a fraction of a percent of it.

    First the best ends among those of a fine quantizer with 96 levels, spaced by the cube root of the density
    (Panter and Dite, 1951); then, until nothing moves, the best within 4 values of the ends so far.
    """
    values, n = sums.values, sums.values.shape[1]
    # Step 1, a fine quantizer: the density at a value is its weight over the distance to its neighbours, and levels
    # spaced by its cube root are the best for many levels.
    gap = nn.functional.pad(values.diff(), (1, 1))
    density = (weights * (gap[:, 1:] + gap[:, :-1]).square()).pow(1 / 3).cumsum(1)
    share = torch.arange(1, FINE, device=values.device) / FINE
    fine = lloyd(sums, sums.centres(torch.searchsorted(density, share * density[:, -1:]) + 1), iterations=10)
    # Step 2, the best k - 1 of its ends, the same positions for all of them.
    centres = lloyd(sums, sums.centres(best_ends(sums, [sums.ends(fine)] * (k - 1))))
    # Step 3, every end may move by a few values; repeated until none does.
    near = torch.arange(-NEAR, NEAR + 1, device=values.device)
    for _ in range(16):
        windows = [(end.unsqueeze(1) + near).clamp(0, n) for end in sums.ends(centres).unbind(1)]
        moved = lloyd(sums, sums.centres(best_ends(sums, windows)))
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def kmeans(weight: Tensor, importance: Tensor, k: int, zero: bool = False) -> Tensor:
    """Centres [rows, k], ascending, of every row of `weight` [rows, n] weighted by `importance` [rows, n].

    With `zero`, one of the centres is 0.
    """
    # A row whose weights have no importance at all is clustered as if all had the same.
    importance = importance.double() + (importance.sum(1, keepdim=True) == 0)
    values, order = weight.double().sort(1)
    importance = (importance / importance.amax(1, keepdim=True)).gather(1, order)
    tables = []
    for part, by in zip(values.split(ROWS), importance.split(ROWS), strict=True):
        sums = Sums(part, by)
        centres = best_centres(sums, by, k - zero)
        if zero:
            centres, place = nn.functional.pad(centres, (0, 1)).sort(1)
            centres = lloyd(sums, centres, place == k - 1)
        tables.append(centres)
    return torch.cat(tables)
