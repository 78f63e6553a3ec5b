"""Hadamard matrices: +-1 entries, orthogonal rows.

A size 2^k * m is the Kronecker product of Sylvester's 2^k and one of the orders m constructed here: 1, Paley's
for the primes that give one (12, 20, 28, 36, 44, 60, 68, 76, 84, 108, 124, 140 and others), and 52, 116, 156 and
172 by Williamson. Up to 172 only 92 and 100 are missing among the multiples of 4.
"""

from functools import cache

import numpy as np  # not torch: a cached tensor made under a fake or meta device mode would stay fake

# First rows of four symmetric circulant matrices A, B, C, D of odd order n with A^2 + B^2 + C^2 + D^2 = 4n I,
# found by exhaustive search (43: among those constant on the orbits of a multiplier). Checked by the tests.
_WILLIAMSON = {
    13: ("++++-+--+-+++", "++---+--+---+", "++---+--+---+", "+---+-++-+---"),
    29: (
        "+++++++---+-++--++-+---++++++",
        "++++---+++-+--++--+-+++---+++",
        "++-+++---+--+-++-+--+---+++-+",
        "+-+-++---+--+-++-+--+---++-+-",
    ),
    39: (
        "+---+---+-++-++----++----++-++-+---+---",
        "++--+++-+--++-+----------+-++--+-+++--+",
        "+-++------++--+-+-++++-+-+--++------++-",
        "+---+--++++----+-+-++-+-+----++++--+---",
    ),
    43: (
        "+++++-++----+-++--++-++-++--++-+----++-++++",
        "+++---++--+-+-+-++--------++-+-+-+--++---++",
        "++-+-++++-+--+--+++--++--+++--+--+-++++-+-+",
        "+-++-----++++-+-+++-++++-+++-+-++++-----++-",
    ),
}


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def _characters(q: int) -> np.ndarray:
    """Quadratic character of i - j modulo the prime q, int8 [q, q]."""
    character = np.full(q, -1, dtype=np.int8)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    i = np.arange(q)
    matrix: np.ndarray = character[(i[:, None] - i) % q]
    return matrix


def _paley_one(q: int) -> np.ndarray:
    """Order q + 1, q = 3 mod 4."""
    matrix = np.ones((q + 1, q + 1), dtype=np.int8)
    matrix[1:, 1:] = _characters(q) + np.eye(q, dtype=np.int8)
    matrix[1:, 0] = -1
    return matrix


def _paley_two(q: int) -> np.ndarray:
    """Order 2 (q + 1), q = 1 mod 4: the symmetric conference matrix with its entries blown up to 2 x 2."""
    conference = np.ones((q + 1, q + 1), dtype=np.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _characters(q)
    sign = np.array([[1, 1], [1, -1]], dtype=np.int8)
    zero = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(conference, sign) + np.kron(np.eye(q + 1, dtype=np.int8), zero)


def _williamson(n: int) -> np.ndarray:
    """Order 4 n."""
    i = np.arange(n)
    turn = (i - i[:, None]) % n
    a, b, c, d = (np.array([1 if sign == "+" else -1 for sign in row], dtype=np.int8)[turn] for row in _WILLIAMSON[n])
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _base(m: int) -> np.ndarray | None:
    if m == 1:
        return np.ones((1, 1), dtype=np.int8)
    if m % 4:
        return None
    if _is_prime(m - 1):
        return _paley_one(m - 1)
    if m % 8 == 4 and _is_prime(m // 2 - 1):
        return _paley_two(m // 2 - 1)
    return _williamson(m // 4) if m // 4 in _WILLIAMSON else None


@cache
def factors(n: int) -> tuple[int, int]:
    """(2^k, m) with n = 2^k m and m the smallest constructed order; ValueError when there is none."""
    m = n // (n & -n)  # the odd part
    while n > 0 and n % m == 0:
        if _base(m) is not None:
            return n // m, m
        m *= 2
    raise ValueError(f"no Hadamard matrix of order {n} is constructed here")


@cache
def base(m: int) -> np.ndarray:
    """The constructed matrix of order m, int8 [m, m]."""
    matrix = _base(m)
    assert matrix is not None, m
    return matrix


def sylvester(n: int) -> np.ndarray:
    """The matrix of order n = 2^k, int8 [n, n]: entry (i, j) is the parity of i & j."""
    matrix = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
