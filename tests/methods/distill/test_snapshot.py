"""Teachers: copies and other models, the tokens that they share with the model, and what a cell knows of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from toys_training import fit

from effbench.cells.plan import digests
from effbench.checks import probe_model, toy, toy_run, toy_tokenizer
from effbench.core.errors import Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.methods.distill.kd import KD
from effbench.methods.distill.snapshot import Snapshot
from effbench.nn.files import artifact
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate
from effbench.nn.train.outputs import Roles
from effbench.nn.train.teacher import count_shared


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def renamed(**names: str) -> Any:
    """The toys' tokenizer with other tokens in the place of some."""
    tokenizer = copy.deepcopy(toy_tokenizer())
    vocabulary = {names.get(token, token): place for token, place in tokenizer.get_vocab().items()}
    tokenizer.get_vocab = lambda: vocabulary
    return tokenizer


def teach(model: Any, tokenizer: Any) -> ModelRun:
    run = toy_run()
    run.shelve("teacher", model, tokenizer)
    return run


def soft(run: ModelRun, method: KD) -> float:
    roles = Roles(run, [method])
    with run.reading(roles), roles.open():
        batch = collate(run.data.pool[:3], 0, run.device)
        return float(method.loss(batch, roles.feed(batch), run)["soft"])


def test_another_model_teaches(tmp_path: Path) -> None:
    other = toy("gpt2", seed=5, layers=3)
    run = toy_run()
    run.apply(Snapshot(model=str(save(tmp_path / "other", other))))
    teacher = run.role("teacher")
    assert torch.equal(probe_model(teacher), probe_model(other))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert count_shared(run, "teacher") == 96
    run.apply(KD(teacher="teacher"))
    fit(run, steps=2)
    assert torch.equal(probe_model(teacher), probe_model(other)) and not teacher.training


@pytest.mark.parametrize("steps", ["kd(teacher='teacher')", "kd(teacher='teacher', top_k=9)"])
def test_other_tokens_are_another_vocabulary(steps: str) -> None:
    run = teach(toy(seed=3), renamed(word7="seven"))
    message = "teacher has another vocabulary, 96 tokens, the model 96: token .* is 'seven' there and 'word7' here"
    with pytest.raises(Unsupported, match=message):
        soft(run, parse_step(steps))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [KD(teacher="teacher"), KD(teacher="teacher", top_k=96)])
def test_rows_that_pad_a_vocabulary_count_for_nothing(method: KD) -> None:
    """Those of the teacher, and those of the student."""
    wide = toy(seed=3, vocab_size=112)
    plain = toy(seed=3)
    plain.load_state_dict(
        {name: tensor[:96] if len(tensor) == 112 else tensor for name, tensor in wide.state_dict().items()}
    )
    run = teach(wide, toy_tokenizer())
    assert count_shared(run, "teacher") == 96
    expected = soft(teach(plain, toy_tokenizer()), method)
    assert soft(run, method) == pytest.approx(expected, rel=1e-5) != 0.0
    run.model, run.reference = wide, toy()  # type: ignore[misc]
    run.shelve("teacher", toy(), run.tokenizer)
    run._shared.clear()
    here = soft(run, method)
    run.model = plain
    run._shared.clear()
    assert here == pytest.approx(soft(run, method), rel=1e-5)


def test_without_a_tokenizer_sizes_tell() -> None:
    assert count_shared(teach(toy(seed=3), None), "teacher") == 96
    with pytest.raises(Unsupported, match="teacher predicts 112 tokens, the model 96: no tokenizer"):
        count_shared(teach(toy(vocab_size=112), None), "teacher")


def test_the_files_of_a_teacher_are_part_of_the_cell(tmp_path: Path) -> None:
    folder = save(tmp_path / "other", toy(seed=5))
    recipe = parse(f"snapshot(model='{folder}'), kd(teacher='teacher'), fit()")
    before = digests(recipe, [], "", "")["files"]
    (folder / "notes.md").write_text("no part of it")
    assert digests(recipe, [], "", "")["files"] == before
    save(folder, toy(seed=6))
    assert digests(recipe, [], "", "")["files"] != before
    assert "files" not in digests(parse("snapshot(), kd(teacher='teacher'), fit()"), [], "", "")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/folder", "no such folder; a model is"),
        ("gguf:none.gguf", "no such file"),
        ("org/name", "write org/name@COMMIT"),
    ],
)
def test_a_teacher_that_is_not_there_is_wrong_usage(model: str, message: str) -> None:
    with pytest.raises(Usage, match=message):
        digests(parse(f"snapshot(model='{model}'), kd(teacher='teacher'), fit()"), [], "", "")


def test_a_shape_teaches_nothing() -> None:
    with pytest.raises(Usage, match="random weights"):
        parse_step("snapshot(model='shape:llama-3.1-8b')")


def test_a_damaged_teacher_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "other", toy())
    (folder / "model.safetensors").write_bytes(b"none")
    with pytest.raises(Unsupported, match="other cannot be read") as caught:
        toy_run().apply(Snapshot(model=str(folder)))
    assert "\n" not in str(caught.value)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(Usage, match="a model called 'teacher' is there already"):
        parse("fit(), snapshot(), student(), snapshot(), fit()").check_fits()


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_students_from_scratch_are_saved_and_read(architecture: str, tmp_path: Path) -> None:
    run = toy_run(architecture)
    run.apply(parse_step("student(layers=1, start='random')"))
    run.finish()
    artifact.save(run.model, tmp_path / "a", run.storage)
    read = artifact.load(tmp_path / "a", torch.float32)
    assert torch.equal(probe_model(read), probe_model(run.model))


def test_heads_of_an_odd_width_are_unsupported() -> None:
    with pytest.raises(Unsupported, match="rotation takes pairs"):
        toy_run().apply(parse_step("student(layers=1, hidden=12, start='random')"))
