"""What kinds promise, and that a run, a service and a method depend on no more than what they are made of."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import grimp
import pytest
import torch

from effbench.checks import toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.kinds import KINDS, Select, Swap, Weights, service
from effbench.core.recipe import parse_step
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import MaskedLinear


@pytest.fixture(scope="module")
def graph() -> Any:
    """Who imports whom, within functions too, but not for annotations alone."""
    return grimp.build_graph("effbench", exclude_type_checking_imports=True, cache_dir=None)


@pytest.mark.parametrize(
    ("module", "stranger"),
    [
        ("effbench.nn.run", "effbench.nn.calibration"),
        ("effbench.nn.run", "effbench.nn.train.fit"),
        ("effbench.nn.run", "effbench.nn.kinds"),
        ("effbench.nn.calibration", "effbench.nn.train.fit"),
        ("effbench.nn.train.fit", "effbench.nn.calibration"),
        ("effbench.nn.train.fit", "effbench.nn.infer.engine"),
        ("effbench.nn.kinds.swap", "effbench.nn.calibration"),
        ("effbench.methods.prune.gmp", "effbench.nn.calibration"),
        ("effbench.methods.quant.rtn", "effbench.nn.train.fit"),
    ],
)
def test_a_module_is_made_of_no_more_than_it_needs(graph, module, stranger):
    names = graph.find_upstream_modules(module)
    assert any(name.startswith("effbench.core") for name in names)
    assert not any(name == stranger or name.startswith(f"{stranger}.") for name in names)


def test_every_kind_has_a_service_and_that_of_weights_alone_calibrates(graph):
    for kind in KINDS:
        names = graph.find_upstream_modules(service(kind))
        assert ("effbench.nn.calibration" in names) == (kind == "Weights"), kind


def test_nothing_of_the_model_room_knows_records_cells_or_reports(graph):
    for module in (name for name in graph.modules if name.startswith("effbench.nn.")):
        for stranger in ("effbench.records", "effbench.cells", "effbench.report"):
            assert not any(name.startswith(stranger) for name in graph.find_upstream_modules(module)), module


def test_a_selection_ranks_what_earlier_ones_left_and_the_pool_stays_whole():
    offered: list[list[str]] = []

    @dataclasses.dataclass(frozen=True)
    class Last(Select):
        def score(self, examples, run):
            offered.append([example.id for example in examples])
            assert len(run.data.pool) == 64
            return torch.tensor([float(example.id) for example in examples])

    run = toy_run()
    for keep in (5 / 64, 2 / 64):
        run.apply(Last(keep=keep))
    assert len(offered[0]) == 64 and offered[1] == ["63", "62", "61", "60", "59"]
    assert [example.id for example in run.data.train] == ["63", "62"] and len(run.data.pool) == 64
    assert list(run.log.selected.values()) == [5, 2]
    assert [example.id for example in run.data.reserve[:4]] == ["61", "60", "59", "58"]
    assert run.log.chosen[str(Last(keep=2 / 64))] == [["63", 1.0], ["62", 1.0]]


@pytest.mark.parametrize("keep", [0, -0.1, 1.5])
def test_a_share_is_one_of_the_pool(keep: float):
    with pytest.raises(Usage, match=r"keep is a share of the pool, in \(0, 1\]"):
        parse_step(f"random_selection(keep={keep})")


def test_what_is_turned_away_is_filled_up_from_the_ranking():
    @dataclasses.dataclass(frozen=True)
    class Odd(Select):
        def admit(self, examples, run):
            yield from (place for place, example in enumerate(examples) if int(example.id) % 2)

    @dataclasses.dataclass(frozen=True)
    class First(Select):
        def score(self, examples, run):
            return torch.tensor([-float(example.id) for example in examples])

    run = toy_run()
    run.apply(First(keep=8 / 64))
    run.apply(Odd())
    assert [int(example.id) for example in run.data.train] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert [int(example.id) for example in run.data.reserve] == list(range(16, 64))
    run.apply(Odd(keep=1.0))
    assert [int(example.id) for example in run.data.train] == [*range(1, 16, 2), *range(17, 64, 2)]
    assert run.data.reserve == []

    @dataclasses.dataclass(frozen=True)
    class Nothing(Select):
        def admit(self, examples, run):
            return ()

    with pytest.raises(Unsupported, match="nothing was selected"):
        run.apply(Nothing())


def test_weights_go_with_examples():
    @dataclasses.dataclass(frozen=True)
    class Weighing(Select):
        def score(self, examples, run):
            return torch.tensor([float(example.id) for example in examples])

        def weigh(self, examples, run):
            return [1 + int(example.id) for example in examples]

    run = toy_run()
    run.apply(Weighing(keep=2 / 64))
    assert [(example.id, example.weight) for example in run.data.train] == [("63", 64.0), ("62", 63.0)]
    assert all(example.weight == 1 for example in run.data.pool)


def test_linears_that_are_to_be_left_alone_are_not_among_the_targeted_ones():
    run = toy_run(skip=("*.0.mlp.*", "*q_proj"))
    named = dict(Blocks(run.model).linears())
    assert run.linears() == {path: named[path] for path in named if run.targeted(path)}
    assert len(run.linears()) == 14 - 3 - 2


@pytest.mark.parametrize(
    ("targets", "number"), [(("q_proj",), 2), (("*_proj",), 14), ("all", 14), (("gate*", "o_*"), 4)]
)
def test_a_swap_replaces_its_targets(targets: Any, number: int):
    @dataclasses.dataclass(frozen=True)
    class Mask(Swap):
        targets: Literal["all"] | tuple[str, ...] = "all"

        def replace(self, module, site):
            return MaskedLinear.of(module.weight, module.weight != 0)

    run = toy_run()
    run.apply(Mask(targets=targets))
    assert sum(isinstance(module, MaskedLinear) for _, module in Blocks(run.model).linears()) == number
    with pytest.raises(Unsupported, match="they are called down_proj, gate_proj"):
        toy_run().apply(Mask(targets=("nothing",)))


def test_statistics_that_were_not_asked_for_are_not_there():
    @dataclasses.dataclass(frozen=True)
    class Curious(Weights):
        needs: ClassVar = {"norm"}

        def compress(self, layer):
            assert layer.inputs.norm.shape == layer.weight.shape[1:]
            return layer.inputs.hessian

    with pytest.raises(AttributeError, match=r"declare needs = .'hessian'"):
        toy_run().apply(Curious())
