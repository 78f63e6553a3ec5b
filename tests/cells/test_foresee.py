"""What a plan says of cells that the shapes of a model leave no chance."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from effbench import tiny
from effbench.cells.foresee import foresee
from effbench.cells.options import RunOptions
from effbench.cells.plan import plan
from effbench.checks import ODD, toy
from effbench.cli.main import main
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.nn.files import load

DOWN = "model.layers.0.mlp.down_proj: width 100 is not a multiple of 8, as pattern 4:8 needs"


@pytest.fixture(autouse=True)
def nothing_kept():
    load.linear_shapes.cache_clear()


@pytest.fixture
def odd(tmp_path):
    """A folder with a model of widths 72 and 100."""
    model, tokenizer = toy(**ODD), AutoTokenizer.from_pretrained(tiny.MODEL)
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "odd")
    return str(tmp_path / "odd")


def reason(recipe: str, model: str, **changes: object) -> str | None:
    batch = plan(RunOptions(recipe=recipe, model=model, device="cpu"), changes)
    return foresee(batch.cells[-1].job)


def test_what_shapes_leave_no_chance(odd):
    assert reason("wanda(pattern='4:8')", odd).startswith(DOWN)
    assert reason("wanda(pattern='2:4')", odd) is None
    assert reason("lora(), fit(), wanda(pattern='4:8')", odd).startswith(DOWN)
    assert "no Hadamard matrix of order 100" in reason("rtn(), quip_sharp()", odd)
    assert "72 x 72" in reason("gmp(pattern='block:16x16'), fit()", odd)
    for recipe in ("rtn()", "gptq(bits=3)", "awq(group_size=7)", "nf4()", "squeezellm()", "fp8_weight()"):
        assert reason(recipe, odd) is None


def test_what_only_a_run_can_tell(odd):
    """Steps after one that may change shapes, linears that are skipped, models that would have to be fetched."""
    assert reason("neuron_pruning(sparsity=0.04), wanda(pattern='4:8')", odd) is None
    assert reason("wanda(pattern='4:8')", odd, skip=["*.down_proj"]) is None
    assert reason("wanda(pattern='4:8')", "someone/odd") is None


@pytest.mark.parametrize("recipe", ["wanda(pattern='block:24x24')", "block_sparse(block=48)"])
def test_what_is_foreseen_is_what_happens(recipe):
    job = plan(RunOptions(recipe=recipe, device="cpu")).cells[-1].job
    run = load.open_run(job.source, job.data, "cpu", "float32", 0)
    with pytest.raises(Unsupported) as refusal:
        run.apply(parse_step(recipe))
    assert str(refusal.value) == foresee(job)


def test_a_dry_run_says_it(odd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["run", f"model={odd}", "recipe=wanda(pattern='4:8')", "device=cpu", "--dry-run"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("run ") and DOWN in line] == [lines[-1]]
    assert "new, will be unsupported: " in lines[-1] and lines[-1].endswith("with the setting skip")
    assert main([*command, "--json"]) == 0
    assert [DOWN in row["why"] for row in json.loads(capsys.readouterr().out)] == [False, True]


def test_a_model_that_is_none_is_refused(odd, tmp_path):
    config = json.loads((tmp_path / "odd" / "config.json").read_text()) | {"model_type": "t5"}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Usage, match="architecture 't5' is not one of"):
        reason("quip_sharp()", odd)


def test_a_plan_builds_no_model_but_one_without_tensors(monkeypatch, tmp_path, capsys):
    """All rows of a suite together: once, and nothing is read or allocated."""
    built = []
    plain = transformers.AutoModelForCausalLM.from_config

    def count(*arguments, **options):
        built.append(plain(*arguments, **options))
        return built[-1]

    def read(*_, **__):
        raise AssertionError("weights are read")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_config", count)
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.chdir(tmp_path)
    for suite in ("quant", "prune"):
        assert main(["run", f"suite={suite}", "device=cpu", "--dry-run"]) == 0
    assert "will be unsupported" not in capsys.readouterr().out
    assert len(built) == 1
    assert all(parameter.device == torch.device("meta") for parameter in built[0].parameters())
