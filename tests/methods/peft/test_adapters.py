"""Adapters by name: one counts at a time, others stand still, and files hold nothing but them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys_training import fit

from effbench.checks import TOYS, probe, toy_run
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.nn.files import artifact
from effbench.nn.files.adapters import load_adapter, save_adapter
from effbench.nn.files.peft import load_peft, save_peft
from effbench.nn.model.adapters import list_adapters
from effbench.nn.run import ModelRun

KINDS = [
    "lora(adapter='{}')",
    "prefix_tuning(length=4, hidden=16, adapter='{}')",
    "prompt_tuning(length=4, adapter='{}')",
]


def trained(kinds: list[str], names: list[str], architecture: str = "llama") -> ModelRun:
    """A run with adapters that were trained one after the other."""
    run = toy_run(architecture)
    for number, (kind, name) in enumerate(zip(kinds, names, strict=True), 1):
        run.apply(parse_step(kind.format(name)))
        fit(run, steps=3, lr=number * 1e-2)  # else all would be alike: they start and read alike
    run.finish()
    return run


@pytest.mark.parametrize("kind", KINDS)
def test_choosing_twice_gives_the_same_bits(kind: str) -> None:
    run = trained([kind, kind], ["a", "b"])
    base = probe(toy_run())
    flags = {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    assert list_adapters(run.model) == ["a", "b"] or set(list_adapters(run.model)) == {"a", "b"}
    seen: dict[Any, torch.Tensor] = {}
    for name in ("a", "b", None, "b", "a", None):
        run.adapter(name)
        logits = probe(run)
        assert torch.equal(seen.setdefault(name, logits), logits)
    assert torch.equal(seen[None], base)
    assert not torch.equal(seen["a"], seen["b"]) and not torch.equal(seen["a"], base)
    assert flags == {name: parameter.requires_grad for name, parameter in run.model.named_parameters()}
    with pytest.raises(Usage, match=r"no adapter is called 'c'.*there is"):
        run.adapter("c")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_fitting_one_leaves_the_others_and_the_base_alone(kind: str, second: str) -> None:
    run = toy_run()
    run.apply(parse_step(kind.format("a")))
    fit(run, steps=2, lr=1e-2)
    run.settle()
    before = {id(parameter): parameter.detach().clone() for parameter in run.model.parameters()}
    alone = probe(run)
    run.apply(parse_step(second.format("b")))
    report = fit(run, steps=2, lr=1e-2, weight_decay=0.1)
    for parameter in run.model.parameters():
        if id(parameter) in before:
            assert torch.equal(parameter, before[id(parameter)]) and not parameter.requires_grad
    new = sum(p.numel() for p in run.model.parameters() if id(p) not in before)
    assert sum(group["parameters"] for group in report["groups"]) == new
    run.adapter("a")
    assert torch.equal(probe(run), alone)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_two_before_one_fit_are_both_trained(kind: str, second: str) -> None:
    run = toy_run()
    base = {id(parameter) for parameter in run.model.parameters()}
    run.apply(parse_step(kind.format("a")))
    run.apply(parse_step(second.format("b")))
    report = fit(run, steps=2, lr=1e-2)
    new = sum(parameter.numel() for parameter in run.model.parameters() if id(parameter) not in base)
    assert sum(group["parameters"] for group in report["groups"]) == new


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_taken_once(kind: str, tmp_path: Path) -> None:
    run = trained([kind], ["a"])
    logits = probe(run)
    save_adapter(run.model, tmp_path / "a", "a")
    save_peft(run.model, tmp_path / "p", "a")
    for load, folder in ((load_adapter, "a"), (load_peft, "p")):
        for name, message in (("a", "there is an adapter 'a' already"), ("a.b", "a name of letters"), ("", "a name")):
            with pytest.raises(Usage, match=message):
                load(run.model, tmp_path / folder, name)
        load(run.model, tmp_path / folder, f"{folder}_2")
        run.adapter(f"{folder}_2")
        assert torch.allclose(probe(run), logits, atol=1e-5)
    with pytest.raises(Refused, match=r"there is a .* already"):
        run.apply(parse_step(kind.format("a")))
    with pytest.raises(Usage, match="adapter is a name of letters, digits, _ and -"):
        parse_step(kind.format("a.b"))


def test_what_has_not_settled_is_not_saved(tmp_path: Path) -> None:
    run = toy_run()
    run.apply(parse_step(KINDS[1].format("a")))
    fit(run, steps=2)
    with pytest.raises(Unsupported, match="'a' has its final form when the run has settled"):
        save_adapter(run.model, tmp_path / "a", "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("architecture", TOYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_adapter_alone_and_puts_it_on_again(kind: str, architecture: str, tmp_path: Path) -> None:
    run = trained([kind], ["a"], architecture)
    written = save_adapter(run.model, tmp_path / "a", "a")
    tensors = load_file(tmp_path / "a" / "adapter.safetensors")
    assert (
        written
        == sum(tensor.nbytes for tensor in tensors.values())
        < 0.5 * sum(p.nbytes for p in run.reference.parameters())
    )
    other = toy_run(architecture)
    flags = {name: parameter.requires_grad for name, parameter in other.model.named_parameters()}
    load_adapter(other.model, tmp_path / "a", "again")
    assert list_adapters(other.model) == ["again"]
    assert torch.allclose(probe(other), probe(run), atol=1e-6)
    assert not torch.equal(probe(other), probe(toy_run(architecture)))
    after = {name.replace(".base", ""): p.requires_grad for name, p in other.model.named_parameters()}
    assert all(after[name] == needed for name, needed in flags.items() if name in after)
    with pytest.raises(FileExistsError):
        save_adapter(run.model, tmp_path / "a", "a")
    with pytest.raises(Unsupported, match="no adapter is called 'b'"):
        save_adapter(run.model, tmp_path / "b", "b")


def test_an_adapter_of_another_model_is_unsupported(tmp_path: Path) -> None:
    run = trained(KINDS[:1], ["a"])
    save_adapter(run.model, tmp_path / "a", "a")
    with pytest.raises(Unsupported, match="the adapter is for"):
        load_adapter(toy_run(shape={"intermediate_size": 384}).model, tmp_path / "a", "x")
    with pytest.raises(Unsupported, match="the model has no"):
        load_adapter(toy_run("gpt2").model, tmp_path / "a", "x")
    with pytest.raises(Unsupported, match="is no adapter"):
        load_adapter(toy_run().model, tmp_path, "x")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_pefts_files_go_out_and_in(kind: str, architecture: str, tmp_path: Path) -> None:
    run = trained([kind], ["a"], architecture)
    save_peft(run.model, tmp_path / "a", "a")
    other = toy_run(architecture)
    load_peft(other.model, tmp_path / "a", "x")
    assert torch.allclose(probe(other), probe(run), atol=1e-6)


def test_adapters_are_saved_with_the_model(tmp_path: Path) -> None:
    run = trained([KINDS[0], KINDS[1]], ["a", "b"])
    artifact.save(run.model, tmp_path / "m", run.storage)
    loaded = toy_run()
    loaded.model = artifact.load(tmp_path / "m")
    for name in ("b", "a", None):
        run.adapter(name)
        loaded.adapter(name)
        assert torch.equal(probe(loaded), probe(run))
