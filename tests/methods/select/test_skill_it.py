"""Skill-It: mixtures against the published update, computed anew, and the graph that it learns."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy
import pytest
import torch
from toys_training import fit

from effbench.checks import Reading, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.views import Example
from effbench.methods.select.skill_it import SkillIt, divide, list_skills
from effbench.nn.run import ModelRun
from effbench.nn.train.examples import measure_losses

NOTE = "skill_it(rounds=4, graph='identity')"


def mixtures(graph: Any, losses: Any, eta: float, window: int) -> list[Any]:
    """Algorithm 1 of the paper in float64: the first mixture from the graph, each later one from the last losses."""
    found = []
    for t in range(len(losses) + 1):
        summed = numpy.sum(losses[max(0, t - window) : t], axis=0) if t else numpy.ones(graph.shape[1])
        weights = numpy.exp(eta * graph @ summed)
        found.append(weights / weights.sum())
    return found


def skilled(**sizes: int) -> ModelRun:
    """A run whose pool has so many examples of each skill, and whose target has both of the toy's."""
    run = toy_run()
    pool: list[Example] = []
    for skill, number in sizes.items():
        pool += [dataclasses.replace(e, meta={"skill": skill}) for e in run.data.pool[len(pool) : len(pool) + number]]
    run.data.pool = pool
    return run


def test_mixtures_follow_windowed_losses_from_the_same_start() -> None:
    run = skilled(even=20, odd=40)
    method = SkillIt(rounds=4, graph="identity")
    run.apply(method)
    read: list[tuple[int, ...]] = []
    run.train.chain("batch").append(Reading(read))
    state = run.state(method)
    fit(run, steps=24, batch_size=4, lr=1e-2)
    note = run.log.notes[NOTE]
    assert note["skills"] == ["even", "odd"] and note["graph"] == [[1.0, 0.0], [0.0, 1.0]]
    losses = numpy.array([state["losses"][number].double().numpy() for number in range(4)])
    assert abs(losses[0] - losses[-1]).max() > 0.01
    expected = mixtures(numpy.eye(2), losses[:3], 0.2, 3)
    assert numpy.allclose(note["mixtures"], expected, atol=1e-6)
    # Neither the same all the time, nor what multiplying up the weights of all rounds would give.
    cumulative = numpy.exp(0.2 * losses[:3].cumsum(0)[-1] + 0.2 * losses[:2].sum(0) + 0.2 * losses[0])
    assert abs(expected[-1] - cumulative / cumulative.sum()).max() > 1e-3 and abs(expected[-1] - 0.5).max() > 1e-3
    skills = {example.ids: example.meta["skill"] for example in run.data.train}
    for number in range(4):
        part = [skills[row] for row in read[number * 24 : (number + 1) * 24]]
        assert part.count("even") == pytest.approx(24 * expected[number][0], abs=1)


def test_skills_are_mixed_and_never_held_back_until_others_are_mastered() -> None:
    """A schedule that waits for prerequisites would read nothing of a skill at first; every share is above zero."""
    method = SkillIt(eta=0.5, window=2)
    graph = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    losses = [torch.tensor([3.0, 2.5, 2.0]), torch.tensor([1.0, 2.4, 2.0]), torch.tensor([0.2, 1.0, 1.9])]
    expected = mixtures(graph.double().numpy(), [each.double().numpy() for each in losses], 0.5, 2)
    for number in range(4):
        mixture = method.mix(graph, losses[:number])
        assert numpy.allclose(mixture.numpy(), expected[number], atol=1e-6) and mixture.min() > 0.05
    assert expected[3].argmax() != expected[0].argmax()


def test_an_edge_weighs_what_steps_on_one_skill_take_from_the_loss_of_another() -> None:
    run = toy_run()
    first, second = run.data.target[:2]  # of skills odd and even
    teaching = [dataclasses.replace(first, id=f"a{i}", meta={"skill": "teaches"}) for i in range(8)]
    other = [dataclasses.replace(e, meta={"skill": "other"}) for e in run.data.pool[:8]]
    run.data.pool, run.data.target = [*teaching, *other], [first, second]
    before = measure_losses(run, run.model, [second, first])  # even, odd
    method = SkillIt(probing_steps=10, probing_lr=3e-3)
    run.apply(method)
    state = run.state(method)
    assert state["skills"] == ["other", "teaches"]
    graph = state["graph"]
    assert graph.shape == (2, 2) and graph.min() >= 0
    alone = toy_run()
    alone.data.train = teaching
    fit(alone, steps=10, lr=3e-3, batch_size=8, schedule="cosine", warmup=0.03, clip=1.0, max_length=512)
    after = measure_losses(alone, alone.model, [second, first])
    assert torch.allclose(graph[1], ((before - after) / before).clamp(min=0), atol=1e-4)
    assert graph[1, 1] > 0.3 and graph[1, 1] > graph[0, 1] + 0.2
    assert not run.log.fits and torch.equal(measure_losses(run, run.model, [second, first]), before)


def test_shares_become_whole_numbers() -> None:
    assert divide(torch.tensor([0.5, 0.3, 0.2]), 7) == [4, 2, 1]
    assert divide(torch.tensor([1.0, 0.0]), 5) == [5, 0]
    assert sum(divide(torch.softmax(torch.randn(9), 0), 1000)) == 1000
    assert math.isclose(divide(torch.tensor([1.0, 1.0]), 2)[0], 1)


@pytest.mark.parametrize(
    ("skills", "names"),
    [
        ((0, 1, 2), ["0", "1", "2"]),
        ((0.5, "a"), ["0.5", "a"]),
        (("", "a"), ["a"]),
        ((None, 0), ["0"]),
        ((False, True), ["False", "True"]),
        ((3, "3"), ["3"]),
    ],
)
def test_skills_may_be_called_by_numbers(skills: tuple[Any, ...], names: list[str]) -> None:
    run = toy_run()
    for part in ("pool", "target"):
        examples = enumerate(getattr(run.data, part))
        called = [dataclasses.replace(each, meta={"skill": skills[i % len(skills)]}) for i, each in examples]
        setattr(run.data, part, called)
    assert list_skills(run.data.pool) == names
    method = SkillIt(probing_steps=1, rounds=1)
    run.apply(method)
    assert run.state(method)["skills"] == names and run.state(method)["graph"].shape == (len(names), len(names))


@pytest.mark.parametrize("skill", [["a"], {"a": 1}])
def test_a_skill_that_is_a_list_is_unsupported(skill: Any) -> None:
    run = toy_run()
    run.data.pool = [dataclasses.replace(example, meta={"skill": skill}) for example in run.data.pool]
    with pytest.raises(Unsupported, match=r"example \S+: its skill is a (list|dict), and must be text or a number"):
        run.apply(SkillIt())


def test_examples_of_no_skill_are_unsupported_and_no_target_is_wrong_usage() -> None:
    run = toy_run()
    run.data.pool = [dataclasses.replace(example, meta={}) for example in run.data.pool]
    with pytest.raises(Unsupported, match="does not say of what skill"):
        run.apply(SkillIt())
    run = toy_run()
    run.data.target = []
    with pytest.raises(Usage, match="has no target part"):
        run.apply(SkillIt())
    run.data.target = [dataclasses.replace(example, meta={}) for example in run.data.pool]
    with pytest.raises(Usage, match="has no target part whose skills are known"):
        run.apply(SkillIt())
