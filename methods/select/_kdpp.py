"""Determinantal point processes of a fixed size: sampling (Kulesza & Taskar, 2012) and greedy MAP (Chen et al., 2018).

An L-ensemble gives a set Y of k examples a probability in proportion to det(L_Y).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from effbench.core.errors import Unsupported

LARGEST = 2**14  # examples: a kernel of all pairs has 2 GiB, and its eigenvalues take minutes


def sum_products(eigenvalues: Tensor, k: int) -> Tensor:
    """Logarithms [N + 1, k + 1] of elementary symmetric polynomials e_l of the first n eigenvalues (algorithm 7)."""
    logs = eigenvalues.log()
    table = torch.full((len(logs) + 1, k + 1), float("-inf"), dtype=torch.float64)
    table[:, 0] = 0.0
    for n, log in enumerate(logs):
        table[n + 1, 1:] = torch.logaddexp(table[n, 1:], log + table[n, :-1])
    return table


def draw_eigenvectors(eigenvalues: Tensor, k: int, chance: torch.Generator) -> list[int]:
    """Places of k eigenvalues, a set J with probability in proportion to their product (algorithm 8)."""
    table, logs = sum_products(eigenvalues, k), eigenvalues.log()
    chosen: list[int] = []
    for n in range(len(logs), 0, -1):
        left = k - len(chosen)
        if not left:
            break
        probability = (logs[n - 1] + table[n - 1, left - 1] - table[n, left]).exp()
        if torch.rand((), dtype=torch.float64, generator=chance) < probability:
            chosen.append(n - 1)
    return chosen


def eliminate(
    row: Callable[[int], Tensor], variances: Tensor, number: int, choose: Callable[[Tensor], int]
) -> tuple[list[int], Tensor]:
    """Take so many examples one by one, and condition the rest on each: their places, and what variances [N] are left.

    `row(i)` is row i of a kernel, `variances` its diagonal. `choose` is given what is left: det(L_Y + i) / det(L_Y),
    zero for those that are taken (incremental Cholesky, algorithm 1 of Chen et al.).
    """
    left, factor = variances.clone(), variances.new_zeros(number, len(variances))
    places: list[int] = []
    for step in range(number):
        place = choose(left)
        factor[step] = (row(place) - factor[:step, place] @ factor[:step]) / left[place].sqrt()
        left = (left - factor[step].square()).clamp(min=0)
        places.append(place)
        left[places] = 0.0
    return places, left


def sample(kernel: Tensor, k: int, chance: torch.Generator) -> list[int]:
    """k examples of a k-DPP with kernel L [N, N]: k eigenvectors, then the DPP that projects on them (algorithm 1).

    Raises `Unsupported` for a kernel of a rank below k, whose determinants are all zero.
    """
    eigenvalues, vectors = torch.linalg.eigh(kernel)
    rank = int((eigenvalues > _round_off(kernel, float(eigenvalues[-1]))).sum())
    _check_rank(rank, k, len(kernel))
    eigenvalues, vectors = eigenvalues[-rank:], vectors[:, -rank:]
    span = vectors[:, draw_eigenvectors(eigenvalues, k, chance)]
    places, _ = eliminate(
        lambda place: span @ span[place],
        span.square().sum(1),
        k,
        lambda left: int(torch.multinomial(left, 1, generator=chance)),
    )
    return places


def maximise(kernel: Tensor, k: int) -> list[int]:
    """k examples of a kernel L [N, N], each the one that makes det(L_Y) largest. Raises `Unsupported` as `sample`."""
    least = _round_off(kernel, float(kernel.diagonal().max()))

    taken = itertools.count()

    def choose(left: Tensor) -> int:
        place, rank = int(left.argmax()), next(taken)
        _check_rank(rank if left[place] <= least else k, k, len(kernel))
        return place

    return eliminate(kernel.__getitem__, kernel.diagonal(), k, choose)[0]


def rank(kernel: Tensor, k: int, draw: str, seed: int) -> Tensor:
    """Places [N]: k examples by `draw`, `sample` or `greedy`, and behind them the rest by the variance that is left.

    Where all are to be kept they stay as they are. Raises `Unsupported` for a kernel of too low a rank.
    """
    if k >= len(kernel):
        return torch.arange(len(kernel))
    chance = torch.Generator().manual_seed(seed)
    chosen = sample(kernel, k, chance) if draw == "sample" else maximise(kernel, k)
    given: Iterator[int] = iter(chosen)
    _, left = eliminate(kernel.__getitem__, kernel.diagonal(), k, lambda _: next(given))
    left[chosen] = float("-inf")
    return torch.cat([torch.tensor(chosen), left.argsort(descending=True, stable=True)[: len(kernel) - k]])


def build_kernel(embeddings: Tensor, kind: str, quality: Tensor | None = None) -> Tensor:
    """L_ij = q_i S_ij q_j [N, N] float64 (equation 24), `quality` q [N]; by default all alike.

    kind    of the similarities S: `cosine`, of a rank of the embeddings' width at most, or `gaussian`, of full rank
            where no two are alike, as wide as the median distance
    Raises `Unsupported` for too many examples.
    """
    if len(embeddings) > LARGEST:
        raise Unsupported(
            f"a determinantal process weighs all pairs of {len(embeddings)} examples, it takes {LARGEST}: "
            "put random_selection(keep=...) first"
        )
    rows = embeddings.double()
    similarity = rows @ rows.T
    if kind == "gaussian":
        lengths = rows.square().sum(1)
        squares = (lengths[:, None] + lengths - 2 * similarity).clamp(min=0).fill_diagonal_(0.0)
        some = squares[:: -(-len(squares) // 1000)]  # rows enough for a median
        typical = some[some > 0].median() if bool((some > 0).any()) else squares.new_ones(())
        similarity = (-squares / (2 * typical)).exp()
    return similarity if quality is None else quality.double()[:, None] * similarity * quality.double()


def _round_off(kernel: Tensor, largest: float) -> float:
    """What is zero up to rounding in a kernel whose largest number of the kind is this."""
    return largest * len(kernel) * torch.finfo(kernel.dtype).eps


def _check_rank(rank: int, k: int, number: int) -> None:
    if rank < k:
        raise Unsupported(
            f"of {number} examples only about {rank} are different enough for a determinantal process, {k} are to be "
            "kept: keep fewer, or put minhash_dedup() first"
        )
