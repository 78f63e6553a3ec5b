"""What `effbench export` writes is what a run of the same cell measures, with all that its checkpoint says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from effbench import tiny
from effbench.cells.execute import execute
from effbench.cells.export import ExportOptions, export
from effbench.cells.options import RunOptions
from effbench.cells.plan import find_jobs
from effbench.core.errors import Refused, Usage

SUITE = """
name: few
version: 1
description: For tests
settings: {probes: [perplexity], calibration_sequences: 4, calibration_length: 64, text_tokens: 2048}
recipes:
  - {name: gptq, steps: "gptq(bits=3, group_size=32)"}
  - {name: rtn, steps: "rtn(bits=8, group_size=32)"}
  - {name: fp8, steps: "fp8_weight()"}
tiers: {quick: {}, full: {settings: {calibration_sequences: 9}}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("few.yaml").write_text(SUITE)
    return tmp_path


def measure(**options: object) -> float:
    """Perplexity of the last row that the options name, as a run measures it."""
    *_, jobs = find_jobs(RunOptions(device="cpu", results="runs", **options))  # type: ignore[arg-type]
    record = execute(jobs[-1].at(jobs[-1].places[:1]))
    assert record.outcome == "ok", record.reason
    return record.metrics["token_ppl"].value


def test_an_exported_row_is_the_measured_one(here: Path) -> None:
    said: list[str] = []
    done = export(ExportOptions(suite="few.yaml", row="gptq", to="out", device="cpu"), tell=said.append)
    assert done.startswith("out: ") and done.endswith("format effbench")
    assert said == [
        "gptq as suite few v1, tier quick, measures it: 4 calibration sequences of 64 tokens",
        "loading tiny",
        "step 1 of 1: gptq(bits=3, group_size=32)",
        "packing",
    ]
    measured = measure(suite="few.yaml", recipes="gptq")
    again = measure(suite="few.yaml", model="out", recipes="baseline")
    assert again == pytest.approx(measured, rel=1e-6)
    dense = export(ExportOptions(suite="few.yaml", row="gptq", to="dense", format="dense", device="cpu"))
    off = re.search(r"; in torch\.bfloat16 packed weights are off by up to (\S+) of what was measured$", dense)
    assert off is not None and 1e-4 < float(off[1]) < 2**-8, "half a unit of bfloat16's 8 bits"
    assert measure(suite="few.yaml", model="dense", recipes="baseline") == pytest.approx(measured, rel=1e-3)
    other = {"calibration_sequences": 2}
    export(ExportOptions(suite="few.yaml", row="gptq", to="other", device="cpu"), other)
    export(ExportOptions(suite="few.yaml", recipe="gptq(bits=3, group_size=32)", tier="full", to="full", device="cpu"))
    packed = [(here / name / "model.safetensors").read_bytes() for name in ("out", "other", "full")]
    assert len(set(packed)) == 3, "settings and tier decide what calibrates"


def test_a_dense_form_that_loses_nothing_says_nothing(here: Path) -> None:
    options = ExportOptions(recipe="magnitude(pattern='2:4')", to="dense", format="dense", device="cpu")
    assert export(options).endswith("format dense")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row": "gpt*"}, r"row=gpt\*: is a pattern; name one row: gptq"),
        ({"row": "gptg"}, "row=gptg: no row of few in this tier; did you mean 'gptq'"),
        ({"row": "gptq", "to": "file"}, "to=file: is a file; name a new folder"),
        ({"row": "gptq", "to": "file/inside"}, "to=file/inside: cannot write there"),
        ({"row": "gptq", "model": "broken"}, "model=.*broken: "),
    ],
)
def test_what_cannot_be_exported_is_one_line(here: Path, options: dict[str, str], message: str) -> None:
    (here / "file").touch()
    shutil.copytree(tiny.MODEL, here / "broken")
    (here / "broken" / "model.safetensors").write_bytes(b"")
    with pytest.raises(Usage, match=message):
        export(ExportOptions(**{"suite": "few.yaml", "to": "out", "device": "cpu", **options}))  # type: ignore[arg-type]
    assert not (here / "out").exists()


def test_a_recipe_in_a_suite_takes_its_settings(here: Path) -> None:
    said: list[str] = []
    for name, options in {"a": {"row": "rtn"}, "b": {"recipe": "rtn(bits=8, group_size=32)"}}.items():
        export(ExportOptions(suite="few.yaml", to=name, device="cpu", **options), tell=said.append)
    assert said[0] == said[len(said) // 2] and said[0].startswith("rtn as suite few")
    assert (here / "a" / "model.safetensors").read_bytes() == (here / "b" / "model.safetensors").read_bytes()


def test_what_rounds_activations_stays_so_in_the_packed_form(here: Path) -> None:
    export(ExportOptions(suite="few.yaml", row="fp8", to="out", device="cpu"))
    measured, again = (
        measure(suite="few.yaml", recipes="fp8"),
        measure(suite="few.yaml", model="out", recipes="baseline"),
    )
    assert again == pytest.approx(measured, rel=1e-6)


def test_what_no_file_holds_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own.py").write_text(
        "from dataclasses import dataclass\nfrom effbench.core.method import Method\n\n\n"
        "@dataclass(frozen=True)\nclass Own(Method):\n    claims = ('infer.encoder',)\n\n"
        "    def apply(self, run):\n        run.attach(self)\n"
    )
    with pytest.raises(Refused, match="which no file can hold"):
        export(ExportOptions(recipe="'./own.py:Own'()", to="out", device="cpu"))
    assert not (here / "out").exists()


@pytest.fixture
def checkpoint(here: Path) -> Path:
    """The tiny model as somebody publishes it: with stop tokens, a chat template, a licence and a card."""
    folder = here / "source"
    shutil.copytree(tiny.MODEL, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    stop = tokenizer.encode(".")[-1]
    settings = {"eos_token_id": [0, stop], "do_sample": False, "temperature": 0.7, "max_new_tokens": 40}
    (folder / "generation_config.json").write_text(json.dumps(settings))  # as published; transformers would not save it
    for name in ("README.md", "LICENSE", "special_tokens_map.json", "model.safetensors.index.json", "old.bin"):
        (folder / name).write_text("{}")
    for name in ("extra/deep/notes.txt", "extra/weights.onnx", ".git/HEAD"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("in a folder")
    return folder


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["effbench", "dense"])
def test_nothing_of_the_source_is_lost(form: str, checkpoint: Path, here: Path) -> None:
    export(ExportOptions(suite="few.yaml", row="rtn", model="source", format=form, to="out", device="cpu"))
    out = here / "out"
    lost = {"old.bin", "model.safetensors.index.json", "extra/weights.onnx", ".git/HEAD"}  # tensors, and of tools
    own = {"effbench.json"} if form == "effbench" else set()
    names = list_files(out)
    assert names == list_files(checkpoint) - lost | own and "extra/deep/notes.txt" in names
    for name in names - own - {"model.safetensors", "config.json"}:
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert {oct(path.stat().st_mode)[-3:] for path in out.rglob("*") if path.is_file()} == {"644"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16", "the type of the tensors"
    # Once more from the folder that was written: a dense form keeps no manifest of a packed one.
    export(ExportOptions(suite="few.yaml", row="baseline", model="out", format="dense", to="again", device="cpu"))
    assert list_files(here / "again") == names - own


def test_an_exported_model_generates_as_its_source_does(checkpoint: Path, here: Path) -> None:
    export(ExportOptions(suite="few.yaml", row="baseline", model="source", format="dense", to="out", device="cpu"))
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in ("source", "out")]
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in ("source", "out")]
    prompts = [text[:60] for text in tiny.documents("heldout", 4)]
    made = []
    for tokenizer, model in zip(tokenizers, models, strict=True):
        assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
        made.append(
            [model.generate(**tokenizer(text, return_tensors="pt"), pad_token_id=0).tolist() for text in prompts]
        )
    assert made[0] == made[1]
    stop = models[0].generation_config.eos_token_id[1]
    assert any(row[0][-1] == stop for row in made[0]), "some end at a stop token"
