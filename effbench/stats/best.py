"""What the best of several settings can be expected to reach."""

from __future__ import annotations

from collections.abc import Sequence


def expect_least(values: Sequence[float], draws: int) -> float:
    """The expected least of so many values drawn from these, with replacement (Dodge et al., EMNLP 2019, eq. 1)."""
    n = len(values)
    chances = [((n - i) / n) ** draws - ((n - i - 1) / n) ** draws for i in range(n)]  # that the i-th is the least
    return sum(value * chance for value, chance in zip(sorted(values), chances, strict=True))
