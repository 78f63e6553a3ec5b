"""Steps of LoRA and DoRA in a fit beside the same of peft, and whether peft reads what is written here."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effbench.checks import toy_run
from effbench.core.recipe import parse_step
from effbench.core.views import Example
from effbench.nn.files.peft import load_peft, save_peft
from effbench.nn.run import ModelRun
from effbench.nn.train.fit import fit
from effbench.nn.train.samplers import Shuffled
from effbench.nn.train.settings import FitSettings

pytestmark = pytest.mark.slow

STEPS, LENGTH, BATCH = 10, 64, 8
RANK, ALPHA = 16, 32.0
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "layers": 2, "vocab_size": 512}
SETTINGS = FitSettings(steps=STEPS, lr=1e-3, batch_size=BATCH, schedule="constant", warmup=0.0, max_length=LENGTH)


def opened() -> ModelRun:
    """A toy model large enough for its linears to count, with random text."""
    run = toy_run(shape=SHAPE)
    rows = torch.randint(1, 96, (64, LENGTH), generator=torch.Generator().manual_seed(1))
    run.data.pool = [Example(str(number), tuple(row)) for number, row in enumerate(rows.tolist())]
    return run


def by_peft(kind: str) -> dict[str, float]:
    """Milliseconds of the processor in a step with peft, bytes saved by a forward pass, and bytes of the optimizer."""
    peft = pytest.importorskip("peft")
    run = opened()
    model = copy.deepcopy(run.model)
    targets = sorted({path.rpartition(".")[2] for path in run.linears()})
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=kind == "dora"
    )
    model = peft.get_peft_model(model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    sampler, examples = Shuffled(len(run.data.pool), 0), run.data.pool
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    times = []
    for step in range(STEPS):
        begin = time.process_time()
        ids = torch.tensor([examples[place].ids for place in sampler.draw(step, BATCH)])
        with torch.autograd.graph.saved_tensors_hooks(*((keep if step == 1 else _as_it_is), _as_it_is)):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (time.process_time() - begin))
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {
        "step_ms": statistics.median(times[2:]),
        "activation_bytes": sum(sizes.values()),
        "optimizer_bytes": sum(state.nbytes for state in states),
    }


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def by_fit(kind: str) -> dict[str, float]:
    """The same of a fit."""
    run = opened()
    run.apply(parse_step(f"{kind}(rank={RANK}, alpha={ALPHA})"))
    times: list[float] = []
    run.progress = lambda *_: times.append(time.process_time())
    cost: Any = fit(run, SETTINGS)["cost"]
    steps = [1000 * (after - before) for before, after in itertools.pairwise(times)]
    return {"step_ms": statistics.median(steps[1:])} | {k: cost[k] for k in ("activation_bytes", "optimizer_bytes")}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_step_costs_no_more_than_with_peft(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    pairs = [(by_peft(kind), by_fit(kind)) for _ in range(5)]  # in turns, so that both see the same machine
    ratios = {name: statistics.median(ours[name] / theirs[name] for theirs, ours in pairs) for name in pairs[0][0]}
    with capsys.disabled():
        told = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        print(f"\n{kind} beside peft's (target at most 1): {told}; {pairs[0][1]['step_ms']:.0f} ms")
    assert ratios["step_ms"] < 1.05 and ratios["activation_bytes"] < 1.01 and ratios["optimizer_bytes"] <= 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("step", ["lora(", "rslora(", "dora(", "vera(rank=16, ", "adalora(rank=2, initial_rank=4, "])
def test_peft_computes_with_what_is_written_here(step: str, architecture: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    run = toy_run(architecture)
    run.apply(parse_step(f"{step}adapter='a')"))
    fit(run, dataclasses.replace(SETTINGS, steps=6, lr=2e-2))
    run.settle()
    run.model.config.name_or_path = "org/base"
    save_peft(run.model, tmp_path / "a", "a")
    theirs = peft.PeftModel.from_pretrained(toy_run(architecture).model, tmp_path / "a").eval()
    assert theirs.peft_config["default"].base_model_name_or_path == "org/base"
    ids = torch.arange(48).view(2, 24)
    with torch.no_grad():
        ours, plain = run.model(ids).logits, toy_run(architecture).model(ids).logits
        assert torch.allclose(theirs(input_ids=ids).logits, ours, atol=1e-5)
    assert not torch.allclose(plain, ours, atol=1e-2)
    theirs.save_pretrained(tmp_path / "again")
    back = toy_run(architecture)
    back.model.config.name_or_path = "org/base"
    load_peft(back.model, tmp_path / "again", "b")
    with torch.no_grad():
        assert torch.allclose(back.model(ids).logits, ours, atol=1e-5)
