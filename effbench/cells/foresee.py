"""Why a cell will be unsupported, as far as the configuration of its model tells."""

from __future__ import annotations

import itertools

from effbench.cells.job import Job
from effbench.core.errors import Unsupported
from effbench.core.kinds import KINDS, kind_of
from effbench.core.method import Method
from effbench.core.recipe import parse
from effbench.core.usage import matches_any


def foresee(job: Job) -> str | None:
    """Why shapes of the model do not suit the recipe, or None. The Hub is not asked.

    Steps are looked at up to the first that may change shapes, which fits and methods of a kind do not.
    """
    if job.source.kind == "hub":
        return None
    steps = itertools.takewhile(_keeps_shapes, parse(job.cell.steps, job.cell.recipe).steps)
    asked = [step for step in steps if step.overrides("check_shape")]
    if not asked:
        return None
    from effbench.nn.files.load import linear_shapes  # torch and transformers, which most plans do without

    skip = job.cell.settings.get("skip") or ()
    try:
        shapes = {path: shape for path, shape in linear_shapes(job.source).items() if not matches_any(path, skip)}
        for step in asked:
            step.check_shapes(shapes)
    except Unsupported as error:
        return str(error)
    return None


def _keeps_shapes(step: Method) -> bool:
    return step.consumes or kind_of(type(step)) in KINDS
