"""`effbench export`: a recipe's model on disk, packed as it is measured or dense for programs that know no packing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from effbench import sources
from effbench.cells.options import DTYPES
from effbench.core.errors import Usage
from effbench.core.recipe import parse
from effbench.core.usage import Seed, check_writable, named_path, one_of
from effbench.machine.placement import choose_devices

if TYPE_CHECKING:
    from effbench.nn.run import ModelRun

FORMATS = ("effbench", "dense")


@dataclasses.dataclass
class ExportOptions:
    """What `effbench export` can be told."""

    recipe: str | None = None  # the steps whose model is wanted
    to: str | None = None  # folder to be made
    format: str = "effbench"  # effbench (packed, read by model=FOLDER) or dense (plain transformers, masks beside it)
    model: str = "tiny"  # tiny, a local folder, a Hub id org/name[@REVISION], or shape:NAME (random weights)
    data: str | None = None  # tiny, text:FOLDER or hub:NAME; by default what belongs to the model
    tokenizer: str | None = None  # folder or Hub id, for a model that comes without one
    device: str | None = None  # cpu, cuda or cuda:N; by default the first GPU, else the processor
    dtype: str | None = None  # of the arithmetic: float32, bfloat16, float16
    seed: Seed = 0  # of calibration and training


def export(options: ExportOptions) -> str:
    """Run the recipe, write its model, and say in one line what was written.

    Raises `Usage` for options that cannot be right, before anything runs, and an `Outcome` for what the model or its
    data make impossible; the folder is then not made.
    """
    for name in ("recipe", "to"):
        if getattr(options, name) is None:
            raise Usage(f"{name}= is missing: effbench export recipe='gptq(bits=4)' to=FOLDER")
    recipe, folder = parse(str(options.recipe)), named_path("to", str(options.to))
    one_of("format", options.format, FORMATS)
    one_of("dtype", options.dtype, DTYPES)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Usage(f"to={options.to}: is there already and not empty; name a new folder")
    check_writable("to", folder)
    source, data = sources.model(options.model, options.tokenizer), sources.data(options.data)
    devices, _ = choose_devices(options.device)

    from effbench.nn.files import artifact
    from effbench.nn.files.load import open_run

    run: ModelRun = open_run(source, data, devices[0].name, options.dtype, options.seed)
    try:
        for step in recipe.steps:
            run.apply(step)
        run.finish(recipe_is_empty=not recipe.steps)
        written = (artifact.save_dense if options.format == "dense" else artifact.save)(
            run.model, folder, run.storage, run.tokenizer
        )
    finally:
        run.close()
    return f"{folder}: {written / 1e6:.2f} MB of tensors, format {options.format}"
