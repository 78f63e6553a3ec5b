"""Shapes that a pattern does not divide."""

from __future__ import annotations

import pytest

from effbench.checks import ODD, toy_run
from effbench.core import registry
from effbench.core.errors import Unsupported
from effbench.core.recipe import parse_step
from effbench.core.source import document_fields
from effbench.formats.sparse import Pattern

# [out, in] that divide, and what is said of those that do not
SHAPES = {
    "2:4": ((7, 12), {(8, 10): "width 10 is not a multiple of 4, as pattern 2:4 needs"}),
    "4:8": ((7, 576), {(8, 100): "width 100 is not a multiple of 8, as pattern 4:8 needs"}),
    "block:16x8": (
        (48, 24),
        {
            (24, 24): "24 x 24 does not divide into blocks of 16 x 8",
            (48, 20): "48 x 20 does not divide into blocks of 16 x 8",
        },
    ),
    "unstructured": ((7, 13), {}),
}


@pytest.mark.parametrize("pattern", SHAPES)
def test_what_a_pattern_divides(pattern: str) -> None:
    good, bad = SHAPES[pattern]
    Pattern.of(pattern).check_shape(*good)
    for shape, reason in bad.items():
        with pytest.raises(ValueError, match=f"^{reason}$"):
            Pattern.of(pattern).check_shape(*shape)


STEPS = (  # patterns that do not divide 128
    "block_sparse(block=3)",
    "gmp(pattern='2:5', sparsity=0.6)",
    "learned_mask(pattern='2:5', sparsity=0.6)",
    "magnitude(pattern='block:3x8')",
    "movement(pattern='block:8x3')",
    "sparsegpt(pattern='2:5', sparsity=0.6, block=100)",
    "taylor(pattern='2:5', sparsity=0.6, scope='local')",
    "wanda(pattern='block:3x3')",
)


def test_every_method_with_a_pattern_is_here() -> None:
    found = {key for key in registry.catalog() if "pattern" in document_fields(registry.load(key))}
    assert found <= {parse_step(step).key for step in STEPS}


@pytest.mark.parametrize("step", STEPS)
def test_a_shape_that_the_pattern_does_not_divide_is_refused_as_the_step_begins(step: str) -> None:
    """With the linear and a mend, before anything is calibrated or trained."""
    run = toy_run()
    with pytest.raises(Unsupported, match=r"^model\.layers\.0\.self_attn\.q_proj: .*; leave such linears out with"):
        run.apply(parse_step(step))
    assert not run.log.calibration_tokens and not run.log.layers


def test_what_is_skipped_is_not_asked_about() -> None:
    run = toy_run(shape=ODD, skip=("*.down_proj",))
    run.apply(parse_step("wanda(pattern='4:8')"))
    assert len(run.log.layers) == 12
