"""A summary is what the compressor writes to the request, no longer than asked, with the words that are forced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from effbench import tiny
from effbench.core.errors import Unsupported, Usage
from effbench.core.views import Segments
from effbench.methods.prompt import summarize
from effbench.methods.prompt._common import COMMON, WORD, count_text
from effbench.methods.prompt.summarize import REQUEST, Summarize
from effbench.nn.kinds.prompt import rewrite
from effbench.nn.run import ModelRun

NEEDLES = [json.loads(line) for line in (Path(tiny.__file__).parent / "data" / "needle_256.jsonl").open()]


def divide(row: dict[str, Any]) -> Segments:
    return Segments.divide(" ".join((row["instruction"], row["context"], row["question"])), row)


@pytest.fixture(scope="module")
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny.MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize("number", range(3))
def test_a_summary_is_what_transformers_writes(
    number: int, run: ModelRun, model: Any, of_contexts: Callable[[Segments, float], float]
) -> None:
    row, tokenizer = NEEDLES[number], run.tokenizer
    text = REQUEST.format(question=row["question"], documents=row["context"])
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    most = count_text(tokenizer, row["context"]) // 4
    made = model.generate(ids, max_new_tokens=most, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(made, skip_special_tokens=True).split()
    prompt = divide(row)
    new = Summarize(keep=of_contexts(prompt, 0.25)).rewrite(prompt, run)
    written = new.contexts[0].split()
    assert written == expected[: len(written)] and len(expected) - len(written) <= 2
    assert (new.instruction.strip(), new.question) == (row["instruction"], row["question"])


class Writer:
    """Stands for a compressor: says the same whatever it is asked, `window` tokens at a time."""

    def __init__(self, run: ModelRun, said: str, window: int = 2048) -> None:
        self.tokenizer, self.engine, self.window = run.tokenizer, self, window
        self.said, self.asked, self.options = said, [], []
        self.chunks = 1

    def generate(self, prompts: list[list[int]], most: int, stops: set[int], **options: Any) -> list[list[int]]:
        self.asked += [(self.tokenizer.decode(prompt), most, stops) for prompt in prompts]
        self.options.append(options)
        return [self.tokenizer(self.said, add_special_tokens=False)["input_ids"][:most] for _ in prompts]


def summarized(run: ModelRun, writer: Writer, prompt: Segments, monkeypatch: Any, **settings: Any) -> Segments:
    monkeypatch.setattr(summarize, "open_judge", lambda told, compressor: writer)
    return Summarize(**settings).rewrite(prompt, run)


STORY = "In 1999 the doctor Lincoln fell in the hall. The code zisk was here. It rained in the tower and the kitchen. "
ASKED = Segments("", "Read. ", (STORY, "The old parrot ate seeds.\n\n"), "Where is zisk?")


def test_what_is_asked_and_what_takes_the_place_of_the_contexts(
    run: ModelRun, monkeypatch: Any, of_contexts: Callable[[Segments, float], float]
) -> None:
    writer = Writer(run, " The doctor fell.\nQuestion: What else?")
    new = summarized(run, writer, ASKED, monkeypatch, keep=of_contexts(ASKED, 0.5))
    assert new == Segments("", "Read. ", ("The doctor fell.\n\n",), "Where is zisk?")
    ((request, most, stops),) = writer.asked
    assert "Question: Where is zisk?\nRetrieved documents: In 1999" in request.replace("<bos>", "")
    assert request.endswith("ate seeds.\nCompressed documents:")
    assert most == count_text(run.tokenizer, STORY + "The old parrot ate seeds.\n\n") // 2
    assert stops == {run.tokenizer.eos_token_id} and writer.options[0]["sampling"] is None
    assert run.log.notes["chunks"]["summarize"] == 1


def test_nothing_written_leaves_no_context(run: ModelRun, monkeypatch: Any) -> None:
    new = summarized(run, Writer(run, " \n"), ASKED, monkeypatch)
    assert new == Segments("", "Read. ", (), "Where is zisk?")


@pytest.mark.parametrize("force", [False, True])
def test_a_summary_has_room_in_its_share(
    force: bool, run: ModelRun, monkeypatch: Any, of_contexts: Callable[[Segments, float], float]
) -> None:
    total = count_text(run.tokenizer, "".join(ASKED.contexts))
    for keep in (0.2, 0.5, 0.9):
        writer = Writer(run, " rope fog" * 80)
        new = summarized(run, writer, ASKED, monkeypatch, keep=of_contexts(ASKED, keep), force=force)
        kept = count_text(run.tokenizer, new.contexts[0].strip())
        assert kept <= keep * total or (force and keep == 0.2)  # what is forced stays
        assert kept >= keep * total - 3


def test_forced_words_follow_what_is_written(run: ModelRun, monkeypatch: Any) -> None:
    said = " In 2024 the doctor saw Zisk and Bismarck"
    new = summarized(run, Writer(run, said), ASKED, monkeypatch, keep=0.9, force=True)
    assert new.contexts == ("In the doctor saw Zisk and 1999 Lincoln\n\n",)
    plain = summarized(run, Writer(run, said), ASKED, monkeypatch, keep=0.9)
    assert plain.contexts == (said.strip() + "\n\n",)


def test_numbers_and_names_are_those_of_the_source(run: ModelRun) -> None:
    """Whatever is drawn, over 100 contexts: with `force` all forced words are there and no other number or name."""
    method = Summarize(temperature=1.5, force=True, keep=0.1)
    for row in NEEDLES[:100]:
        context = f"In {row['depth']} {row['context'][:300]} for Mr. Smith-Jones, 3.5% of A4."
        prompt = Segments("", "Notes: ", (context + " ",), row["question"])
        new = method.rewrite(prompt, run).contexts[0]
        words, source = ({word.lower() for word in WORD.findall(text)} for text in (new, prompt.text()))
        named = lambda text: {  # noqa: E731
            word.lower() for word in WORD.findall(text) if not word.islower() and word.lower() not in COMMON
        }
        assert named(new) <= source and named(context) <= words


def test_long_contexts_are_summarized_in_chunks(run: ModelRun, monkeypatch: Any) -> None:
    """Each with room for its summary; the summaries follow each other."""
    asked = count_text(run.tokenizer, REQUEST.format(question="The code", documents=""))
    writer = Writer(run, " rope", window=asked + 60)
    prompt = Segments("", "Notes: ", (STORY * 6,), "The code")
    new = summarized(run, writer, prompt, monkeypatch, keep=0.25)
    assert len(writer.asked) == run.log.notes["chunks"]["summarize"] == len(new.contexts[0].split()) > 3
    assert all(count_text(run.tokenizer, text) + most <= writer.window for text, most, _ in writer.asked)
    read = [text.partition("documents: ")[2].partition("\nCompressed")[0] for text, _, _ in writer.asked]
    assert " ".join(read).split() == (STORY * 6).split()
    with pytest.raises(Unsupported, match="the request for a summary has"):
        summarized(run, Writer(run, "", window=asked), prompt, monkeypatch)


def test_chance_is_that_of_the_seed_and_the_text(run: ModelRun) -> None:
    prompt, other = map(divide, NEEDLES[:2])
    method = Summarize(temperature=1.0)
    first, between, again = method.rewrite(prompt, run), method.rewrite(other, run), method.rewrite(prompt, run)
    assert first == again != between and first != Summarize().rewrite(prompt, run)
    seeded = SimpleNamespace(
        **{name: getattr(run, name) for name in ("tokenizer", "tokenizer_of", "role", "log", "pad", "progress")}
    )
    seeded.seed = 1
    assert method.rewrite(prompt, seeded) != first  # type: ignore[arg-type]
    assert Summarize().rewrite(prompt, seeded) == Summarize().rewrite(prompt, run)  # type: ignore[arg-type]


def test_prompts_and_settings_that_it_cannot_take(run: ModelRun) -> None:
    with pytest.raises(Unsupported, match="reads the question"):
        rewrite(run, Summarize(), Segments(contexts=("The code krox",), whole=True))
    assert Summarize(keep=1.0).rewrite(ASKED, run) == ASKED
    for settings in ({"keep": 0.0}, {"temperature": -1.0}):
        with pytest.raises(Usage):
            Summarize(**settings)
