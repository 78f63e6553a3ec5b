"""Scoring holds a slice of the logits at a time: bounded memory, and the numbers of the whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.checks import toy_run
from effbench.core.run import InferPlan
from effbench.machine.peak import PeakMemory
from effbench.nn.infer import engine as engines
from effbench.nn.infer.engine import Engine
from effbench.probes import distance, inputs
from effbench.probes.inputs import Windows

VOCABULARY, LENGTH = 131_072, 1024
WHOLE = 4 * VOCABULARY * LENGTH  # bytes of the float32 logits of one row


@pytest.fixture(scope="module")
def large() -> LlamaForCausalLM:
    """A model of nothing but a large vocabulary and long rows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=LENGTH + 1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def fake_run(model: Any, reference: Any = None) -> Any:
    """What `predictions` and `distance.take` ask of a run."""
    shared: dict[Any, Any] = {}

    def share(key: Any, compute: Any) -> Any:
        return shared.setdefault(key, compute())

    return SimpleNamespace(
        model=model,
        reference=reference or model,
        infer=InferPlan(),
        pad=0,
        device=torch.device("cpu"),
        share=share,
        progress=lambda unit, done, total: None,
    )


def score_row(model: Any) -> object:
    ids = torch.arange(LENGTH + 1).tolist()
    return Engine(model, InferPlan()).score([(ids[:1], ids[1:])])


def score_blocks(model: Any) -> object:
    ids = torch.arange(LENGTH + 1).tolist()
    return Engine(model, InferPlan()).score([(ids[:1], ids[1:])], block=512)


def take_nll(model: Any) -> object:
    return inputs.nll(fake_run(model), Windows(torch.arange(LENGTH)[None], 1, "", ""), None)


def take_distance(model: Any) -> object:
    text = Windows(torch.arange(LENGTH)[None], 1, "cut", "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distance, "windows", lambda run, settings: text)
        return distance.take(fake_run(model), {})


@pytest.mark.parametrize(
    "work", [score_row, *(pytest.param(one, marks=pytest.mark.slow) for one in (score_blocks, take_nll, take_distance))]
)
def test_memory_of_scoring_does_not_grow_with_the_vocabulary(large: Any, work: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(engines.SLICE_BYTES, "cpu", 2**22)  # far below the bound: an allocator keeps what it once had
    work(large)  # what is lazy
    with PeakMemory(torch.device("cpu")) as peak:
        work(large)
    assert peak.bytes["rss"] < WHOLE / 3
    with PeakMemory(torch.device("cpu")) as peak:  # a planted violation: the whole row at once
        large(torch.arange(LENGTH)[None]).logits.log_softmax(-1)
    assert peak.bytes["rss"] > WHOLE


def whole(model: Any, context: list[int], continuation: list[int]) -> Tensor:
    """Log-probabilities of a continuation, all logits at once."""
    ids = torch.tensor(context + continuation)
    with torch.no_grad():
        rows: Tensor = model(ids[None]).logits[0, len(context) - 1 : -1].float().log_softmax(-1)
    return rows.gather(1, torch.tensor(continuation)[:, None])[:, 0]


PAIRS = [
    ([1, 2, 3], [4, 5, 6, 7, 8]),
    ([1, 2, 3, 4, 5, 6, 7], [9]),  # of one row with the one above
    ([1, 2, 3, 4, 5, 6, 7], [8]),
    ([11], [12]),
    ([20, 21], list(range(30, 70))),
]


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("block", [None, 1, 7])
def test_slices_give_the_numbers_of_the_whole(architecture: str, rows: int, block: Any, monkeypatch: Any) -> None:
    run = toy_run(architecture)
    monkeypatch.setitem(engines.SLICE_BYTES, "cpu", rows * 4 * run.model.config.vocab_size)
    found = Engine(run.model, InferPlan()).score(PAIRS, block=block)
    for (context, continuation), scored in zip(PAIRS, found, strict=True):
        truth = whole(run.model, context, continuation)
        assert scored.token_logprobs == pytest.approx(truth.tolist(), rel=1e-6, abs=1e-6)
        assert scored.logprob == pytest.approx(float(truth.double().sum()), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_sliced_windows_give_the_numbers_of_the_whole(rows: int, monkeypatch: Any) -> None:
    run, other = toy_run("llama"), toy_run("llama")
    for parameter in other.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setitem(engines.SLICE_BYTES, "cpu", rows * 4 * run.model.config.vocab_size)
    text = Windows(torch.randint(1, 90, (5, 24), generator=torch.Generator().manual_seed(0)), 7, "cut", "text")
    monkeypatch.setattr(distance, "windows", lambda *_: text)
    pair = fake_run(other.model, run.model)
    reading = distance.take(pair, {})
    kl, nll = [], []
    with torch.no_grad():
        for ids in text.ids:
            p, q = (model(ids[None]).logits[0, 6:-1].log_softmax(-1) for model in (run.model, other.model))
            kl.append(float((p.exp() * (p - q)).sum(-1).double().mean()))
            nll.append(-float(q.gather(1, ids[7:, None]).double().mean()))
    assert reading.samples["kl_nats_per_token"] == pytest.approx(kl, rel=1e-5, abs=1e-7)
    assert inputs.nll(pair, text, None) == pytest.approx(nll, rel=1e-6)
    assert inputs.nll(fake_run(other.model), text, None) == inputs.nll(pair, text, None)  # as by a pass of their own


def test_a_block_of_context_is_not_scored() -> None:
    """The head sees one row for the context and one for every token that predicts another."""
    run = toy_run("llama")
    seen: list[int] = []
    run.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    Engine(run.model, InferPlan()).score([(list(range(1, 40)), [5, 6, 7])], block=2)
    assert sum(seen) == 3
