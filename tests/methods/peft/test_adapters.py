"""Adapters by name: one counts at a time, others stand still, and files hold nothing but them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys_training import fit

from effbench.checks import DENSE, probe, toy_run
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.methods.peft.adalora import SVDLinear
from effbench.nn.files import artifact
from effbench.nn.files.adapters import load_adapter, save_adapter
from effbench.nn.files.peft import load_peft, save_peft
from effbench.nn.model.adapters import find_parts, list_adapters
from effbench.nn.model.linear import matrix_shape
from effbench.nn.run import ModelRun

KINDS = [
    "lora(adapter='{}')",
    "prefix_tuning(length=4, hidden=16, adapter='{}')",
    "prompt_tuning(length=4, adapter='{}')",
]
LINEAR = [
    "rslora(rank=4, adapter='{}')",
    "dora(rank=4, adapter='{}')",
    "vera(rank=16, adapter='{}')",
    "adalora(rank=2, initial_rank=4, adapter='{}')",
]
MODULES = [
    "p_tuning_v2(length=4, adapter='{}')",
    "ia3(adapter='{}')",
    "adapter(width=4, adapter='{}')",
    "parallel_adapter(width=4, adapter='{}')",
    "llama_adapter(length=4, adapter='{}')",
]
FORMATS = [*KINDS, *LINEAR, *MODULES[:2]]  # that PEFT has for all of Llama, Qwen2 and GPT-2
PAIRS = [
    *itertools.product(KINDS, KINDS),
    *zip(MODULES, [*KINDS, *LINEAR[1:3]], strict=True),
    *((kind, kind) for kind in MODULES),
]
PLACES = [
    (kind, architecture)
    for kind, architecture in itertools.product([*KINDS, *MODULES], DENSE)
    if not (architecture == "opt" and kind.startswith(("adapter", "parallel_adapter")))  # which has no MLP to stand at
]


def trained(kinds: list[str], names: list[str], architecture: str = "llama") -> ModelRun:
    """A run with adapters that were trained one after the other."""
    run = toy_run(architecture)
    for number, (kind, name) in enumerate(zip(kinds, names, strict=True), 1):
        run.apply(parse_step(kind.format(name)))
        fit(run, steps=3, lr=number * 1e-2)  # else all would be alike: they start and read alike
    run.finish()
    return run


@pytest.mark.parametrize("kind", [*KINDS, *LINEAR, *MODULES])
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


@pytest.mark.parametrize(("kind", "second"), PAIRS)
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


@pytest.mark.parametrize(("kind", "second"), PAIRS)
def test_two_before_one_fit_are_both_trained(kind: str, second: str) -> None:
    run = toy_run()
    base = {id(parameter) for parameter in run.model.parameters()}
    run.apply(parse_step(kind.format("a")))
    run.apply(parse_step(second.format("b")))
    report = fit(run, steps=2, lr=1e-2)
    new = sum(parameter.numel() for parameter in run.model.parameters() if id(parameter) not in base)
    assert sum(group["parameters"] for group in report["groups"]) == new


@pytest.mark.parametrize("kind", FORMATS)
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


@pytest.mark.parametrize(("kind", "architecture"), PLACES)
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


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", LINEAR)
def test_what_stands_beside_linears_is_put_on_again(kind: str, architecture: str, tmp_path: Path) -> None:
    run = trained([kind], ["a"], architecture)
    written = save_adapter(run.model, tmp_path / "a", "a")
    other = toy_run(architecture)
    load_adapter(other.model, tmp_path / "a", "again")
    assert torch.allclose(probe(other), probe(run), atol=1e-6)
    assert not torch.equal(probe(other), probe(toy_run(architecture)))
    if kind.startswith("vera"):  # the pair is drawn again
        assert written == 4 * sum(sum(matrix_shape(m)[:1]) + 16 for m in toy_run(architecture).linears().values())


def test_unlike_kinds_stand_on_one_another_and_each_counts_alone() -> None:
    kinds = [KINDS[0], *LINEAR]
    run = trained(kinds, list("abcde"))
    alone = {}
    for kind, name in zip(kinds, "abcde", strict=True):
        run.adapter(name)
        alone[name] = probe(run)
        single = toy_run()
        single.apply(parse_step(kind.format(name)))
        parts = dict(find_parts(single.model))
        for path, part in find_parts(run.model, name):
            twin = parts[path.replace(".base", "")]
            if isinstance(part, SVDLinear):
                twin.p, twin.singular, twin.q = part.p, part.singular, part.q
            else:
                own = {key: value for key, value in part.state_dict().items() if "base" not in key}
                twin.load_state_dict(own, strict=False)
        assert torch.allclose(probe(single), alone[name], atol=1e-5), kind
    for name in ("c", "a", "e"):
        run.adapter(name)
        assert torch.equal(probe(run), alone[name])
    run.adapter(None)
    assert torch.equal(probe(run), probe(toy_run()))


@pytest.mark.parametrize(("save", "load"), [(save_adapter, load_adapter), (save_peft, load_peft)])
def test_a_file_names_the_model_that_it_is_for(save: Any, load: Any, tmp_path: Path) -> None:
    def ready(steps: str, name: str = "org/one") -> ModelRun:
        run = toy_run()
        run.model.config.name_or_path = name
        for step in parse(steps).steps:
            run.apply(step)
        return run

    dense, packed = ready("lora(adapter='a')"), ready("nf4(), lora(adapter='a')")
    double = "nf4(double_quant=True)"
    for run, folder in ((dense, "d"), (packed, "p")):
        for part in (part for _, part in find_parts(run.model)):
            part.b.data.normal_(std=0.1)
        save(run.model, tmp_path / folder, "a")
    for folder, steps, name in (
        ("d", "", "org/one"),
        ("p", "nf4()", "org/one"),
        ("d", "", "/models/two"),
        ("d", "", ""),
    ):
        other = ready(steps, name)
        load(other.model, tmp_path / folder, "x")
        assert torch.equal(probe(other), probe(dense if folder == "d" else packed))
    refused = [
        ("d", "", "org/two", "d: was trained on org/one, and this is org/two: put it on"),
        ("p", "", "org/one", r"p: was trained beside LutLinear\(.*block=64.*\), and here are dense linears: quantize"),
        ("d", "nf4()", "org/one", r"d: was trained beside dense linears, and here are LutLinear\("),
        ("p", double, "org/one", r"double_quant=False.*and here are .*double_quant=True"),
    ]
    for folder, steps, name, message in refused:
        other = ready(steps, name)
        before = [key for key, _ in other.model.named_modules()]
        with pytest.raises(Refused, match=message):
            load(other.model, tmp_path / folder, "x")
        assert [key for key, _ in other.model.named_modules()] == before


def test_a_file_that_says_nothing_of_its_model_is_read(tmp_path: Path) -> None:
    run = trained(KINDS[:1], ["a"])
    save_adapter(run.model, tmp_path / "a", "a")
    file = tmp_path / "a" / "adapter.json"
    told = json.loads(file.read_text())
    del told["base"]
    for part in told["parts"].values():  # as they were called before rsLoRA and DoRA shared the class
        part["class"] = part["class"].replace("_lowrank:", "lora:")
    file.write_text(json.dumps(told))
    other = toy_run()
    load_adapter(other.model, tmp_path / "a", "x")
    assert torch.allclose(probe(other), probe(run), atol=1e-6)


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
@pytest.mark.parametrize("kind", FORMATS)
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


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lora()", "qat()"),
        ("lora()", "wanda()"),
        ("lora(adapter='a')", "llm_qat(data='train')"),
        ("qat()", "nf4()"),
        ("adapter()", "student(start='random')"),
        ("prompt_tuning()", "student(start='random')"),
    ],
)
def test_a_step_does_not_take_away_what_waits_for_a_fit(first: str, second: str) -> None:
    run = toy_run()
    run.apply(parse_step(first))
    with pytest.raises(Refused, match="before a fit has trained it: put fit"):
        run.apply(parse_step(second))


@pytest.mark.parametrize(
    "steps", ["lora(), lora()", "nf4(), lora()", "prefix_tuning(), wanda()", "lora(), layer_pruning()"]
)
def test_what_stays_in_place_may_wait(steps: str) -> None:
    run = toy_run()
    for step in parse(steps).steps:
        run.apply(step)
