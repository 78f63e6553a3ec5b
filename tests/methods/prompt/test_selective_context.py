"""Self-information of units by the authors' code and by plain transformers, and what of a prompt stays."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from effbench import tiny
from effbench.core.errors import Usage
from effbench.core.views import Segments
from effbench.methods.prompt import selective_context
from effbench.methods.prompt._common import COMMON, WORD
from effbench.methods.prompt.selective_context import SelectiveContext, find_high, inform, lead
from effbench.nn.run import ModelRun

NEEDLES = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "needle_256.jsonl").open()]
GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "selective_context.safetensors")


def split(name: str, values: torch.Tensor) -> list[list[Any]]:
    """Values of each sentence."""
    return [part.tolist() for part in values.split(GOLDEN[f"{name}_counts"].tolist())]


def test_units_have_the_self_information_of_the_authors() -> None:
    ends, infos = split("token", GOLDEN["token_ends"]), split("token", GOLDEN["token"])
    phrases, sentences = [], []
    for own, token_ends, found in zip(split("phrase", GOLDEN["phrase_ends"]), ends, infos, strict=True):
        phrases += inform(own, token_ends, found)
        sentences += inform(own[-1:], token_ends, found)
        assert inform(token_ends, token_ends, found) == found
    assert np.allclose(phrases, GOLDEN["phrase"], rtol=1e-12)
    assert np.allclose(sentences, GOLDEN["sent"], rtol=1e-12)
    straddling = [own for own, of in zip(split("phrase", GOLDEN["phrase_ends"]), ends, strict=True) if set(own) - {*of}]
    assert len(straddling) > 3  # tokens of several phrases are among them


@pytest.mark.parametrize("name", [name for name in GOLDEN if re.fullmatch(r"(sent|phrase|token)\.0\.\d+", name)])
def test_the_units_that_stay_are_those_of_the_authors(name: str) -> None:
    level, _, ratio = name.partition(".")
    kept = find_high(GOLDEN[level].tolist(), 1 - float(ratio))
    assert kept == set(GOLDEN[name].nonzero()[:, 0].tolist()) and 0 < len(kept) < len(GOLDEN[level])


def test_the_percentile_itself_stays() -> None:
    assert find_high([5.0, 1.0, 3.0, 2.0, 4.0], 0.5) == {0, 2, 4}
    assert find_high([5.0, -np.inf, 1.0, 3.0], 0.5) == {0, 3}  # what has no tokens does not count


def test_a_token_in_the_middle_of_a_unit_is_its_own() -> None:
    """Units end at 4, 6, 7 and 20; tokens at 2, 7, 12 and 20: the second is shared by the two units that end in it."""
    assert inform([4, 6, 7, 20], [2, 7, 12, 20], [3.0, 6.0, 1.0, 5.0]) == [2.5, 2.0, 2.0, 3.0]
    assert inform([3, 5], [3, 3], [2.0, 4.0]) == [3.0, -np.inf]  # two tokens of one character; nothing behind it


def test_sentences_begin_with_the_white_space_in_front() -> None:
    assert lead(["One. ", "Two.\n\n", "Three? "]) == ["One.", " Two.", "\n\nThree? "]
    assert lead([]) == []


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).eval()


def surprisal(model: Any, tokenizer: Any, sentence: str) -> tuple[list[int], list[float]]:
    """Tokens of a sentence by itself, with the space in front that it has in the prompt; -ln p of each behind BOS."""
    ids = tokenizer(" " + sentence, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0].double().log_softmax(-1)
    return ids, [-float(logits[i, token]) for i, token in enumerate(ids)]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("keep", [0.35, 0.5])
def test_units_by_transformers(
    number: int, keep: float, run: ModelRun, model: Any, of_contexts: Callable[[Segments, float], float]
) -> None:
    row = NEEDLES[number]
    prompt = Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)
    sentences = [text + "." for text in row["context"].rstrip(".").split(". ")]
    sentences = [text.strip(".") + "." for text in sentences]
    read = [surprisal(model, run.tokenizer, text) for text in sentences]
    means = [float(np.mean(losses)) for _, losses in read]
    threshold = np.percentile(means, 100 * (1 - keep))
    expected = " ".join(text for text, mean in zip(sentences, means, strict=True) if mean >= threshold)
    new = SelectiveContext(keep=keep, unit="sentence", share="units").rewrite(prompt, run)
    assert "".join(new.contexts).strip() == expected
    assert (new.instruction.strip(), new.question) == (row["instruction"], row["question"])
    # of tokens the most surprising that have room
    losses = [loss for _, own in read for loss in own]
    best = sorted(range(len(losses)), key=lambda i: -losses[i])[: int(keep * len(losses))]
    words = [run.tokenizer.decode([token]).strip() for ids, _ in read for token in ids]
    new = SelectiveContext(keep=of_contexts(prompt, keep), unit="token").rewrite(prompt, run)
    assert "".join("".join(new.contexts).split()) == "".join(words[i] for i in sorted(best))


def test_phrases_stay_as_a_whole(run: ModelRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        selective_context, "split_phrases", lambda text: re.findall(r"\s*(?:The \w+|\w+|\S)(?:\s+$)?", text)
    )
    row = NEEDLES[0]
    prompt = Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)
    for share in ("tokens", "units"):
        new = SelectiveContext(share=share).rewrite(prompt, run)
        words = new.contexts[0].split()
        assert 20 < len(words) < len(row["context"].split())
        behind = [word for the, word in itertools.pairwise(words) if the == "The"]
        assert len(behind) > 3 and all(f"The {word}" in row["context"] for word in behind)


def test_the_share_of_tokens_is_met(run: ModelRun) -> None:
    for row in NEEDLES[:6]:
        prompt = Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)
        total = len(run.tokenizer("".join(prompt.contexts))["input_ids"])
        for keep in (0.25, 0.5):
            new = SelectiveContext(keep=keep, unit="token").rewrite(prompt, run)
            assert abs(len(run.tokenizer(new.contexts[0])["input_ids"]) / total - keep) < 0.02
            new = SelectiveContext(keep=keep, unit="sentence").rewrite(prompt, run)
            assert abs(len(run.tokenizer(new.contexts[0])["input_ids"]) / total - keep) < 0.04


class Letters:
    """A compressor that reads letters, the white space in front with each, and expects all but consonants."""

    is_fast, all_special_ids, first, chunks = True, [], 0, 1

    def __init__(self) -> None:
        self.tokenizer = self

    def __call__(self, text: str, **_: Any) -> Any:
        spans = [match.span() for match in re.finditer(r"\s*\S|\s+\Z", text)]
        return {"input_ids": [ord(text[end - 1]) for _, end in spans], "offset_mapping": spans}

    def losses(self, texts: Any) -> list[list[float]]:
        return [[0.0 if chr(token) in "aeiou ." else 1.0 + i / 1e3 for i, token in enumerate(ids)] for *_, ids in texts]


def test_a_compressor_with_other_tokens(
    run: ModelRun, monkeypatch: pytest.MonkeyPatch, of_contexts: Callable[[Segments, float], float]
) -> None:
    """Tokens are the compressor's own, and a share of them stays; sentences are counted by the tokens of the model."""
    monkeypatch.setattr(selective_context, "open_judge", lambda told, name: Letters())
    prompt = Segments("", "Notes: ", ("The code zisk. A rope. ",), "The code")
    # of 6 and 7 letters and signs of instruction and question, and 18 of the context
    new = SelectiveContext(unit="token", keep=(13 + 9) / 31).rewrite(prompt, run)
    assert new.contexts == ("Th cd zsk rp ",)  # 9 of 18 letters and signs
    new = SelectiveContext(unit="sentence", keep=of_contexts(prompt, 0.6)).rewrite(prompt, run)
    assert new.contexts == ("The code zisk. ",)  # 4 of 7 words and signs


def test_numbers_and_names_are_whole_words_of_the_source(run: ModelRun) -> None:
    """Over 100 contexts: all forced words stay, and no other number or name comes about."""
    method = SelectiveContext(keep=0.3, unit="token", force=True)
    for i, row in enumerate(NEEDLES[:100]):
        context = (
            f"In {1900 + i} ({row['context'][:200]}) Smith-Jones of McDonaldville saw 3.5% of A4{i}, {i * 37} zisks. "
        )
        prompt = Segments("", "Notes: ", (context, context.replace("In", "By")), row["question"])
        new = method.rewrite(prompt, run)
        source = set(WORD.findall(prompt.text()))
        named = lambda text: {  # noqa: E731
            word for word in WORD.findall(text) if not word.islower() and word.lower() not in COMMON
        }
        assert named(new.text()) <= source
        assert named(context) <= named(new.contexts[0]) and len(new.text()) < len(prompt.text())


def test_the_last_unit_of_a_whole_prompt_stays(run: ModelRun) -> None:
    text = "The code krox. The rope fell in the hall of the old parrot. The the the the"
    whole = Segments(contexts=(text,), whole=True)
    for unit, end in (("token", " the"), ("sentence", "The the the the")):
        assert SelectiveContext(unit=unit, keep=0.4).rewrite(whole, run).text().endswith(end)
        assert SelectiveContext(unit=unit, keep=0.4, share="units").rewrite(whole, run).text().endswith(end)


def test_long_sentences_are_judged_in_chunks(
    run: ModelRun, monkeypatch: pytest.MonkeyPatch, of_contexts: Callable[[Segments, float], float]
) -> None:
    real = selective_context.open_judge

    class Short(selective_context.Judge):
        window = 30

    def short(told: Any, compressor: str) -> Any:
        judge = real(told, compressor)
        return Short(judge.tokenizer, judge.engine)

    monkeypatch.setattr(selective_context, "open_judge", short)
    told: Any = SimpleNamespace(
        tokenizer=run.tokenizer, role=run.role, tokenizer_of=run.tokenizer_of, pad=run.pad, progress=run.progress
    )
    told.log = SimpleNamespace(notes={})
    words = " ".join(["the rope fell in the hall and"] * 12)
    prompt = Segments("", "Notes: ", (words + " ",), "The code")
    new = SelectiveContext(keep=of_contexts(prompt, 0.5), unit="token").rewrite(prompt, told)
    assert len(new.contexts[0].split()) == len(words.split()) // 2 and told.log.notes["chunks"]["selective_context"] > 3


def test_settings_that_mean_nothing() -> None:
    for settings in ({"unit": "word"}, {"share": "words"}, {"keep": 0.0}):
        with pytest.raises(Usage):
            SelectiveContext(**settings)
