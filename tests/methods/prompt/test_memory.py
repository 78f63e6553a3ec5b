"""Compressors into memory tokens: what they go together with, and what probes say of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from toys_training import fit

from effbench import sources
from effbench.checks import PROMPT, PROMPTS, probe, score, toy_run
from effbench.core.errors import Outcome, Refused, Unsupported
from effbench.core.kinds import Train
from effbench.core.recipe import parse
from effbench.nn.files.load import open_run
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.memory import KeyValues, count_kept, find_lead, remember
from effbench.nn.run import ModelRun
from effbench.probes import completion, compression, perplexity, quality
from effbench.probes.inputs import require_effect

ENCODER = "lora(rank=2, adapter='encoder')"
RECIPES = {
    "gist": "gist(tokens=2)",
    "autocompressor": "autocompressor(tokens=2, length=8)",
    "icae": f"{ENCODER}, icae(tokens=1, rate=8)",
}


def prepared(steps: str, architecture: str = "llama") -> ModelRun:
    run = toy_run(architecture)
    for step in parse(steps).steps:
        run.apply(step)
    return run


def fed(run: ModelRun) -> list[Any]:
    """The toy prompt as it is fed."""
    ids = run.data.encode_prompt(PROMPT.text())
    return [*remember(run, ids, find_lead(run.data.encode_prompt, PROMPT, ids))]


@pytest.mark.parametrize("key", RECIPES)
@pytest.mark.parametrize("steps", ["h2o(budget=6)", "kv_quant(key_bits=4, value_bits=4)", "sliding_window(window=4)"])
def test_caches_hold_memory_as_they_hold_tokens(key, steps):
    """What is read in a batch is what is read alone, and scoring goes by the changed cache."""
    run = prepared(RECIPES[key])
    fit(run, steps=1, lr=1e-3)
    plain = open_engine(run).score([(fed(run), [9, 7, 5])], block=1)[0].token_logprobs
    for step in parse(steps).steps:
        run.apply(step)
    engine, prompts = open_engine(run), [fed(run), [5, 6, 7], fed(run)[:-1]]
    pairs = [(prompt, [9, 7, 5]) for prompt in prompts]
    together = [entry.token_logprobs for entry in engine.score(pairs)]
    assert engine.uses[0].changed
    for found, pair in zip(together, pairs, strict=True):
        assert found == pytest.approx(engine.score([pair])[0].token_logprobs, abs=1e-5)
    assert together[0] != pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("key", RECIPES)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "mixtral", "opt", "gpt2", "gpt_neox"])
def test_every_architecture_reads_its_memory(key, architecture):
    targets = "" if architecture != "mixtral" else ", targets=('q_proj', 'v_proj')"
    run = prepared(RECIPES[key].replace("rank=2", f"rank=2{targets}"), architecture)
    fit(run, steps=1, lr=1e-3)
    run.finish()
    tokens = fed(run)
    assert count_kept(tokens) < len(run.data.encode_prompt(PROMPT.text()))
    texts = open_engine(run).generate([tokens, PROMPTS[0], tokens], 4, set())
    assert texts[0] == texts[2] == open_engine(run).generate([tokens], 4, set())[0]


@pytest.mark.parametrize("key", RECIPES)
def test_what_has_no_memory_is_read_as_it_was(key):
    """Prompts without memory go by the model alone."""
    run = prepared(RECIPES[key])
    fit(run, steps=2, lr=1e-2)
    run.finish()
    with torch.no_grad():
        assert torch.equal(
            run.model(torch.tensor([[5, 6, 7]])).logits, open_engine(run).logits(torch.tensor([[5, 6, 7]]))
        )
    run.infer.acted.clear()
    score(run)
    with pytest.raises(Refused, match="changed nothing"):
        require_effect(run, run.infer.touches)
    fed(run)
    require_effect(run, run.infer.touches)


@pytest.mark.parametrize("key", RECIPES)
@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("{}, random_tokens()", "leaves no text to shorten: put random_tokens() before it"),
        ("{}, gist()", "there is a memory already|already set by"),
        ("{}, kd()", "feeds batches in a way of its own, in which kd() cannot have a part"),
        ("{}, attention_transfer()", "in which attention_transfer() cannot have a part"),
        ("{}, speculative(k=2)", "has another model read the prompt"),
    ],
)
def test_what_cannot_go_with_memory_says_so(key, steps, reason):
    with pytest.raises(Exception, match=reason.replace("(", r"\(").replace(")", r"\)")) as caught:
        run = prepared(steps.format(RECIPES[key]))
        fit(run, steps=1)
        fed(run)
    assert isinstance(caught.value, Outcome) or "Conflict" in str(caught.value)


@dataclass(frozen=True)
class Engine(Train):
    """Stands for an engine of several processes."""

    claims = ("train.parallel",)

    def __str__(self) -> str:
        return "engine()"


@dataclass(frozen=True)
class Rewriter(Train):
    """Changes batches."""

    def batch(self, batch: dict[str, torch.Tensor], run: Any) -> dict[str, torch.Tensor]:
        return batch

    def __str__(self) -> str:
        return "rewriter()"


@pytest.mark.parametrize("key", RECIPES)
def test_batches_are_laid_out_last_and_in_one_process(key):
    for other, reason in ((Engine(), r"in which engine\(\) cannot"), (Rewriter(), r"rewriter\(\) changes batches")):
        run = prepared(RECIPES[key])
        run.apply(other)
        with pytest.raises(Unsupported, match=reason):
            fit(run, steps=1)
    run = toy_run()
    run.apply(Rewriter())
    for step in parse(RECIPES[key]).steps:
        run.apply(step)
    fit(run, steps=1)


@pytest.mark.parametrize("settings", [{"lr": (1e-3, 1e-2)}, {"validate": 1}])
def test_plain_text_does_not_choose_for_memory(settings):
    with pytest.raises(Unsupported, match="the validation loss is of plain text"):
        fit(prepared("gist()"), steps=1, **settings)


@pytest.mark.parametrize("steps", ["random_tokens(keep=0.5), {}", "{}, rtn(bits=8)", "{}, bf16()", "{}, lora(rank=2)"])
@pytest.mark.parametrize("key", ["gist", "autocompressor"])
def test_what_goes_with_memory(key, steps):
    first, _, rest = steps.partition("{}")
    run = prepared(f"{first}{RECIPES[key]}{rest if 'rtn' not in rest else ''}")
    fit(run, steps=2, lr=1e-2)
    for step in parse(rest.strip(", ") if "rtn" in rest else "").steps:
        run.apply(step)
    run.finish()
    before = open_engine(run).score([(fed(run), [9, 7])])[0].token_logprobs
    assert torch.isfinite(torch.tensor(before)).all()
    rows = run.model.memory.rows
    assert not torch.equal(rows, prepared(RECIPES[key]).model.memory.rows), "memory tokens were not trained"


def test_steps_that_freeze_the_model_leave_memory_tokens_trainable():
    run = prepared(f"{RECIPES['gist']}, lora(rank=2)")
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert "memory.rows" in trained
    assert all(name == "memory.rows" or name.endswith((".a", ".b")) for name in trained)


@pytest.fixture(scope="module")
def trained() -> dict[str, ModelRun]:
    """Runs on the embedded model, a few steps into questions about contexts."""
    settings = {"calibration_sequences": 2, "calibration_length": 32}
    runs = {}
    for key, steps in RECIPES.items():
        args = (sources.model("tiny", None), sources.data("tiny:questions"), "cpu", "float32", 0, settings)
        run = runs[key] = open_run(*args)
        for step in parse(steps).steps:
            run.apply(step)
        fit(run, steps=1, batch_size=2, max_length=256)
        run.finish()
    return runs


@pytest.mark.parametrize("key", RECIPES)
def test_memory_tokens_count_as_tokens_kept(trained, key):
    run = trained[key]
    settings = {"tasks": ["tiny_contexts"], "limit": 3}
    run.infer.acted.clear()
    kept = quality.take(run, settings).metrics["tiny_contexts_prompt_kept"].value
    asks = [entry for entry in _ask(run, settings)]
    share = sum(count_kept(ask.ids) for ask in asks) / sum(len(ask.given) for ask in asks)
    assert kept == pytest.approx(share)
    memory = [token for token in asks[0].ids if not isinstance(token, int)]
    ids = [token for token in asks[0].ids if isinstance(token, int)]
    assert ids == asks[0].given[-len(ids) :], "the question stays as it is"
    lead = len(asks[0].given) - len(ids)
    expected = {"gist": 2, "autocompressor": 2 * -(-lead // 8), "icae": -(-lead // 8) + 1}[key]
    assert count_kept(memory) == expected
    assert isinstance(memory[0], KeyValues) is (key == "gist")
    told = compression.take(run, settings).metrics
    assert told["prompt_kept"].value == pytest.approx(share)
    assert told["compressor_ms_per_prompt"].value > 0


def _ask(run: ModelRun, settings: dict[str, Any]) -> list[Any]:
    from effbench.probes.prompts import ask_tasks

    return next(iter(ask_tasks(run, settings, 3)))


@pytest.mark.parametrize("key", RECIPES)
def test_answers_are_read_from_memory(trained, key):
    """Completions change with the context that the memory is made of, and only through it."""
    run = trained[key]
    run.infer.acted.clear()
    completion.take(run, {"limit": 4})
    examples = [example for example in run.data.unseen if example.prompt][:2]
    ids = [list(example.ids[: example.prompt]) for example in examples]
    leads = [find_lead(run.data.encode_prompt, e.segments, i) for e, i in zip(examples, ids, strict=True)]
    first = [*remember(run, ids[0], leads[0])]
    memory = [token for token in first if not isinstance(token, int)]
    other = [*[t for t in remember(run, ids[1], leads[1]) if not isinstance(t, int)], *first[len(memory) :]]
    scores = [open_engine(run).score([(tokens, [7, 9])])[0].logprob for tokens in (first, first, other)]
    assert scores[0] == scores[1] != scores[2]


def test_what_prompts_hold_is_no_matter_of_perplexity(trained):
    assert "prompt" not in perplexity.SEES
    assert trained["gist"].infer.touches == {"prompt"}
    assert torch.isfinite(probe(prepared(RECIPES["gist"]))).all()
