"""Any change of source runs again exactly the cells that depend on it: tried on a copy of the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from effbench.core.paths import PACKAGE

ROOT = PACKAGE.parent
SUITE = """
name: copied
version: 1
description: one row for each kind of dependence
recipes:
  - {name: rtn, steps: rtn()}
  - {name: nf4, steps: nf4()}
  - {name: gptq, steps: gptq()}
  - {name: wanda, steps: wanda()}
  - {name: lora, steps: "lora(), fit(steps=1)"}
  - {name: ticket, steps: "lottery_ticket(sparsity=0.5, rounds=1, steps=1)"}
  - {name: layers, steps: layer_pruning(fraction=0.33)}
tiers:
  quick: {}
settings: {probes: [cost, quality]}
"""
ROWS = {"baseline", "rtn", "nf4", "gptq", "wanda", "lora", "ticket", "layers"}
# Runs in the copy: records of all cells as if they had run, then for each change the rows that a run would compute.
DRIVER = '''
import json, sys
from pathlib import Path
from effbench.cells import plan
from effbench.cells.options import RunOptions
from effbench.core import provenance
from effbench.records.record import Record
from effbench.records.store import Store

def rows(probes):
    provenance._digest_source.cache_clear()
    return plan.plan(RunOptions(suite="copied.yaml", device="cpu", results="own", probes=probes))

for probes in ("cost", "quality"):
    for planned in rows(probes).cells:
        Store(Path("own")).write(Record(cell=planned.job.cell, outcome="ok", started="2026-01-01T00:00:00+00:00"))
answers = {}
for name, (file, start, end) in json.load(sys.stdin).items():
    text = Path(file).read_text(encoding="utf-8")
    Path(file).write_text(text.replace('"""', '"""' + start, 1) + end, encoding="utf-8")
    answers[name] = [sorted(job.cell.recipe for job in rows(probes).todo) for probes in ("cost", "quality")]
    Path(file).write_text(text, encoding="utf-8")
print(json.dumps(answers))
'''

NOTHING: set[str] = set()
WEIGHTS = {"rtn", "nf4", "gptq", "wanda"}
FITTED = {"lora", "ticket"}
CODE = "\nPLANTED = 1\n"
CHANGES: dict[str, tuple[str, str, str, set[str], set[str]]] = {
    # what: file, what comes after its first quotes and at its end, rows to run with the probe cost, and with quality
    "nothing": ("effbench/nn/calibration.py", "", "", NOTHING, NOTHING),
    "a comment": ("effbench/nn/calibration.py", "", "\n# the end\n", NOTHING, NOTHING),
    "a docstring": ("methods/quant/gptq.py", "In other words: ", "", NOTHING, NOTHING),
    "calibration": ("effbench/nn/calibration.py", "", CODE, WEIGHTS | {"layers"}, WEIGHTS | {"layers"}),
    "the fit loop": ("effbench/nn/train/fit.py", "", CODE, FITTED, FITTED),
    "the engine": ("effbench/nn/infer/engine.py", "", CODE, NOTHING, ROWS),
    "a probe": ("effbench/probes/quality.py", "", CODE, NOTHING, ROWS),
    "a method": ("methods/quant/gptq.py", "", CODE, {"gptq"}, {"gptq"}),
    "a family's maths": ("methods/prune/_common.py", "", CODE, {"wanda", "ticket"}, {"wanda", "ticket"}),
    "a kernel": ("kernels/lut_linear/triton.py", "", CODE, {"nf4"}, {"nf4"}),
    "how a model is opened": ("effbench/nn/files/load.py", "", CODE, ROWS, ROWS),
    "the report": ("effbench/report/text.py", "", CODE, NOTHING, NOTHING),
    "the record": ("effbench/records/record.py", "", CODE, NOTHING, NOTHING),
}


@pytest.fixture(scope="module")
def rows_to_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """For each change, names of the rows that a run would compute: with the probe cost, and with quality."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("effbench", "methods", "kernels", "suites"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "copied.yaml").write_text(SUITE)
    changes = {name: change[:3] for name, change in CHANGES.items()}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(changes),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, list[list[str]]] = json.loads(done.stdout)
    return answers


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_runs_exactly_what_depends_on_it(name: str, rows_to_run: dict[str, list[list[str]]]) -> None:
    with_cost, with_quality = map(set, rows_to_run[name])
    assert (with_cost, with_quality) == CHANGES[name][3:]
