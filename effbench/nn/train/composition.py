"""What selections keep, beside what there was: sources, skills, lengths, topics, labels, and what was planted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from effbench.core.run import Composition, SelectionReport
from effbench.core.views import Example

if TYPE_CHECKING:
    from effbench.core.method import Method
    from effbench.core.run import Run

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
TOPICS = 16  # clusters of the pool
TRIES = 4  # of k-means, each from other centres, of which the best counts
SHOWN = 30  # sources and skills, at most
KINDS = ("in", "off", "duplicate", "noise")  # what may be planted, as `meta["planted"]` calls it


def report_selection(
    run: Run, method: Method, chosen: Sequence[Example], rest: Sequence[Example], turned: Sequence[Example] | None
) -> SelectionReport:
    """What a selection made of the pool.

    chosen, rest  what it keeps, and what it ranks behind, best first
    turned        what it judged and did not let in; None for one that ranks
    """
    pool = run.data.pool
    topics = dict(zip((example.id for example in pool), cluster(pool).tolist(), strict=True))
    labels = len(set(_tell(pool, "label")))
    coverage = {}
    for name in ("source", "skill"):
        if found := set(_tell(pool, name)):
            coverage[name] = len(found & set(_tell(chosen, name))) / len(found)
    report: SelectionReport = {
        "step": method.label,
        "seconds": 0.0,
        "examined": len(chosen) + len(rest) + len(turned or ()),
        "kept": _compose(chosen, pool, topics, labels),
        "pool": _compose(pool, pool, topics, labels),
        "coverage": coverage,
    }
    _add_planted(report, pool, chosen, rest, turned)
    return report


def _compose(examples: Sequence[Example], pool: Sequence[Example], topics: dict[str, int], labels: int) -> Composition:
    lengths = torch.tensor([float(len(example.ids)) for example in examples])
    quantiles = [lengths.quantile(q, interpolation="nearest") for q in QUANTILES] if len(lengths) else []
    made: Composition = {
        "examples": len(examples),
        "lengths": {str(q): float(value) for q, value in zip(QUANTILES, quantiles, strict=False)},
        "topics": entropy(topics[example.id] for example in examples if example.id in topics),
    }
    for key, name in (("sources", "source"), ("skills", "skill")):
        known = [value for value, _ in Counter(_tell(pool, name)).most_common(SHOWN)]
        counts = Counter(_tell(examples, name))
        if known:
            made[key] = {str(value): counts[value] / len(examples) for value in known}  # type: ignore[literal-required]
    if labels > 1:
        made["balance"] = entropy(_tell(examples, "label")) / math.log(labels)
    return made


def _tell(examples: Iterable[Example], name: str) -> list[Hashable]:
    """What sources say of examples under a name, where they say something that can be counted."""
    values = (example.meta.get(name) for example in examples)
    return [value for value in values if isinstance(value, (str, int)) and value != ""]


def entropy(values: Iterable[Hashable]) -> float:
    """Entropy of the distribution of values, in nats; 0 for none."""
    counts = Counter(values)
    total = sum(counts.values())
    return sum(count / total * math.log(total / count) for count in counts.values())


def _add_planted(
    report: SelectionReport,
    pool: Sequence[Example],
    chosen: Sequence[Example],
    rest: Sequence[Example],
    turned: Sequence[Example] | None,
) -> None:
    """How much is kept of what was planted, and how rightly examples went that went; nothing where none was planted."""
    planted = Counter(_tell(pool, "planted"))
    if not planted:
        return
    counts = Counter(_tell(chosen, "planted"))
    report["planted"] = {kind: counts[kind] / planted[kind] for kind in KINDS if planted[kind]}
    kept = {example.id for example in chosen}
    if turned is None:
        ranking = [*chosen, *rest]
        noise = sum(map(_is_noise, ranking))
        if noise:
            report["noise_last"] = sum(map(_is_noise, ranking[-noise:])) / noise
    else:
        report["turned_away"] = len(turned)
        if turned:
            right = sum(_is_noise(example) or not kept.isdisjoint(_list_near(example)) for example in turned)
            report["rightly"] = right / len(turned)
    pairs = {frozenset((example.id, other)) for example in pool for other in _list_near(example)}
    if pairs:
        report["pairs_kept"] = sum(pair <= kept for pair in pairs) / len(pairs)


def _is_noise(example: Example) -> bool:
    return bool(example.meta.get("planted") == "noise")


def _list_near(example: Example) -> Sequence[str]:
    """The names of the near-duplicates of an example that its source knows."""
    near: Sequence[str] = example.meta.get("near", ())
    return near


def cluster(examples: Sequence[Example]) -> Tensor:
    """[N] the topic of each example: k-means of how often it has each token, weighted by how few examples have it."""
    from scipy.sparse import csr_array
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfTransformer

    tokens = np.concatenate([np.array(example.ids, np.int32) for example in examples])
    owners = np.repeat(np.arange(len(examples), dtype=np.int32), [len(example.ids) for example in examples])
    counts = csr_array((np.ones(len(tokens)), (owners, tokens)))
    rows = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    different = len({frozenset(Counter(example.ids).items()) for example in examples})
    return torch.from_numpy(KMeans(min(TOPICS, different), n_init=TRIES, random_state=0).fit_predict(rows))
