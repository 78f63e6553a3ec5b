"""IA3, prefixes and LLaMA-Adapter against peft: logits and gradients with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from effbench.checks import toy_run
from effbench.core.errors import Unsupported
from effbench.methods.peft._prefix import Prefix
from effbench.methods.peft.adapter import Adapter
from effbench.methods.peft.ia3 import IA3, IA3Linear
from effbench.methods.peft.llama_adapter import GatedPrompts, LLaMAAdapter
from effbench.methods.peft.p_tuning_v2 import PTuningV2
from effbench.methods.peft.parallel_adapter import ParallelAdapter
from effbench.nn.files.peft import load_peft, save_peft
from effbench.nn.model.feed import feed
from effbench.nn.run import ModelRun

with safe_open(Path(__file__).parent.parent.parent / "golden" / "peft_modules.safetensors", "pt") as file:
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    FACTS = file.metadata()
BEFORE = "base_model.model."


def below(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name): value for key, value in GOLDEN.items() if key.startswith(name)}


def ready(architecture: str, method: Any) -> ModelRun:
    """A run on the golden model that the method has been applied to."""
    run = toy_run(architecture, shape=json.loads(FACTS[f"{architecture}.shape"]))
    run.model.load_state_dict(below(f"{architecture}.base."), strict=False)
    run.apply(method)
    return run


def compare(run: ModelRun, kind: str, grads: Any) -> None:
    """Logits, and gradients as `grads` reads them: a pair of ours and theirs each."""
    logits = feed(run.model, {"input_ids": GOLDEN["ids"]}).logits
    torch.testing.assert_close(logits, GOLDEN[f"{kind}.logits"], rtol=1e-6, atol=1e-6)
    logits.square().mean().backward()
    pairs = list(grads())
    assert pairs and max(float(theirs.abs().max()) for _, theirs in pairs) > 1e-3
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_ia3_is_pefts(architecture: str) -> None:
    run = ready(architecture, IA3())
    vectors, graded = (below(f"{architecture}.ia3.{what}.{BEFORE}") for what in ("file", "grad"))
    parts = {path: module for path, module in run.model.named_modules() if isinstance(module, IA3Linear)}
    assert {f"{path}.ia3_l" for path in parts} == vectors.keys()
    for path, module in parts.items():
        module.l.data = vectors[f"{path}.ia3_l"].flatten()[-len(module.l) :].clone()  # of queries all are one
    compare(
        run,
        f"{architecture}.ia3",
        lambda: [(m.l.grad, graded[f"{path}.ia3_l"].flatten()[-len(m.l) :]) for path, m in parts.items()],
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_prompts_of_p_tuning_are_pefts_prefix(architecture: str) -> None:
    run = ready(architecture, PTuningV2(length=3))
    parts = [module for module in run.model.modules() if isinstance(module, Prefix)]

    def divide(what: str) -> list[tuple[Tensor, Tensor]]:
        matrix = GOLDEN[f"{architecture}.prefix.{what}.prompt_embeddings"]
        heads, length, width = parts[0].keys.shape
        each = matrix.view(length, len(parts), 2, heads, width).permute(1, 2, 3, 0, 4)
        return [(keys, values) for keys, values in each]

    for part, (keys, values) in zip(parts, divide("file"), strict=True):
        part.keys.data, part.values.data = keys.clone(), values.clone()
    compare(
        run,
        f"{architecture}.prefix",
        lambda: [
            pair
            for part, (keys, values) in zip(parts, divide("grad"), strict=True)
            for pair in ((part.keys.grad, keys), (part.values.grad, values))
        ],
    )


def test_llama_adapter_with_one_gate_is_pefts() -> None:
    run = ready("llama", LLaMAAdapter(length=3, layers=1, gate="scalar"))
    ((path, part),) = [(path, m) for path, m in run.model.named_modules() if isinstance(m, GatedPrompts)]
    where = f"{BEFORE}{path.rpartition('.')[0]}."
    theirs, graded = (below(f"llama.llama_adapter.{what}.{where}") for what in ("file", "grad"))
    part.prompts.data, part.gate.data = theirs["adaption_prompt"][0].clone(), theirs["adaption_gate"].clone()
    compare(
        run,
        "llama.llama_adapter",
        lambda: [(part.prompts.grad, graded["adaption_prompt"][0]), (part.gate.grad, graded["adaption_gate"])],
    )


FILES = [("llama", "ia3"), ("qwen2", "ia3"), ("gpt2", "ia3"), ("llama", "llama_adapter"), ("llama", "prefix")]


def put(folder: Path, architecture: str, kind: str) -> Path:
    """The files that peft has written."""
    folder.mkdir()
    save_file(below(f"{architecture}.{kind}.file."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(FACTS[f"{architecture}.{kind}"])
    return folder


@pytest.mark.parametrize(("architecture", "kind"), FILES)
def test_pefts_files_compute_the_same_and_go_back(architecture: str, kind: str, tmp_path: Path) -> None:
    run = toy_run(architecture, shape=json.loads(FACTS[f"{architecture}.shape"]))
    run.model.load_state_dict(below(f"{architecture}.base."), strict=False)
    load_peft(run.model, put(tmp_path / "theirs", architecture, kind), "a")
    logits = feed(run.model, {"input_ids": GOLDEN["ids"]}).logits
    torch.testing.assert_close(logits, GOLDEN[f"{architecture}.{kind}.logits"], rtol=1e-6, atol=1e-6)
    save_peft(run.model, tmp_path / "ours", "a")
    tensors, theirs = load_file(tmp_path / "ours" / "adapter_model.safetensors"), below(f"{architecture}.{kind}.file.")
    assert tensors.keys() == theirs.keys() and all(torch.equal(tensors[name], theirs[name]) for name in theirs)
    mine, their = json.loads((tmp_path / "ours" / "adapter_config.json").read_text()), FACTS[f"{architecture}.{kind}"]
    paths = {"target_modules", "feedforward_modules"} if kind == "ia3" else set()  # whole ones here, endings there
    for key in mine.keys() - paths:
        assert mine[key] == json.loads(their)[key], key
    for key in paths:
        endings = json.loads(their)[key]
        assert all(path.endswith(tuple(endings)) for path in mine[key]) and len(mine[key]) == 2 * len(endings)


def test_what_peft_has_not_is_not_written(tmp_path: Path) -> None:
    for architecture, step, reason in (
        ("llama", LLaMAAdapter(adapter="a"), "one gate for all heads"),
        ("gpt2", LLaMAAdapter(adapter="a", gate="scalar"), "for llama and mistral, not for gpt2"),
        ("llama", Adapter(adapter="a"), "modules of 2 kinds"),
        ("llama", ParallelAdapter(adapter="a"), "no format for ParallelBottleneck"),
    ):
        run = toy_run(architecture)
        run.apply(step)
        with pytest.raises(Unsupported, match=reason):
            save_peft(run.model, tmp_path / "a", "a")
    assert not (tmp_path / "a").exists()


def test_prompts_of_other_layers_are_not_read(tmp_path: Path) -> None:
    folder = put(tmp_path / "a", "llama", "llama_adapter")
    moved = {
        name.replace("layers.1", "layers.0"): tensor for name, tensor in below("llama.llama_adapter.file.").items()
    }
    save_file(moved, folder / "adapter_model.safetensors")
    with pytest.raises(Unsupported, match="its layers are not the 1 upper ones of 2"):
        load_peft(toy_run(shape=json.loads(FACTS["llama.shape"])).model, folder, "a")
    with pytest.raises(Unsupported, match="for llama and mistral, not for qwen2"):
        load_peft(toy_run("qwen2").model, folder, "a")
