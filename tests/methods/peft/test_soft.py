"""What is trained outside linears: soft prompts and prefixes are measured, saved, and take their room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_training import fit

from effbench.checks import TOYS, probe, probe_model, toy, toy_run
from effbench.core.recipe import parse_step
from effbench.core.run import InferPlan
from effbench.core.views import Example
from effbench.methods.peft._prefix import Prefix
from effbench.methods.peft.llama_adapter import LLaMAAdapter
from effbench.methods.peft.p_tuning_v2 import PTuningV2
from effbench.methods.peft.prefix_tuning import PrefixTuning
from effbench.methods.peft.prompt_tuning import PromptTuning
from effbench.nn.files import artifact
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.feed import count_front, feed
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate, pack

FRONTS = [PromptTuning(length=5), PrefixTuning(length=5, hidden=16), PTuningV2(length=5)]
METHODS = [*FRONTS, LLaMAAdapter(length=5)]
ROWS = [list(range(1, 20)), [5, 6, 7, 8], list(range(40, 52))]


def trained(method: Any, architecture: str = "llama") -> ModelRun:
    run = toy_run(architecture)
    run.apply(method)
    fit(run, steps=3, lr=0.3)
    run.finish()
    return run


def alone(model: Any, row: list[int]) -> Tensor:
    """Logits of one row by itself."""
    return Engine(model, InferPlan()).logits(torch.tensor([row]))[0]


@pytest.mark.parametrize("architecture", TOYS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_row_gives_the_same_alone_padded_and_packed(method: Any, architecture: str) -> None:
    model = trained(method, architecture).model
    engine = Engine(model, InferPlan(), 0)
    width = max(map(len, ROWS))
    for side in ("right", "left"):
        padded = [[0] * (width - len(r)) + r if side == "left" else r + [0] * (width - len(r)) for r in ROWS]
        mask = torch.tensor(
            [
                [0] * (width - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (width - len(r))
                for r in ROWS
            ]
        ).bool()
        logits = engine.logits(torch.tensor(padded), mask)
        for row, own, real in zip(ROWS, logits, mask, strict=True):
            assert torch.allclose(own[real], alone(model, row), atol=2e-5), side
    examples = [Example(str(i), tuple(row)) for i, row in enumerate(ROWS)]
    for batch in (collate(examples, 0, engine.device), pack(examples, 32, 0, engine.device)):
        with torch.no_grad():
            logits = feed(model, batch).logits
        for place, row in enumerate(ROWS):
            assert torch.allclose(logits[batch["example"] == place], alone(model, row), atol=2e-5)


@pytest.mark.parametrize("architecture", TOYS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_generation_goes_on_from_what_was_scored(method: Any, architecture: str) -> None:
    """Greedy tokens through the cache are those of whole passes without one, padded or not."""
    model = trained(method, architecture).model
    engine = Engine(model, InferPlan(), 0)
    expected = []
    for row in ROWS:
        text = list(row)
        for _ in range(6):
            text.append(int(alone(model, text)[-1].argmax()))
        expected.append(text[len(row) :])
    assert engine.generate(ROWS, 6, set()) == expected
    assert [engine.generate([row], 6, set())[0] for row in ROWS] == expected


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scores_stream_through_a_cache_as_in_one_pass(method: Any) -> None:
    engine = open_engine(trained(method))
    pairs = [(row, [9, 8, 7]) for row in ROWS]
    whole = [scored.logprob for scored in engine.score(pairs)]
    assert [scored.logprob for scored in engine.score(pairs, block=1)] == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_was_trained_is_saved_and_is_not_the_base(method: Any, tmp_path: Path) -> None:
    run = trained(method)
    artifact.save(run.model, tmp_path / "a", run.storage)
    loaded = artifact.load(tmp_path / "a")
    assert torch.equal(probe_model(loaded), probe(run))
    assert not torch.allclose(probe_model(loaded), probe_model(toy()), atol=0.1)
    assert not any("trunk" in name or "head" in name for name, _ in loaded.named_modules() if "attn" in name)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_only_what_was_added_is_trained(method: Any) -> None:
    run = toy_run()
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    run.apply(method)
    report = fit(run, steps=3, lr=0.1, weight_decay=0.1, batch_size=len(run.data.pool))  # one batch, again and again
    assert all(torch.equal(run.model.get_parameter(name), value) for name, value in before.items())
    assert report["loss_last"] < report["loss_first"]


@pytest.mark.parametrize("method", FRONTS, ids=str)
def test_windows_are_bounded_by_positions_minus_what_stands_in_front(method: Any) -> None:
    run = toy_run()
    generator = torch.Generator().manual_seed(2)
    run.data.pool = [Example("d", tuple(torch.randint(1, 95, (900,), generator=generator).tolist()))]
    run.apply(method)
    widths: list[int] = []
    run.train.chain("batch").append(Watching(widths))
    fit(run, steps=2, max_length=2048, batch_size=2)
    assert max(widths) == 256 - 5 == open_engine(run).max_length and count_front(run.model) == 5


class Watching:
    """Takes down the widths of batches."""

    def __init__(self, widths: list[int]) -> None:
        self.widths = widths

    def batch(self, batch: dict[str, Tensor], run: Any) -> dict[str, Tensor]:
        self.widths.append(batch["input_ids"].shape[1])
        return batch


def test_a_soft_prompt_is_embeddings_in_front() -> None:
    run = trained(METHODS[0])
    tokens = run.model.get_input_embeddings()(torch.tensor([ROWS[0]]))
    front = run.model.soft_prompt.rows.to(tokens.dtype)[None]
    with torch.no_grad():
        expected = run.model(inputs_embeds=torch.cat([front, tokens], 1)).logits[0, 5:]
    assert torch.allclose(alone(run.model, ROWS[0]), expected, atol=1e-5)


def test_a_soft_prompt_starts_from_rows_of_the_table() -> None:
    run = toy_run()
    run.apply(PromptTuning(length=7))
    table = Blocks(run.model).embedding.get_parameter("weight")
    assert all(any(torch.equal(row, other) for other in table) for row in run.model.soft_prompt.rows)
    other = toy_run(seed=1)
    other.apply(PromptTuning(length=7))
    assert not torch.equal(other.model.soft_prompt.rows, run.model.soft_prompt.rows)


def test_the_mlp_of_a_prefix_is_dropped_and_what_it_made_stays() -> None:
    run = toy_run()
    run.apply(PrefixTuning(length=4, hidden=16))
    fit(run, steps=3, lr=0.1)
    during = probe(run)
    run.finish()
    prefixes = [module for module in run.model.modules() if isinstance(module, Prefix)]
    assert len(prefixes) == 2 and torch.allclose(probe(run), during, atol=2e-2)  # rounded to 16 bits
    assert not any(isinstance(module, nn.Tanh) for module in run.model.modules())
    before = toy_run()
    before.apply(PrefixTuning(length=4, hidden=16))
    assert not torch.allclose(probe(before), probe(toy_run()), atol=1e-2)  # a random prefix is no identity


def test_quantization_after_a_soft_prompt_calibrates_with_it() -> None:
    run = toy_run()
    for step in ("prompt_tuning(length=5)",):
        run.apply(parse_step(step))
    fit(run, steps=2, lr=0.1)
    run.apply(parse_step("gptq(bits=4)"))
    run.finish()
    assert torch.isfinite(probe(run)).all() and count_front(run.model) == 5


def test_soft_prompts_start_from_tokens_and_not_from_padding() -> None:
    run = toy_run(shape={"vocab_size": 160})
    run.model.get_input_embeddings().weight.data[96:] = 1e6
    run.apply(parse_step("prompt_tuning(length=60)"))
    soft = run.model.get_submodule("soft_prompt")
    assert float(soft.rows.detach().abs().max()) < 1e6
