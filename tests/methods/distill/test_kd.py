"""Distillation: the loss is the paper's, the teacher is asked once, and what is kept of it on disk changes nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit

from effbench import ops
from effbench.checks import probe, probe_model, toy, toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.kinds import Train
from effbench.core.recipe import parse, parse_step
from effbench.core.run import Run
from effbench.methods.distill.kd import KD
from effbench.methods.distill.student import Student
from effbench.methods.peft.lora import LoRA, LoRALinear
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import replace
from effbench.nn.run import ModelRun
from effbench.nn.train import outputs, teacher
from effbench.nn.train.batches import collate, pack
from effbench.nn.train.outputs import Roles


def closed_form(z: Tensor, v: Tensor, y: Tensor, tau: float, alpha: float) -> Tensor:
    """The paper's loss of logits [N, V] and targets [N], written with probabilities."""
    p, q = torch.softmax(v / tau, -1), torch.softmax(z / tau, -1)
    hard = -torch.log(torch.softmax(z, -1)[torch.arange(len(y)), y])
    return ((1 - alpha) * hard + alpha * tau**2 * (p * (p / q).log()).sum(-1)).mean()


def losses(run: ModelRun, method: KD, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    roles = Roles(run, [method])
    with run.reading(roles), roles.open():
        return method.loss(batch, roles.feed(batch), run)


def student_run() -> ModelRun:
    """A student in float64 beside a teacher in float64, on uneven rows."""
    run = toy_run()
    run.apply(Student(layers=1))
    run.model.double()
    run.reference.double()
    return run


@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_loss_is_the_papers(tau: float, alpha: float) -> None:
    run = student_run()
    examples = [
        dataclasses.replace(example, ids=example.ids[:n]) for example, n in zip(run.data.pool, (9, 20, 5), strict=False)
    ]
    for batch in (collate(examples, 0, run.device), pack(examples, 32, 0, run.device)):
        terms = losses(run, KD(temperature=tau, alpha=alpha), batch)
        z, v, y = [], [], []
        for example in examples:
            ids = torch.tensor([example.ids])
            z.append(run.model(ids).logits[0, :-1])
            v.append(run.reference(ids).logits[0, :-1])
            y.append(ids[0, 1:])
        expected = closed_form(torch.cat(z), torch.cat(v), torch.cat(y), tau, alpha)
        assert float(sum(terms.values())) == pytest.approx(float(expected), abs=1e-10)


def test_the_gradient_has_the_prefactor_of_the_exact_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 50, generator=generator, dtype=torch.float64).requires_grad_()
    v = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    for tau in (1.0, 2.0, 4.0):
        (gradient,) = torch.autograd.grad(ops.load("soft_kl")(z, v, tau).sum(), z)
        expected = ((z / tau).softmax(-1) - (v / tau).softmax(-1)) / tau
        assert torch.allclose(gradient, expected, atol=1e-14)


@pytest.mark.parametrize("top_k", [None, 9])
def test_the_log_tells_how_far_the_student_is_from_the_teacher(top_k: int | None) -> None:
    run = student_run()
    batch = collate(run.data.pool[:3], 0, run.device)
    terms = losses(run, KD(temperature=2.0, alpha=0.25, top_k=top_k), batch)
    z, v = (run.role(role)(batch["input_ids"]).logits[:, :-1] for role in ("model", "reference"))
    told = {name: float(value.detach()) for name, value in run.watched.items()}
    hard = nn.functional.cross_entropy(z.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert told == pytest.approx(
        {
            "agreement": float((z.argmax(-1) == v.argmax(-1)).double().mean()),
            "cross_entropy": float(hard.detach()),
            "divergence": float(terms["soft"].detach()) / (0.25 * 4),
        }
    )


# The teacher's likeliest tokens


@pytest.mark.parametrize("tau", [0.7, 1.0, 2.0, 8.0])
def test_all_tokens_kept_equal_the_full_loss_at_every_temperature(tau: float) -> None:
    run = student_run()
    batch = collate(run.data.pool[:3], 0, run.device)
    full = losses(run, KD(temperature=tau), batch)
    kept = losses(run, KD(temperature=tau, top_k=96), batch)
    assert float(kept["soft"]) == pytest.approx(float(full["soft"]), abs=1e-10)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_rest_counts_as_one_token(tau: float) -> None:
    run = student_run()
    batch = collate(run.data.pool[:2], 0, run.device)
    found = losses(run, KD(temperature=tau, alpha=1.0, top_k=5), batch)["soft"]
    expected = []
    for example in run.data.pool[:2]:
        ids = torch.tensor([example.ids])
        p = (run.reference(ids).logits[0, :-1] / tau).softmax(-1)
        q = (run.model(ids).logits[0, :-1] / tau).softmax(-1)
        top = p.topk(5).indices
        rest = torch.ones_like(p).scatter(1, top, 0.0).bool()
        pairs = [(p.gather(1, top), q.gather(1, top)), ((p * rest).sum(1, True), (q * rest).sum(1, True))]
        expected.append(sum((a * (a / b).log()).sum(1) for a, b in pairs))
    assert float(found) == pytest.approx(tau**2 * float(torch.cat(expected).mean()), abs=1e-10)  # type: ignore[arg-type]


def test_predictions_on_disk_serve_whoever_feeds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    record = outputs.Taps.record
    monkeypatch.setattr(outputs.Taps, "record", lambda taps, batch: asked.append(taps._model) or record(taps, batch))
    reports = {}
    for name, method in {
        "plain": KD(),
        "first": KD(cache=True),
        "second": KD(cache=True),
        "k": KD(cache=True, top_k=9),
    }.items():
        run = toy_run()
        run.apply(Student(layers=1))
        run.cache = tmp_path
        run.apply(method)
        asked.clear()
        reports[name] = fit(run, steps=20)["loss_last"]
        assert (
            asked.count(run.reference) == {"plain": 20, "first": 16, "second": 0, "k": 16}[name]
        )  # 64 examples in batches of 4
    assert reports["first"] == reports["second"] == pytest.approx(reports["plain"], rel=1e-5)
    assert reports["k"] == pytest.approx(reports["plain"], rel=0.2) and reports["k"] != reports["plain"]


def test_what_is_kept_belongs_to_the_teachers_tensors_and_to_the_tokens(tmp_path: Path) -> None:
    run = toy_run()
    run.apply(Student(layers=1))
    run.cache = tmp_path
    batch = collate(run.data.pool[:2], 0, run.device)
    before = losses(run, KD(cache=True), batch)["soft"]
    number = len(list(tmp_path.iterdir()))
    wider = collate([*run.data.pool[:2], dataclasses.replace(run.data.pool[2], ids=tuple(range(1, 60)))], 0, run.device)
    losses(run, KD(cache=True), wider)  # padded: the same examples
    assert number == 2 and len(list(tmp_path.iterdir())) == 3
    with torch.no_grad():
        run.reference.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    run._shared.clear()
    assert float(losses(run, KD(cache=True), batch)["soft"]) != float(before)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_teacher_whose_adapter_is_off_is_another_one() -> None:
    """Its tensors are the same; so are those of one whose products are scaled otherwise."""
    run = toy_run()
    run.apply(LoRA(adapter="a"))
    fit(run, steps=2)
    digests = {teacher.digest_model(run.model)}
    run.adapter(None)
    digests.add(teacher.digest_model(run.model))
    run.adapter("a")
    assert teacher.digest_model(run.model) in digests and len(digests) == 2
    next(module for module in run.model.modules() if isinstance(module, LoRALinear)).scaling *= 2
    assert teacher.digest_model(run.model) not in digests


def test_the_disk_holds_no_more_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "BOUND", 60_000)
    run = toy_run()
    run.cache = tmp_path
    for start in range(0, 16, 4):
        losses(run, KD(cache=True), collate(run.data.pool[start : start + 4], 0, run.device))
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert 30_000 < sum(sizes) <= 60_000
    (tmp_path / "broken.safetensors").write_bytes(b"")  # a file that was cut off is made anew
    losses(run, KD(cache=True), collate(run.data.pool[:4], 0, run.device))


# Outputs of roles


def test_models_are_asked_once_a_step_for_all_methods_together() -> None:
    @dataclasses.dataclass(frozen=True)
    class Looking(Train):
        number: int = 1

        @property
        def reads(self) -> Any:
            return {
                "model": {"hidden", "attention"},
                "reference": {"logits", "hidden"} if self.number % 2 else {"attention"},
            }

        def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
            mine, theirs = run.outputs("model"), run.outputs("reference")
            rows, width = batch["input_ids"].shape
            assert [x.shape for x in mine.hidden] == [(rows, width, 128)] * 2 == [x.shape for x in theirs.hidden]
            assert (
                [x.shape for x in mine.attention]
                == [(rows, 4, width, width)] * 2
                == [x.shape for x in theirs.attention]
            )
            assert mine.hidden[0].requires_grad and mine.attention[0].requires_grad and mine.logits is out.logits
            assert not theirs.logits.requires_grad and not run.role("reference").training
            return {"zero": 0.0 * (mine.hidden[1] - theirs.hidden[1]).square().mean()}

    run = toy_run()
    calls: list[Any] = []
    run.reference.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    for number in (1, 2, 3):
        run.apply(Looking(number=number))
    fit(run, steps=3)
    assert len(calls) == 3
    assert not any(block._forward_hooks for block in Blocks(run.model).blocks)
    assert run.infer.empty


def test_hidden_states_are_those_of_blocks_that_were_put_in_place() -> None:
    """transformers' own `output_hidden_states` misses them."""

    class Doubling(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * self.block(*args, **kwargs)

    run = toy_run()
    run.model(torch.tensor([[1, 2]]), output_hidden_states=True)
    replace(run.model, "model.layers.1", Doubling(run.model.model.layers[1]))

    @dataclasses.dataclass(frozen=True)
    class Looking(Train):
        @property
        def reads(self) -> Any:
            return {"model": {"hidden"}}

        def loss(self, batch: Any, out: Any, run: Run) -> dict[str, Tensor]: ...

    roles = Roles(run, [Looking()])
    batch = collate(run.data.pool[:2], 0, run.device)
    with roles.open():
        out = roles.feed(batch)
    normed = run.model.model.norm(out.hidden[1])
    assert torch.allclose(run.model.lm_head(normed), out.logits, atol=1e-5)


def test_teachers_are_asked_without_dropout_and_all_modes_stay() -> None:
    """GPT-2 and OPT have dropout, which the student that learns does not lose."""
    seen: list[bool] = []

    @dataclasses.dataclass(frozen=True)
    class Looking(Train):
        @property
        def reads(self) -> Any:
            return {"reference": {"logits", "hidden", "scores"}, "mine": {"logits", "attention"}}

        def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
            for role in self.reads:
                logits = run.outputs(role).logits
                plain = run.role(role)(batch["input_ids"]).logits
                seen.append(torch.allclose(logits, plain, atol=1e-5) and not logits.requires_grad)
            again = run.model(batch["input_ids"]).logits
            assert not torch.allclose(out.logits, again, atol=1e-3)
            return {"zero": 0.0 * out.logits.sum()}

    run = toy_run("gpt2")
    run.snapshot("mine")
    run.apply(Looking())
    modes = [module.training for role in ("reference", "mine") for module in run.role(role).modules()]
    fit(run, steps=2)
    assert seen == [True] * 4 and not any(modes)
    assert modes == [module.training for role in ("reference", "mine") for module in run.role(role).modules()]


def test_a_teacher_of_fewer_positions_is_told() -> None:
    run = toy_run()
    run.shelve("small", toy("gpt2", n_positions=16, max_position_embeddings=16), run.tokenizer)
    run.apply(KD(teacher="small"))
    with pytest.raises(Unsupported, match="small has 16 positions, a row takes 32: give a smaller max_length"):
        fit(run, steps=1)


# Students, snapshots, and recipes that cannot work


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("method", [Student(layers=1), Student(layers=1, hidden=64, start="random")])
def test_students_are_smaller_and_train(architecture: str, method: Student) -> None:
    run = toy_run(architecture)
    run.apply(method)
    run.apply(KD())
    before = probe_model(run.reference)
    fit(run, steps=2)
    run.finish()
    assert run.original.parameters > sum(p.numel() for p in run.model.parameters())
    assert torch.equal(probe_model(run.reference), before) and len(Blocks(run.model)) == 1


def test_the_layers_of_a_student_are_the_models_own() -> None:
    run = toy_run(shape={"layers": 6})
    ours = Blocks(run.model).blocks
    run.apply(Student(layers=3))
    for mine, place in zip(Blocks(run.model).blocks, (0, 2, 5), strict=True):
        for name, parameter in mine.named_parameters():
            assert torch.equal(parameter, ours[place].get_parameter(name))
            assert parameter is not ours[place].get_parameter(name)
    run.apply(Student(layers=3))  # all of them: nothing changes
    with pytest.raises(Exception, match="the student would have 9 layers, the model has 3"):
        run.apply(Student(layers=9))


def test_a_snapshot_is_a_teacher() -> None:
    run = toy_run()
    fit(run, steps=3, lr=1e-2)
    trained = probe(run)
    for step in parse("snapshot(name='mine'), student(layers=1), kd(teacher='mine')").steps:
        run.apply(step)
    fit(run, steps=2)
    assert torch.equal(probe_model(run.role("mine")), trained)
    assert not torch.equal(probe_model(run.role("reference")), trained)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("kd()", r"kd\(\) acts through the fit that follows it, and none does"),
        ("bf16()", r"bf16\(\) acts through the fit that follows it, and none does"),
        ("fit(), kd()", "and none does"),
        ("kd(), lottery_ticket()", "and none does"),
        ("curriculum()", "and none does"),
        ("prompt_tuning(), fit(), prompt_tuning(), fit()", "Conflict: soft_prompt is already set by prompt_tuning"),
        ("prefix_tuning(adapter='a'), prefix_tuning(adapter='a'), fit()", "Conflict: prefix_a is already set"),
        ("lora(adapter='a'), fit(), lora(adapter='a', rank=4), fit()", "Conflict: lora_a is already set"),
        ("curriculum(), fit(layout='by_length')", "Conflict: train.sampler is already set by curriculum"),
        ("kd(teacher='mine'), fit()", "no step before it makes a model called 'mine'"),
        ("kd(teacher='mine'), snapshot(name='mine'), fit()", "no step before it makes a model called 'mine'"),
    ],
)
def test_recipes_that_cannot_work_are_wrong_usage(steps: str, message: str) -> None:
    with pytest.raises(Usage, match=message):
        parse(steps).check_fits()


@pytest.mark.parametrize(
    "steps", ["kd(temperature=0)", "kd(alpha=1.5)", "kd(top_k=0)", "kd(teacher='model')", "snapshot(name='model')"]
)
def test_settings_that_no_data_can_make_right(steps: str) -> None:
    with pytest.raises(Usage):
        parse_step(steps)
