"""From a difference to a word: better, worse, faster, slower, smaller, larger, less, more or indistinguishable."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from effbench.core.errors import Usage
from effbench.core.usage import one_of
from effbench.report.differences import LEVEL
from effbench.report.metrics import find_definition, get_unit
from effbench.stats.paired import Estimate

Word = Literal["better", "worse", "faster", "slower", "smaller", "larger", "less", "more", "indistinguishable"]
RowWord = Literal["failed", "missing", "incomparable"]  # of a whole row
WORDS: tuple[str, ...] = tuple(
    word for word in (*get_args(Word), *get_args(RowWord)) if word != "indistinguishable"
)  # what `fail_on` may name
QUALITY = ("perplexity", "accuracy", "distance", "quality")  # kinds of metrics
TIMES = ("s", "ms", "µs", "tokens/s")  # units
SIZES = ("bytes", "bits")


@dataclasses.dataclass(frozen=True)
class Effects:
    """The smallest differences that count, however sure they are."""

    relative: float = 2.0  # percent of speeds, sizes, energy and costs
    quality: float = 0.5  # points of shares, percent of perplexities, hundredths of nats and bits

    def reach(self, metric: str) -> float:
        """The smallest effect on the scale on which the metric is tested."""
        definition = find_definition(metric)
        if definition is not None and definition.family in QUALITY:
            return math.log1p(self.quality / 100) if definition.family == "perplexity" else self.quality / 100
        return math.log1p(self.relative / 100)


def judge(metric: str, test: Estimate, p: float | None, effects: Effects) -> Word:
    """The word for a difference: `p` is that after correction for many, None for what was counted and not sampled."""
    sure = p is None or p <= LEVEL
    if test.value == 0 or not sure or abs(test.value) < effects.reach(metric) * (1 - 1e-9):
        return "indistinguishable"
    definition = find_definition(metric)
    assert definition is not None, metric
    good, bad = _name_directions(metric, definition.family)
    return good if (test.value > 0) == (definition.better == "higher") else bad


def _name_directions(metric: str, family: str) -> tuple[Word, Word]:
    """The words for a change to the better and to the worse."""
    if family in QUALITY:
        return "better", "worse"
    if family == "speed" or get_unit(metric) in TIMES:
        return "faster", "slower"
    if family == "size" or get_unit(metric) in SIZES:
        return "smaller", "larger"
    return "less", "more"


def read_words(text: str | None) -> frozenset[str]:
    """The verdicts that `fail_on` names. Raises `Usage` for what is none."""
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    if text is not None and not words:
        raise Usage(f"fail_on={text}: name verdicts, such as fail_on=worse,slower")
    for word in words:
        one_of("fail_on", word, WORDS)
    return frozenset(words)
