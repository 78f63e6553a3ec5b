"""What the log says of selections, and passes over examples that a killed run has begun."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from effbench import probes
from effbench.checks import toy_run
from effbench.core.kinds import Select
from effbench.core.recipe import parse_step
from effbench.core.views import Example
from effbench.nn.run import ModelRun
from effbench.nn.train import passes
from effbench.nn.train.composition import TOPICS, cluster, entropy
from effbench.nn.train.examples import measure_losses


def example(place: int, length: int, **meta: Any) -> Example:
    return Example(str(place), tuple(range(1, length + 1)), meta=meta)


# Two sources, three skills; noise at 6 and 7, 1 nearly the same as 0, and 3 as 2.
POOL = [
    example(0, 4, source="a", skill="x", label="p", planted="", near=["1"]),
    example(1, 5, source="a", skill="x", label="p", planted="duplicate", near=["0"]),
    example(2, 6, source="a", skill="y", label="q", planted="in", near=["3"]),
    example(3, 7, source="a", skill="y", label="q", planted="duplicate", near=["2"]),
    example(4, 8, source="b", skill="z", label="r", planted="in", near=[]),
    example(5, 9, source="b", skill="z", label="", planted="off", near=[]),
    example(6, 10, source="b", skill="z", label="", planted="noise", near=[]),
    example(7, 11, source="b", skill="z", label="", planted="noise", near=[]),
]


@dataclasses.dataclass(frozen=True)
class Ranked(Select):
    first: tuple[int, ...] = ()

    def order(self, examples: Any, run: Any) -> list[int]:
        return [*self.first, *sorted({*range(len(examples))} - {*self.first})]


@dataclasses.dataclass(frozen=True)
class Judging(Select):
    away: tuple[int, ...] = ()

    def admit(self, examples: Any, run: Any) -> Any:
        return (place for place in range(len(examples)) if place not in self.away)


def select(method: Select) -> tuple[ModelRun, Any]:
    run = toy_run()
    run.data.pool = list(POOL)
    run.apply(method)
    return run, run.log.selections[-1]


def test_what_is_kept_stands_beside_what_there_was() -> None:
    run, report = select(Ranked(keep=0.5, first=(2, 4, 5, 6)))
    assert report["step"] == Ranked(keep=0.5, first=(2, 4, 5, 6)).label and report["seconds"] > 0
    assert report["examined"] == 8 and report["kept"]["examples"] == 4 and report["pool"]["examples"] == 8
    assert report["coverage"] == {"source": 1.0, "skill": pytest.approx(2 / 3)}
    assert report["kept"]["sources"] == {"a": 0.25, "b": 0.75} and report["pool"]["sources"] == {"a": 0.5, "b": 0.5}
    assert report["kept"]["skills"] == {"z": 0.75, "x": 0.0, "y": 0.25}
    assert report["kept"]["lengths"]["0.5"] in (8, 9) and report["pool"]["lengths"]["0.9"] == 10
    labels = math.log(3)
    assert report["kept"]["balance"] == pytest.approx(math.log(2) / labels)
    assert report["pool"]["balance"] == pytest.approx(entropy("ppqqr") / labels)
    assert report["planted"] == {"in": 1.0, "off": 1.0, "duplicate": 0.0, "noise": 0.5}
    assert report["noise_last"] == 0.5 and report["pairs_kept"] == 0.0  # ranked last are 3 and 7
    assert "turned_away" not in report and run.log.to_json()["selections"] == [report]


def test_of_one_that_judges_it_is_told_how_rightly() -> None:
    _, report = select(Judging(away=(1, 5, 7)))
    assert report["turned_away"] == 3 and report["rightly"] == pytest.approx(2 / 3)  # 5 is off, but neither of both
    assert report["pairs_kept"] == 0.5 and "noise_last" not in report and report["examined"] == 8
    _, report = select(Judging(keep=0.25, away=(0,)))
    assert report["turned_away"] == 1 and report["rightly"] == 1.0  # 1 is kept
    _, report = select(Judging(away=(2, 3)))
    assert report["rightly"] == 0.0  # they are near each other, and neither is kept


def test_topics_are_clusters_of_like_texts() -> None:
    groups = [list(range(10 * kind, 10 * kind + 10)) for kind in range(TOPICS)]
    texts = [Example(str(i), tuple(groups[i % TOPICS] + [200 + i])) for i in range(4 * TOPICS)]
    found = cluster(texts).tolist()
    assert all(found[i] == found[i % TOPICS] for i in range(len(texts))) and len(set(found)) == TOPICS
    assert entropy(found) == pytest.approx(math.log(TOPICS))
    run = toy_run()
    run.data.pool = texts
    run.apply(Ranked(keep=0.25, first=tuple(range(0, len(texts), TOPICS))))
    assert run.log.selections[0]["pool"]["topics"] == pytest.approx(math.log(TOPICS))
    assert run.log.selections[0]["kept"]["topics"] < math.log(TOPICS) - 0.1


def test_the_probe_tells_of_all_selections_what_they_cost_and_of_the_last_what_it_kept() -> None:
    run, first = select(Ranked(keep=0.5, first=(2, 4, 5, 6)))
    run.apply(Judging(away=(3,)))
    last = run.log.selections[-1]
    metrics = {name: metric.value for name, metric in probes.take("selection", run, {}).metrics.items()}
    assert metrics["select_seconds"] == pytest.approx(first["seconds"] + last["seconds"])
    assert metrics["select_s_per_1000"] == pytest.approx(1000 * metrics["select_seconds"] / 8)
    assert metrics["select_kept"] == 4 and metrics["select_turned_away"] == 1 and metrics["select_rightly"] == 1.0
    assert metrics["select_skills_covered"] == pytest.approx(len({"y", "z", "x"}) / 3)
    assert metrics["select_in_kept"] == 1.0 and metrics["select_forward_s_per_1000"] > 0
    assert {name for name in metrics if "length" in name} == {
        f"select_{part}_length_q{percent}" for part in ("kept", "pool") for percent in (10, 25, 50, 75, 90)
    }
    assert not probes.take("selection", toy_run(), {}).metrics


class Killed(Exception):
    """Stands for a kill."""


def test_a_pass_that_was_killed_goes_on_and_counts_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "EVERY", 0.0)
    monkeypatch.setattr("effbench.nn.train.examples.TOKENS", 128)  # four examples at a time
    seen: list[int] = []

    def score(run: ModelRun, stop: int | None) -> torch.Tensor:
        def progress(unit: str, done: int, total: int) -> None:
            seen.append(done)
            if done == stop:
                raise Killed

        run.folder, run.progress = tmp_path, progress
        return passes.score_losses(run, "losses", run.model, run.data.pool)

    with pytest.raises(Killed):
        score(toy_run(), 32)
    seen.clear()
    again = toy_run()
    found = score(again, None)
    assert torch.equal(found, measure_losses(again, again.model, again.data.pool))
    assert seen[0] == 32 and again.recovered > 0  # the batch at which it was killed is read again, none before it
    other = toy_run()
    other.data.pool = other.data.pool[1:]
    seen.clear()
    score(other, None)
    assert seen[0] == 4  # other examples are read from the first on


@pytest.mark.parametrize(
    "step", ["curriculum()", "anti_curriculum()", "d2_pruning()", "perplexity_filter(reference='reference')"]
)
def test_a_killed_selection_goes_on_to_the_same_choice(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy_run()
    whole.apply(parse_step(step))
    monkeypatch.setattr(passes, "EVERY", 0.0)
    monkeypatch.setattr("effbench.nn.train.examples.TOKENS", 128)
    killed, again = toy_run(), toy_run()
    killed.folder = again.folder = tmp_path

    def stop(unit: str, done: int, total: int) -> None:
        if done == 40:
            raise Killed

    killed.progress = stop
    with pytest.raises(Killed):
        killed.apply(parse_step(step))
    read: list[int] = []
    again.progress = lambda unit, done, total: read.append(done)
    again.apply(parse_step(step))
    assert [e.id for e in again.data.train] == [e.id for e in whole.data.train] and read[0] == 40
    assert again.log.selections[0]["seconds"] >= again.recovered > 0
