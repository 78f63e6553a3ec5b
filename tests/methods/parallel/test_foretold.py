"""What one process of each engine holds is foretold by rehearsing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import divided
import pytest
import sharded
import torch
from ranks import Case, prepare

from effbench.core.recipe import parse
from effbench.nn.rehearse import Batch, Held, rehearse
from effbench.nn.rehearse import Case as Rehearsed

FIT = "fit(steps=7, batch_size=8, max_length=32)"
CASES = {engine: Case(engine) for engine in sharded.COST} | divided.COST


def foretell(engine: str, case: Case, length: int, process: int | None) -> Held:
    """What a process would hold of the model of a case, whose rows are so long."""
    run = prepare(case, 1)
    config, single = run.model.config, torch.float32
    steps = parse(f"{engine}, {FIT}").steps
    return rehearse(Rehearsed(run.source, config, single, single, steps, Batch(8, length), Batch(1, 1)), process)


@pytest.mark.slow
@pytest.mark.parametrize("engine", CASES)
def test_each_rank_is_foretold(engine: str, start: Callable[..., Any]) -> None:
    program = divided.PROGRAM if engine in divided.COST else sharded.PROGRAM
    for process, told in enumerate(start(program, 2)):
        cost = told["costs"][engine]
        held = foretell(engine, CASES[engine], cost["length"], process)
        assert held.weights == cost["parameter_bytes"] + cost["buffer_bytes"]
        assert held.gradients == cost["gradient_bytes"] and held.optimizer == cost["optimizer_bytes"]
        assert held.gathered == cost.get("gathered_bytes", 0)
        # Rows that are filled up bring a mask; and which experts tokens are sent to is not known, but on the whole.
        assert held.activations == pytest.approx(cost["activation_bytes"], rel=0.1 if engine == "ep()" else 0.02)


@pytest.mark.parametrize(("engine", "fullest"), [("fsdp(stage=1)", 0), ("pp()", 1), ("tp()", 0)])
def test_without_a_process_it_is_the_one_that_holds_most(engine: str, fullest: int) -> None:
    case = CASES[engine]
    each = [foretell(engine, case, 32, process) for process in (0, 1)]
    assert each[fullest].training == max(held.training for held in each)
    assert foretell(engine, case, 32, None) == each[fullest]
