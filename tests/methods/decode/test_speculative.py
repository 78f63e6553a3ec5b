"""Speculative decoding: the text is the verifier's own, whatever is drafted."""

from __future__ import annotations

import copy
import functools
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from toys_cache import run_of, text

from effbench import probes
from effbench.checks import toy
from effbench.core.errors import Refused, Unsupported
from effbench.core.recipe import parse_step
from effbench.core.run import InferPlan
from effbench.methods.decode import speculative
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.infer.sampling import Sampling
from effbench.probes import quality

DRAFTS = [
    "rtn(bits=4)",
    "rtn(bits=2)",
    "layer_pruning(fraction=0.5)",
    "student()",
    "h2o(keep=0.3)",
    "kivi(group=8,residual=8)",
    "sliding_window(window=8)",
]
CASES = [(draft, name) for name in ("llama", "qwen3", "gpt_neox", "opt") for draft in DRAFTS]
CASES += [("streaming_llm(sinks=2,window=9)", name) for name in ("llama", "qwen3", "gpt_neox")]


@pytest.mark.parametrize(("draft", "architecture"), CASES)
def test_greedy_text_is_the_verifiers_token_for_token(draft: str, architecture: str) -> None:
    run = run_of(f"{draft}, speculative(k=3)", architecture)
    prompts = [text(30), text(1, seed=2)]
    assert open_engine(run).generate(prompts, 16, set()) == open_engine(run, run.reference).generate(prompts, 16, set())
    assert all(0 <= count <= 3 for count in run.infer.slot("decoder").accepted)


def test_a_draft_that_is_the_verifier_is_taken_whole() -> None:
    run = run_of("speculative(k=3)")
    open_engine(run).generate([text(30)], 1 + 4 * 4, set())
    assert run.infer.slot("decoder").accepted == [3] * 4


@pytest.mark.parametrize("cut", range(1, 12))
def test_passes_give_what_they_add_up_to_a_stop_token(cut: int) -> None:
    """The prompt's token is of no pass; the stop token is, and what was drafted behind it is not."""
    run = run_of("speculative(k=3)")
    engine, decoder = open_engine(run), run.infer.slot("decoder")
    (whole,) = engine.generate([text(30)], 13, set())
    assert decoder.committed == [4, 4, 4]
    cut = whole.index(whole[cut])  # where that token comes first
    decoder.committed.clear()
    (short,) = engine.generate([text(30)], 13, {whole[cut]})
    assert short == whole[:cut] and sum(decoder.committed) == cut


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("k", "left"), [(4, 10), (40, 5), (1, 2), (4, 1)])
def test_no_more_is_drafted_than_is_left_of_text_and_positions(architecture: str, k: int, left: int) -> None:
    """A prompt that leaves just the positions of its continuation, learned ones too."""
    run = run_of(f"rtn(bits=2), speculative(k={k})", architecture)
    prompt = text(256 - left)
    assert open_engine(run).generate([prompt], left, set()) == open_engine(run, run.reference).generate(
        [prompt], left, set()
    )
    assert len(open_engine(run).generate([text(5)], left, set())[0]) == left


@pytest.mark.parametrize("k", [1, 4])
def test_texts_end_before_their_first_stop_token(k: int) -> None:
    run = run_of(f"rtn(bits=2), speculative(k={k})", "opt")
    prompts = [text(n, seed=n) for n in (30, 12, 3)]
    whole = open_engine(run).generate(prompts, 16, set())
    for place in (0, 2, 5):
        stop = whole[0][place]
        cut = [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in whole]
        assert open_engine(run).generate(prompts, 16, {stop}) == cut


@pytest.mark.parametrize("k", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_texts_end_at_a_stop_string_inside_of_a_block(k: int) -> None:
    """One of two tokens, at every place of a text: the answer is that of the verifier alone."""
    run = run_of(f"rtn(bits=4), speculative(k={k})", initializer_range=0.2)
    drafted, plain = quality.EngineLM(run, {}), quality.EngineLM(run, {})
    plain.engine = open_engine(run, run.reference)
    prompt = run.tokenizer.decode(text(20))

    def answer(lm: quality.EngineLM, *stops: str) -> str:
        asked = (prompt, {"until": [*stops], "max_gen_toks": 20})
        return lm.generate_until([SimpleNamespace(args=asked, task_name="t", doc={}, doc_id=0)])[0]

    whole = answer(plain)
    words = whole.split()
    assert answer(drafted) == whole and len(words) > 10
    assert any(0 < count < k for count in run.infer.slot("decoder").accepted)
    for place in range(len(words) - 1):
        stop = " ".join(words[place : place + 2])
        assert answer(drafted, stop) == answer(plain, stop) == whole.split(stop)[0]


def test_a_draft_with_another_vocabulary_is_unsupported() -> None:
    """Also where it has as many tokens."""
    run = run_of("")
    tokenizer = copy.deepcopy(run.tokenizer)
    vocabulary = {token.upper(): place for token, place in tokenizer.get_vocab().items()}
    tokenizer.get_vocab = lambda: vocabulary
    run.shelve("teacher", toy(seed=1), tokenizer)
    with pytest.raises(Unsupported, match="teacher has another vocabulary"):
        run.apply(parse_step("speculative(verifier='teacher')"))


def test_scores_are_the_verifiers_and_what_reads_the_model_itself_is_refused() -> None:
    run = run_of("rtn(bits=2), speculative()")
    pairs = [(text(20), text(6, seed=1)), (text(9, seed=2), text(3, seed=3))]
    assert open_engine(run).score(pairs) == open_engine(run, run.reference).score(pairs)
    for ours, theirs in zip(
        open_engine(run).predict(pairs), open_engine(run, run.reference).predict(pairs), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert Engine(run.model, InferPlan()).score(pairs) != open_engine(run, run.reference).score(pairs)
    for probe in ("perplexity", "distance", "speed", "flops"):
        with pytest.raises(Refused, match=f"{probe} does not see what the recipe changes: decoder"):
            probes.take(probe, run, {})


def test_a_sampled_text_depends_on_its_seed_and_number_alone() -> None:
    run = run_of("rtn(bits=2), speculative(k=2)", initializer_range=0.2)
    prompts = [text(20), text(7, seed=1)]
    made = open_engine(run).generate(prompts, 8, set(), sampling=Sampling(seed=1))
    assert open_engine(run).generate(prompts, 8, set(), sampling=Sampling(seed=1)) == made
    assert open_engine(run).generate(prompts[:1], 8, set(), sampling=Sampling(seed=1)) == made[:1]
    assert open_engine(run).generate(prompts, 8, set(), sampling=Sampling(seed=2)) != made


# The distribution of sampled texts


def load_wrong(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> Any:
    """The module with one expression of its source replaced."""
    source = Path(speculative.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1
    module = ModuleType("planted_speculative")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source.replace(right, wrong), module.__dict__)
    return module


class Table:
    """An engine whose logits depend on the last token alone."""

    device = torch.device("cpu")
    vocabulary = None

    def __init__(self, probabilities: Tensor) -> None:
        self.table = probabilities.log()

    def read(self, prompts: list[list[int]], croppable: bool) -> tuple[Any, Tensor]:
        return SimpleNamespace(), self.table[[prompt[-1] for prompt in prompts]]

    def extend(self, state: Any, ids: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[ids])

    def head(self, states: Tensor) -> Tensor:
        return states

    def crop(self, state: Any, tokens: int) -> None:
        pass

    def settle(self, state: Any) -> None:
        pass

    def logits(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def random_table(seed: int, size: int = 8) -> Table:
    """Distributions behind each of so many tokens."""
    return Table((2 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))).softmax(-1))


def find_p(module: Any, draft: Any, verifier: Any, sampling: Sampling, samples: int) -> list[float]:
    """p of chi-square tests of the first two sampled tokens, and of the two behind, by their exact joint distribution.

    Of a vocabulary of eight; the first token is the verifier's, the others are drafted.
    """
    decoder = module.Speculation(2, "reference", verifier)
    made = decoder.generate(draft, [[1, 2, 3]] * samples, 5, set(), sampling)
    assert any(decoder.accepted)
    texts, exact = [[1, 2, 3]], torch.ones(1, dtype=torch.float64)
    found: list[float] = []
    for place in range(3):
        following = sampling.warp(verifier.logits(torch.tensor(texts))[:, -1]).double()
        exact = (exact[:, None] * following).flatten()
        texts = [[*tokens, more] for tokens in texts for more in range(8)]
        if place:
            counts = Counter(8 * tokens[place - 1] + tokens[place] for tokens in made)
            found.append(compare([counts[i] for i in range(64)], exact.view(-1, 64).sum(0)))
    return found


def compare(counts: list[int], probabilities: Tensor) -> float:
    """p of the counts; what is rare counts together."""
    seen, expected = torch.tensor(counts).double(), sum(counts) * probabilities / probabilities.sum()
    assert not seen[expected == 0].any()
    rare = expected < 5
    seen, expected = (torch.cat([values[~rare], values[rare].sum()[None]]) for values in (seen, expected))
    statistic = float(((seen - expected) ** 2 / expected)[expected > 0].sum())
    return float(stats.chi2.sf(statistic, int((expected > 0).sum()) - 1))


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=3), Sampling(temperature=0.7, top_p=0.9, seed=4)], ids=["plain", "cut"]
)
def test_sampled_tokens_are_distributed_as_the_verifiers(sampling: Sampling) -> None:
    assert min(find_p(speculative, random_table(0), random_table(1), sampling, 3000)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [Sampling(seed=5), Sampling(temperature=0.7, top_p=0.8, seed=6)], ids=["plain", "cut"]
)
def test_whole_blocks_of_100000_texts_are_distributed_as_the_verifiers(sampling: Sampling) -> None:
    """The joint of a first token, two that are drafted and the one behind them, over a vocabulary of five.

    Of 625 texts those that the verifier's nuclei leave out never come, though the draft's nuclei hold some of them.
    """
    size, samples, start = 5, 100_000, 1
    draft, verifier = random_table(3, size), random_table(11, size)
    decoder = speculative.Speculation(2, "reference", verifier)
    made = decoder.generate(draft, [[start]] * samples, 4, set(), sampling)
    assert set(decoder.accepted) == {0, 1, 2}
    theirs, ours = (sampling.warp(table.table).double() for table in (verifier, draft))
    cut = sampling.top_p < 1
    assert bool(((theirs > 0) != (ours > 0)).any()) == cut
    exact = theirs[start]
    for _ in range(3):
        exact = (exact.view(-1, size)[..., None] * theirs).flatten()
    assert bool((exact == 0).any()) == cut
    counts = Counter(functools.reduce(lambda name, token: size * name + token, text, 0) for text in made)
    assert compare([counts[i] for i in range(size**4)], exact) > 1e-3


def test_so_are_those_of_a_model() -> None:
    """The draft is a rounded copy."""
    run = run_of("rtn(bits=2)", vocab_size=8, layers=1, initializer_range=0.3)
    assert min(find_p(speculative, open_engine(run), open_engine(run, run.reference), Sampling(seed=3), 300)) > 1e-3


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if luck[i] >= odds[i]", "if False"),  # all drafts are taken
        ("(p[n] - q[n]).clamp(min=0)", "p[n]"),  # no residual
        ("float(p[i][x] / q[i][x])", "float(p[i][x])"),  # odds that do not ask what the draft thought
    ],
)
def test_a_wrong_rule_fails_the_same_test(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    module = load_wrong(monkeypatch, right, wrong)
    assert max(find_p(module, random_table(0), random_table(1), Sampling(seed=3), 1500)) < 1e-6


@pytest.mark.parametrize("k", [1, 2, 5])
def test_tokens_of_a_pass_are_their_closed_form(k: int) -> None:
    """E = (1 - a^(k+1)) / (1 - a), where a = sum min(p, q) is how often a draft is taken (equation 1 of the paper)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    a = float(torch.minimum(p, q).sum())
    decoder = speculative.Speculation(k, "reference", Table(p.expand(3, 3)))
    decoder.generate(Table(q.expand(3, 3)), [[0]] * 40, 60, set(), Sampling(seed=k))
    tokens = torch.tensor(decoder.accepted) + 1.0
    expected = (1 - a ** (k + 1)) / (1 - a)
    assert len(tokens) > 500
    assert abs(float(tokens.mean()) - expected) < 4 * float(tokens.std()) / len(tokens) ** 0.5
