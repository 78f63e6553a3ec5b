"""A run's own state: its log, what steps keep, what probes share."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effbench.checks import toy_run
from effbench.core.kinds import Train
from effbench.core.run import RunLog, TrainPlan

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
keys = st.text() | st.integers() | st.tuples(st.integers(), st.text()) | st.none()
values = st.recursive(
    scalars | st.binary() | st.sets(st.integers()) | st.builds(object),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner),
    max_leaves=10,
)


@given(st.dictionaries(keys, values))
def test_whatever_a_method_notes_can_be_written(notes):
    entries = RunLog(notes=notes).to_json()
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries


def test_numbers_of_torch_are_noted_as_numbers():
    log = RunLog(
        layers={"a": {"weight_error": torch.tensor(0.5).double().numpy()[()]}}, notes={"n": torch.tensor(3).numpy()[()]}
    )
    assert log.to_json() == {"steps": [], "layers": {"a": {"weight_error": 0.5}}, "notes": {"n": 3}}


def test_what_nothing_was_written_to_is_left_out():
    assert RunLog().to_json() == {"steps": []}
    assert RunLog(calibration_sequences=2, calibration_tokens=8, densified=["a"]).to_json() == {
        "steps": [],
        "calibration_sequences": 2,
        "calibration_tokens": 8,
        "densified": ["a"],
    }


@dataclasses.dataclass(frozen=True)
class Counted(Train):
    """Keeps a count between steps."""

    def on_step(self, run):
        run.state(self)["steps"] = run.state(self).get("steps", 0) + 1


def test_equal_steps_of_a_recipe_keep_a_state_each():
    first, second = Counted(), Counted()
    assert first == second
    run = toy_run()
    run.state(first)["steps"] = 1
    assert run.state(second) == {} and run.state(first) == {"steps": 1}
    assert toy_run().state(first) == {}, "gone with the run"


def test_what_probes_share_is_computed_once_and_forgotten_when_the_model_changes():
    run = toy_run()
    calls: list[str] = []
    for key in ("a", "a", "b"):
        assert run.share(key, lambda key=key: calls.append(key) or len(calls)) == {"a": 1, "b": 2}[key]
    assert calls == ["a", "b"]
    run.apply(Counted())
    assert run.share("a", lambda: 7) == 7


def test_a_lasting_plan_serves_until_the_end_and_is_closed_then_whatever_happens():
    plan, undone = TrainPlan(), []
    plan.claim("precision", "half", Train)
    plan.on_exit(lambda: undone.append(1))
    with pytest.raises(ZeroDivisionError), plan.lasting():
        plan.close()
        assert plan.slot("precision") == "half" and not undone
        raise ZeroDivisionError
    assert plan.empty and undone == [1]
