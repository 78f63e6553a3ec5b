"""What kinds promise, and that a run, a service and a method depend on no more than what they are made of."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import grimp
import pytest
import torch

from effbench.checks import toy_run
from effbench.core.errors import Unsupported
from effbench.core.kinds import KINDS, Select, Swap, Weights, service
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
        number: int = 5

        def score(self, examples, run):
            offered.append([example.id for example in examples])
            assert len(run.data.pool) == 64
            return torch.tensor([float(example.id) for example in examples])

        def order(self, examples, run):
            return super().order(examples, run)[: self.number]

    run = toy_run()
    for number in (5, 2):
        run.apply(Last(number=number))
    assert len(offered[0]) == 64 and offered[1] == ["63", "62", "61", "60", "59"]
    assert [example.id for example in run.data.train] == ["63", "62"] and len(run.data.pool) == 64
    assert run.log.selected == {str(Last(number=5)): 5, str(Last(number=2)): 2}
    with pytest.raises(Unsupported, match="nothing was selected"):
        run.apply(Last(number=0))


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

        def replace(self, module):
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
