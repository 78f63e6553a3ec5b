"""LLMLingua's budgets by hand, and its losses and thresholds by plain transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from effbench import tiny
from effbench.checks import toy
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.recipe import parse
from effbench.core.views import Segments
from effbench.methods.prompt import _common
from effbench.methods.prompt.llmlingua import LLMLingua
from effbench.nn.infer.engine import Scored
from effbench.nn.run import ModelRun

WORDS = ["fog", "mole", "code", "rope", "hall", "coin", "tower", "parrot", "seeds", "kitchen"]
NEEDLES = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "needle_256.jsonl").open()][:4]


def say(words: str) -> str:
    return f"{words} " if words else ""


@pytest.fixture(autouse=True)
def fakes_are_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake model is its own engine."""
    real = _common.open_engine
    opened = lambda run, model: model if isinstance(model, Losses) else real(run, model)  # noqa: E731
    monkeypatch.setattr(_common, "open_engine", opened)


class Losses:
    """Stands for an engine: the loss of a token is its word's, whatever stands before it."""

    max_length = 1000

    def __init__(self, run: ModelRun, losses: dict[str, float]) -> None:
        self.losses = {run.tokenizer(" " + word)["input_ids"][0]: loss for word, loss in losses.items()}
        self.asked: list[tuple[list[int], list[int]]] = []

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        self.asked += [([*prefix], [*more]) for prefix, more in pairs]
        found = [[-self.losses[token] for token in more] for _, more in pairs]
        return [Scored(sum(row), False, row) for row in found]


def fake(run: ModelRun, losses: dict[str, float]) -> tuple[Any, Losses]:
    engine = Losses(run, losses)
    log = SimpleNamespace(notes={})
    asked = SimpleNamespace(tokenizer=run.tokenizer, role=lambda name: engine, seed=0, log=log)
    asked.tokenizer_of = lambda name: asked.tokenizer
    return asked, engine


RISING = {word: float(i) for i, word in enumerate(WORDS)}


def repeat(word: str, times: int) -> str:
    return say(" ".join([word] * times))


def write(*parts: str) -> Segments:
    """Instruction, contexts and question; every word with a space in front, and hence one token."""
    ends = [*parts[:-1], parts[-1].rstrip()] if parts[-1] else [*parts[:-2], parts[-2].rstrip(), ""]
    return Segments(instruction=" " + ends[0], contexts=tuple(ends[1:-1]), question=ends[-1])


def count(segments: Segments) -> tuple[int, int, int]:
    """Words of instruction, contexts and question."""
    return tuple(len(text.split()) for text in (segments.instruction, " ".join(segments.contexts), segments.question))  # type: ignore[return-value]


def rising(tokens: int) -> str:
    return say(" ".join((WORDS * tokens)[:tokens]))


def test_budget_of_demonstrations(run: ModelRun) -> None:
    """50 tokens, of which 20 stay: 20 - 0.85 x 4 - 0.9 x 6 = 11.2 are of demonstrations, of which 22.4 are looked at.

    Of four with 10 tokens each the three with the highest perplexity are chosen, the third being the one that passes
    22.4. The first pass keeps 11.2 of their 30 tokens.
    """
    names = ["rope", "coin", "tower", "hall"]  # of perplexity in between, exp(3), exp(5), exp(6), exp(4)
    losses = dict.fromkeys(WORDS, 0.0) | {"rope": 3.0, "coin": 5.0, "tower": 6.0, "hall": 4.0}
    asked, engine = fake(run, losses)
    prompt = write(rising(4), *(repeat(name, 10) for name in names), rising(6))
    LLMLingua(keep=0.4).rewrite(prompt, asked)
    ranked, judged = engine.asked[:4], engine.asked[4:]
    front = run.tokenizer.bos_token_id
    assert all(prefix == [front] for prefix, _ in ranked) and [len(ids) for _, ids in ranked] == [10] * 4
    assert [len(ids) for _, ids in judged] == [4, 30, 6]
    chosen = run.tokenizer.decode(judged[1][1]).split()
    assert chosen == ["coin"] * 10 + ["tower"] * 10 + ["hall"] * 10  # in the order of the prompt


def test_a_budget_that_is_just_used_up_takes_no_more(run: ModelRun) -> None:
    """No instruction, no question: 20 of 40 tokens, of which 40 are looked at; 5 of 40 leave two of four."""
    asked, engine = fake(run, RISING)
    prompt = write("", *(repeat(word, 10) for word in ("fog", "mole", "code", "rope")), "")
    LLMLingua(keep=0.25).rewrite(prompt, asked)
    assert [len(ids) for _, ids in engine.asked[4:]] == [20]
    assert set(run.tokenizer.decode(engine.asked[4][1]).split()) == {"code", "rope"}


@pytest.mark.parametrize(
    ("lengths", "keep", "kept"),
    [
        # 20 of 50: 0.85 x 4 = 3.4, 11.2 of three demonstrations, 0.9 x 6 = 5.4
        ((4, (10, 10, 10, 10), 6), 0.4, (3, 11, 5)),
        # 35 of 50: 26.2 of demonstrations, 52.4 looked at, all 40 chosen; 12.4 / 10 lift both rates to 1; 25 are left
        ((4, (10, 10, 10, 10), 6), 0.7, (4, 25, 6)),
        # 73 of 100: 73 - 51 = 22, 44 looked at, all 40 chosen; 4 / 60 lift 0.85 to 0.9167: 55; 18 are left
        ((60, (20, 20), 0), 0.73, (55, 18, 0)),
        # 48 of 50: 39.2 of demonstrations; 38.4 / 10 lift both rates to 1, 38 are left
        ((4, (10, 10, 10, 10), 6), 0.96, (4, 38, 6)),
        # all that stays is instruction and question, just so
        ((20, (10, 10), 20), 35 / 60, (17, 0, 18)),
    ],
)
def test_budgets_by_hand(lengths: Any, keep: float, kept: tuple[int, int, int], run: ModelRun) -> None:
    """All losses differ, so that the nearest number of tokens stays; a prompt without question ends with a context."""
    ins, contexts, que = lengths
    words = sorted(run.tokenizer.get_vocab(), key=run.tokenizer.get_vocab().get)
    words = [word[1:] for word in words if word.startswith("Ġ") and word[1:].isalpha() and word[1:].islower()]
    words = words[-(ins + sum(contexts) + que) :]
    assert len(words) == ins + sum(contexts) + que
    left = iter(words)
    prompt = write(*(say(" ".join(next(left) for _ in range(size))) for size in (ins, *contexts, que)))
    losses = {word: float(i) for i, word in enumerate(words)}
    asked, _ = fake(run, losses)
    assert count(LLMLingua(keep=keep).rewrite(prompt, asked)) == kept


def test_too_small_a_budget_is_refused(run: ModelRun) -> None:
    asked, _ = fake(run, RISING)
    prompt = write(rising(20), rising(10), rising(20))
    with pytest.raises(
        Refused, match="of 50 tokens instruction and question alone need more than the 34 that may stay"
    ):
        LLMLingua(keep=0.68).rewrite(prompt, asked)
    LLMLingua(keep=0.71).rewrite(prompt, asked)


def test_thresholds_of_segments_and_their_prefixes(run: ModelRun) -> None:
    """Half of each segment of four tokens stays: the two largest losses; the next is read behind what has stayed."""
    asked, engine = fake(run, RISING)
    text = " rope fog hall mole tower seeds coin parrot fog kitchen"
    new = LLMLingua(keep=0.5, step=4).rewrite(Segments(contexts=(text,), whole=True), asked)
    assert new.text() == " rope hall seeds parrot kitchen" and new.whole
    behind = [run.tokenizer.decode(prefix[1:]) for prefix, _ in engine.asked]
    assert behind == ["", " rope hall", " rope hall seeds parrot"]
    assert all(prefix.count(run.tokenizer.bos_token_id) == 1 for prefix, _ in engine.asked)


def test_the_last_token_stays_whatever_its_loss(run: ModelRun) -> None:
    asked, _ = fake(run, RISING)
    whole = Segments(contexts=(" hall rope coin tower parrot fog",), whole=True)
    assert LLMLingua(keep=0.5).rewrite(whole, asked).text() == " coin tower parrot fog"
    gone = write("", rising(10), repeat("fog", 10), "")
    assert LLMLingua(keep=0.2).rewrite(gone, asked).text() == " tower parrot seeds kitchen fog"


def test_white_space_between_parts_stays(run: ModelRun) -> None:
    losses = {token: 1.0 for token in range(len(run.tokenizer))} | {run.tokenizer("\n")["input_ids"][0]: -1.0}
    asked, engine = fake(run, RISING)
    engine.losses = losses | engine.losses
    contexts = (" " + rising(10).rstrip() + "\n", rising(10).rstrip() + "\n")
    new = LLMLingua(keep=0.5, question=1.0).rewrite(Segments(contexts=contexts, question="The code"), asked)
    assert [text.rstrip(" ")[-1] for text in new.contexts] == ["\n", "\n"] and new.question == "The code"


def surprisal(model: Any, ids: list[int], first: int) -> list[float]:
    """-ln p of tokens from place `first` on."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [-float(logits[i - 1, ids[i]]) for i in range(first, len(ids))]


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize(("keep", "step"), [(0.5, 200), (0.5, 40), (0.3, 25)])
@pytest.mark.parametrize("number", range(len(NEEDLES)))
def test_iterative_compression_by_transformers(number: int, keep: float, step: int, run: ModelRun, model: Any) -> None:
    row = NEEDLES[number]
    prompt = " ".join((row["instruction"], row["context"], row["question"]))
    ids = run.tokenizer(prompt)["input_ids"]
    ins, que = len(run.tokenizer(row["instruction"])["input_ids"]), len(row["question"].split())
    dems = len(ids) - ins - que
    stay, begin = list(ids[:ins]), ins
    rate = (keep * len(ids) - ins - que) / dems
    while begin < len(ids) - que:
        segment = ids[begin : min(begin + step, len(ids) - que)]
        losses = surprisal(model, [0, *stay, *segment], 1 + len(stay))
        number_kept = int(rate * len(segment) + 0.5)
        best = sorted(range(len(segment)), key=lambda i: -losses[i])[:number_kept]
        stay += [segment[i] for i in sorted(best)]
        begin += step
    method = LLMLingua(keep=keep, step=step, instruction=1.0, question=1.0)
    new = method.rewrite(Segments.divide(prompt, row), run)
    assert run.tokenizer(new.text())["input_ids"] == stay + ids[-que:]
    assert new.instruction == row["instruction"] + " " and new.question == row["question"]


def test_perplexities_by_transformers(run: ModelRun, model: Any) -> None:
    """At a budget of one token a single demonstration is looked at, the one with the highest perplexity."""
    contexts = tuple(text + ". " for text in NEEDLES[0]["context"].rstrip(".").split(". "))[:8]
    found = []
    for i, context in enumerate(contexts):
        ids = run.tokenizer(("" if i == 0 else " ") + context.rstrip())["input_ids"]
        losses = surprisal(model, [0, *ids], 1)
        found.append(sum(losses) / len(losses))
    total = len(run.tokenizer("".join(contexts) + "The code")["input_ids"])
    method = LLMLingua(keep=4 / total, question=1.0)  # 2 tokens of demonstrations, 4 looked at
    (kept,) = method.rewrite(Segments(contexts=contexts, question="The code"), run).contexts
    best = contexts[max(range(8), key=found.__getitem__)]
    assert set(kept.split()) <= set(best.replace(".", " .").split()) | set(best.split())


def test_a_snapshot_can_be_the_small_model(run: ModelRun) -> None:
    row = NEEDLES[0]
    prompt = Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)
    run.snapshot("small")
    assert LLMLingua(compressor="small").rewrite(prompt, run) == LLMLingua().rewrite(prompt, run)
    with pytest.raises(Usage, match="no step before it makes a model called 'none'"):
        parse("llmlingua(compressor='none')").check_fits()


def test_texts_begin_with_eos_where_there_is_no_bos(run: ModelRun) -> None:
    asked, engine = fake(run, RISING)
    asked.tokenizer = Plain(run.tokenizer, 1)
    whole = Segments(contexts=(" fog mole code rope",), whole=True)
    LLMLingua().rewrite(whole, asked)
    assert engine.asked[0][0] == [1]
    asked.tokenizer = Plain(run.tokenizer, None)
    with pytest.raises(Unsupported, match="neither a BOS nor an EOS"):
        LLMLingua().rewrite(whole, asked)


class Plain:
    """A tokenizer without a BOS token."""

    is_fast = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, eos: int | None) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)


def test_plain_topk_by_transformers(run: ModelRun, model: Any) -> None:
    """The seed's form, by name: one pass over the whole prompt; of each part the tokens with the largest losses."""
    row = NEEDLES[0]
    prompt = " ".join((row["instruction"], row["context"], row["question"]))
    ids = run.tokenizer(prompt)["input_ids"]
    ins, que = len(run.tokenizer(row["instruction"])["input_ids"]), len(row["question"].split())
    losses = surprisal(model, [0, *ids], 1)
    number = int(0.4 * len(ids) - ins - que + 0.5)
    best = sorted(range(ins, len(ids) - que), key=lambda i: -losses[i])[:number]
    topk = LLMLingua(keep=0.4, order="topk", instruction=1.0, question=1.0)
    new = topk.rewrite(Segments.divide(prompt, row), run)
    wanted = [*ids[:ins], *(ids[i] for i in sorted(best)), *ids[-que:]]
    assert run.tokenizer(new.text())["input_ids"] == wanted
    assert LLMLingua(keep=0.4, instruction=1.0, question=1.0, step=50).rewrite(Segments.divide(prompt, row), run) != new


def measure_kept(method: LLMLingua, run: ModelRun) -> float:
    before = after = 0
    for row in NEEDLES:
        prompt = Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)
        before += len(run.tokenizer(prompt.text())["input_ids"])
        after += len(run.tokenizer(method.rewrite(prompt, run).text())["input_ids"])
    return after / before


@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_every_piece_is_compressed_so_that_the_prompt_meets_its_budget(keep: float, run: ModelRun) -> None:
    assert measure_kept(LLMLingua(keep=keep), run) == pytest.approx(keep, abs=0.05)
    assert measure_kept(LLMLingua(keep=keep, order="topk"), run) == pytest.approx(keep, abs=0.05)


def test_the_package_leaves_the_last_piece_and_misses_its_budget(run: ModelRun) -> None:
    assert 0.35 < measure_kept(LLMLingua(keep=0.25, tail="package"), run) < 0.5


def test_forced_words_stay_within_the_budget(run: ModelRun) -> None:
    """The question's words are worth more than any loss, and take the place of others."""
    asked, _ = fake(run, RISING | {"fog": -1.0})
    prompt = write("", rising(20), "fog")
    left, kept = (LLMLingua(keep=0.5, question=1.0, force=force).rewrite(prompt, asked) for force in (False, True))
    assert left.contexts[0].split().count("fog") == 0 and kept.contexts[0].split().count("fog") == 2
    assert count(left) == count(kept)


def test_another_tokenizer_judges_the_text(run: ModelRun) -> None:
    """A compressor that reads bytes: what stays are characters of the prompt, and the text is tokenised anew."""
    small = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    small.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytewise = PreTrainedTokenizerFast(tokenizer_object=small, bos_token="!")
    run.shelve("bytes", toy(vocab_size=256, max_position_embeddings=128), bytewise)
    row = NEEDLES[0]
    prompt = Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)
    new = LLMLingua(compressor="bytes", question=1.0).rewrite(prompt, run)
    rest = iter(prompt.text())
    assert all(letter in rest for letter in new.text())
    assert len(new.text()) / len(prompt.text()) == pytest.approx(0.5, abs=0.05)
    assert run.log.notes["chunks"]["llmlingua"] >= 5  # its window is 128 bytes


@pytest.mark.parametrize(
    "settings",
    [
        {"instruction": 0.0},
        {"question": 1.1},
        {"step": 0},
        {"keep": 1.5},
        {"order": "topk", "tail": "package"},
        {"force": True, "tail": "package"},
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        LLMLingua(**settings)
