"""`effbench export`: the model that a row of a suite measures, packed or dense for programs that know no packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from effbench.cells.options import DTYPES, RunOptions
from effbench.core.errors import Refused, Usage
from effbench.core.recipe import parse
from effbench.core.usage import Seed, check_writable, list_some, matches_any, named_path, nearest, one_of

if TYPE_CHECKING:
    from effbench.cells.job import Job

FORMATS = ("effbench", "dense")
CALIBRATION = {"calibration_sequences": "{} calibration sequences", "calibration_length": "of {} tokens"}


@dataclasses.dataclass
class ExportOptions:
    """What `effbench export` can be told."""

    suite: str | None = None  # whose row or settings are wanted: its name, or a YAML file of your own
    row: str | None = None  # name of the row of that suite whose model is wanted
    recipe: str | None = None  # or the steps whose model is wanted, with the settings of the suite if one is given
    to: str | None = None  # folder to be made
    format: str = "effbench"  # effbench (packed, read by model=FOLDER) or dense (plain transformers, masks beside it)
    model: str | None = None  # as in `effbench run`; by default that of the suite
    data: str | None = None  # as in `effbench run`
    calibration_data: str | None = None  # as in `effbench run`
    tokenizer: str | None = None  # folder or Hub id, for a model that comes without one
    device: str | None = None  # cpu, cuda or cuda:N; by default the first GPU, else the processor
    dtype: str | None = None  # of the arithmetic: float32, bfloat16, float16
    tier: str | None = None  # of the suite; by default full with a GPU, else quick
    seed: Seed = 0  # of calibration and training


def export(
    options: ExportOptions, changes: Mapping[str, Any] | None = None, tell: Callable[[str], None] = lambda _: None
) -> str:
    """Do what a run of that cell does up to its probes, write the model, and say in one line what was written.

    `changes` are settings that differ from those of the suite; `tell` is called with what is being done. Raises `Usage`
    for options that cannot be right, before anything runs, and an `Outcome` for what the model or its data make
    impossible; the folder is then not made.
    """
    if options.to is None:
        raise Usage("to= is missing: effbench export suite=quant row=gptq-4b to=FOLDER")
    folder = named_path("to", options.to)
    one_of("format", options.format, FORMATS)
    one_of("dtype", options.dtype, DTYPES)
    if folder.exists() and not folder.is_dir():
        raise Usage(f"to={options.to}: is a file; name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise Usage(f"to={options.to}: is there already and not empty; name a new folder")
    job = _find_job(options, changes or {})
    cell, recipe = job.cell, parse(job.cell.steps)
    for step in recipe.steps:
        if options.format == "dense" and step.rounds_activations:
            raise Usage(f"format=dense: {step} rounds activations too, which is lost there; format=effbench keeps it")
    check_writable("to", folder)

    from effbench.cells.plan import check_files

    check_files(job.source, cell.settings["probes"])

    from effbench.cells.execute import open_cell
    from effbench.nn.files import artifact
    from effbench.nn.files.checkpoint import keep_beside
    from effbench.nn.files.load import find_folder
    from effbench.nn.model.attention import is_carried

    how = [text.format(cell.settings[name]) for name, text in CALIBRATION.items() if name in cell.settings]
    tell(f"{cell.recipe} as suite {cell.suite} v{cell.suite_version}, tier {cell.tier}, measures it: {' '.join(how)}")
    tell(f"loading {cell.model}")
    run = open_cell(job)
    try:
        for number, step in enumerate(recipe.steps, 1):
            tell(f"step {number} of {len(recipe.steps)}: {step.label}")
            run.apply(step)
        tell("packing")
        run.finish(recipe_is_empty=not recipe.steps)
        if not is_carried(run.infer, run.model):
            raise Refused("the recipe changes how the model is run (its cache or its prompts), which no file can hold")
        rounded = ""
        if options.format == "dense" and (moved := artifact.measure_rounding(run.model, run.storage)):
            rounded = f"; in {run.storage} packed weights are off by up to {moved:.1e} of what was measured"
        save = artifact.save_dense if options.format == "dense" else artifact.save
        written = save(run.model, folder, run.storage)
        origin = find_folder(job.source)
        own = origin is not None and job.source.tokenizer is None
        keep_beside(folder, origin, run.model, None if own else run.tokenizer)
    finally:
        run.close()
    return f"{folder}: {written / 1e6:.2f} MB of tensors, format {options.format}{rounded}"


def _find_job(options: ExportOptions, changes: Mapping[str, Any]) -> Job:
    """The cell whose model is wanted, as `effbench run` would plan it. Raises `Usage`."""
    from effbench.cells.plan import find_jobs  # not needed to list what commands there are

    if (options.recipe is None) == (options.row is None):
        raise Usage("give suite=NAME row=NAME, or recipe='gptq(bits=4)' with or without suite=")
    shared = {field.name for field in dataclasses.fields(RunOptions)} & set(vars(options))
    asked = RunOptions(seeds=[options.seed], **{name: getattr(options, name) for name in shared})
    if options.row is not None and options.suite is None:
        raise Usage(f"row={options.row}: name the suite that has it with suite=")
    _, suite, tier, jobs = find_jobs(asked, changes)
    names = [recipe.name for recipe in tier.recipes]
    if options.row is not None and options.row not in names:
        if meant := [name for name in names if matches_any(name, [options.row])]:
            raise Usage(f"row={options.row}: is a pattern; name one row: {list_some(meant)}")
        hint = suite.tell_tiers(options.row) or nearest(options.row, names)
        raise Usage(f"row={options.row}: no row of {suite.name} in this tier{hint}")
    wanted = options.row if options.recipe is None else suite.row(options.recipe).name
    found = [job for job in jobs if job.cell.recipe == wanted]
    if len(found) > 1:
        raise Usage(f"model=: name one of {', '.join(job.cell.model for job in found)}")
    return found[0].at(found[0].places).entered(0)
