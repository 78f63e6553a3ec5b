"""What holds for every method of the family, found by the registry: a new one is held to it, too."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from effbench import sources, tiny
from effbench.cells import suite
from effbench.checks import toy
from effbench.cli.main import main
from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.kinds import Shorten
from effbench.core.recipe import parse
from effbench.core.views import Segments
from effbench.methods.prompt._common import COMMON, WORD, Judged, is_named
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun

NEEDLES = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "needle_256.jsonl").open()]
FAMILY = sorted(key for key, entry in registry.catalog().items() if entry.family == "prompt")
SHORTEN = [key for key in FAMILY if issubclass(registry.load(key), Shorten)]
JUDGED = [key for key in SHORTEN if issubclass(registry.load(key), Judged)]
SMALL: dict[str, dict[str, Any]] = {"llmlingua2": {"steps": 12, "texts": 16, "batch_size": 4, "lr": 1e-3, "length": 64}}
Under = Callable[..., ModelRun]


@pytest.fixture(scope="module")
def under() -> Under:
    """A run to which a method was applied; what it learned serves one set of settings."""
    settings = {"calibration_sequences": 2, "calibration_length": 32}
    runs: dict[Any, ModelRun] = {}

    def apply(key: str, compressor: Any = None, **fields: Any) -> ModelRun:
        if compressor is not None:
            fields["compressor"] = "small"
        method: Any = registry.load(key)(**SMALL.get(key, {}), **fields)
        if method not in runs:
            run = open_run(sources.model("tiny", None), sources.data(None), "cpu", "float32", 0, settings)
            if compressor is not None:
                run.shelve("small", *compressor)
            run.apply(method)
            runs[method] = run
        return runs[method]

    return apply


def divide(row: dict[str, Any], context: str = "") -> Segments:
    named = {**row, "context": context or row["context"]}
    return Segments.divide(" ".join((row["instruction"], named["context"], row["question"])), named)


def count(run: ModelRun, prompt: Segments) -> int:
    return len(run.tokenizer(prompt.text(), add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("keep", [0.25, 0.5])
@pytest.mark.parametrize("key", SHORTEN)
def test_a_share_of_the_whole_prompt_stays(key: str, keep: float, under: Under) -> None:
    """`keep` of it, over prompts with a context of 230 tokens and more; what is written anew may be shorter."""
    run = under(key, keep=keep)
    before = after = 0
    for row in NEEDLES[:12]:
        prompt = divide(row)
        before += count(run, prompt)
        after += count(run, run.rewrite(prompt))
    assert after <= (keep + 0.05) * before
    assert after >= (keep - 0.05) * before or key == "summarize"


@pytest.mark.parametrize("key", SHORTEN)
def test_what_is_no_context_counts(key: str, under: Under) -> None:
    """A longer question leaves less of the contexts."""
    run = under(key, keep=0.5)
    for row in NEEDLES[:2]:
        prompt = divide(row)
        asked = "Say at once what this is: " + " ".join(row["context"].split()[:60]) + " " + row["question"]
        longer = Segments(prompt.system, prompt.instruction, prompt.contexts, asked)
        short, shorter = (run.rewrite(one) for one in (prompt, longer))
        assert len("".join(shorter.contexts)) < len("".join(short.contexts))
        assert count(run, shorter) <= 0.56 * count(run, longer)


@pytest.mark.parametrize("key", JUDGED)
def test_numbers_and_names_of_a_hundred_contexts(key: str, under: Under) -> None:
    """With `force` all of a context stay, and none comes about that the source does not have: no exception."""
    run = under(key, keep=0.35, force=True)
    chance, exceptions = random.Random(0), []
    for row in NEEDLES[:100]:
        words = row["context"].split()[:40]
        for i in chance.sample(range(40), 6):
            words[i] = chance.choice(["2024", "3.14", "Zanzibar", "O'Neil,", "A380-800", "(1999)", "17:45"])
        prompt = divide(row, " ".join(words))
        source, left = ({*WORD.findall(text)} for text in (prompt.text(), run.rewrite(prompt).text()))
        told, said = (
            {word for word in words if is_named(word) and word.lower() not in COMMON} for words in (source, left)
        )
        exceptions += [*told - left, *said - source]
    assert not exceptions


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """A compressor that reads bytes, 512 at a time."""
    small = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    small.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small, bos_token="!", eos_token="~")
    return toy(vocab_size=256, max_position_embeddings=512), tokenizer


@pytest.mark.parametrize("key", JUDGED)
def test_another_tokenizer_judges_and_cuts_nothing(key: str, bytewise: Any, under: Under) -> None:
    """A text beyond the compressor's window is read in chunks; what stays are characters of the prompt, whose text is
    tokenised anew."""
    fields = {"unit": "token"} if key == "selective_context" else {}
    run = under(key, bytewise, keep=0.5, **fields)
    prompt = divide(NEEDLES[0], NEEDLES[0]["context"].replace(".", ","))
    assert len(prompt.text()) > 2 * 512
    new = run.rewrite(prompt)
    assert run.log.notes["chunks"][key] > 1
    if key == "summarize":
        assert count(run, new) <= 0.5 * count(run, prompt) + 1
        return
    rest = iter(prompt.text())
    assert all(letter in rest for letter in new.text())
    assert len(new.text()) / len(prompt.text()) == pytest.approx(0.5, abs=0.05)


BAD = [*((key, {"keep": value}) for key in SHORTEN for value in (0, -0.5, 1.01))]
BAD += [(key, {"tokens": 0}) for key in FAMILY if key not in SHORTEN]


@pytest.mark.parametrize(("key", "fields"), BAD, ids=str)
def test_budgets_that_mean_nothing_are_wrong_usage(key: str, fields: dict[str, Any]) -> None:
    with pytest.raises(Usage) as caught:
        registry.load(key)(**fields)
    assert "\n" not in str(caught.value) and next(iter(fields)) in str(caught.value) and key in str(caught.value)


@pytest.mark.parametrize("key", FAMILY)
def test_a_run_says_so_in_one_line(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    field = "keep" if key in SHORTEN else "tokens"
    assert main(["run", f"recipe={key}({field}=0)", "device=cpu", "--dry-run"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and field in told[0]


def test_the_suite_has_every_method_beside_random_tokens() -> None:
    chosen = suite.load("prompt")
    for tier in ("quick", "full"):
        assert "floor" in chosen.tier(tier).settings["probes"]
        used = {step.key for row in chosen.tier(tier).recipes for step in row.steps}
        assert {*FAMILY} <= used
    assert parse("random_tokens()").steps[0].key in FAMILY
