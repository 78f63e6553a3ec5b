"""What a run trains on, calibrates on and is measured on."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from effbench import sources, tiny
from effbench.core.errors import Unavailable, Unsupported
from effbench.core.views import Example, Segments
from effbench.nn.data import MARGIN, Data, Part, count_learned, cut, open_data
from effbench.sources.protocols import PROTOCOLS
from effbench.sources.text import Document


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny.MODEL)


class Counting:
    """A tokenizer that says how many characters it was given."""

    eos_token_id = None

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.characters = 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.characters += len(text)
        return self.inner(text, **options)


def texts(number: int, words: int = 40) -> list[Document]:
    rng = random.Random(number)
    world = tiny.documents("train", 1)[0].split()
    return [Document(" ".join(rng.choices(world, k=words)), f"d{i}") for i in range(number)]


def data(tokenizer: Any, train: list[Document], width: int = 16, **parts: list[Document]) -> Data:
    """Data of which nothing is set aside."""
    named = {"validation": [], "target": [], "train": train} | parts
    return Data("d", {name: Part(documents) for name, documents in named.items()}, tokenizer, "", width)


# Windows


@pytest.mark.parametrize("size", [2, 15, 16, 17, 31, 32, 46, 47, 300])
@pytest.mark.parametrize("width", [2, 3, 16])
def test_windows_learn_every_token_but_the_first_once(size: int, width: int) -> None:
    example = Example("d", tuple(range(size)))
    windows = cut(example, width)
    assert [token for window in windows for token in window.ids[1:]] == list(range(1, size))
    assert sum(map(count_learned, windows)) == size - 1 and max(len(window.ids) for window in windows) <= width
    assert len({window.id for window in windows}) == len(windows)
    again = [part for window in cut(example, 2 * width) for part in cut(window, width)]
    assert sum(map(count_learned, again)) == size - 1


@pytest.mark.parametrize(
    ("size", "prompt", "width", "learned"), [(9, 4, 16, 5), (9, 4, 6, 2), (9, 4, 5, 1), (9, 4, 4, 0), (5, 5, 16, 0)]
)
def test_an_example_with_a_prompt_is_one_or_nothing(size: int, prompt: int, width: int, learned: int) -> None:
    windows = cut(Example("d", tuple(range(size)), prompt), width)
    assert sum(map(count_learned, windows)) == learned and len(windows) == bool(learned)


def test_the_pool_holds_all_text_in_windows(tokenizer: Any) -> None:
    documents = [*texts(3), Document("", "empty")]
    pool = data(tokenizer, documents).pool
    whole = [tokenizer(document.text, add_special_tokens=False)["input_ids"] for document in documents[:3]]
    assert max(len(example.ids) for example in pool) == 16
    assert sum(map(count_learned, pool)) == sum(map(len, whole))  # the end of each document is learned, too
    assert pool[0].ids == tuple(whole[0][:16]) and pool[0].id == "d0/0"
    assert pool[-1].ids[-2:] == (whole[-1][-1], tokenizer.eos_token_id)


def test_completions_stay_whole_and_end_with_the_end_of_text(tokenizer: Any) -> None:
    text = "The king of the hill gave bread."
    (example,) = data(tokenizer, [Document(text, "a:1", len("The king of"))], width=4).pool
    alone = tokenizer("The king of", add_special_tokens=False)["input_ids"]
    rest = tokenizer(text[len("The king of") :], add_special_tokens=False)["input_ids"]
    whole = Segments(contexts=("The king of",), whole=True)
    assert example == Example("a:1", (*alone, *rest, tokenizer.eos_token_id), len(alone), text, segments=whole)


# No more is tokenised than is used


@pytest.mark.parametrize("limit", [1, 50, 1000])
def test_a_limit_gives_the_first_tokens_and_reads_little(tokenizer: Any, limit: int) -> None:
    counting = Counting(tokenizer)
    long = data(counting, [], heldout=texts(400))
    whole = long.ids("heldout")
    spent, counting.characters = counting.characters, 0
    assert torch.equal(long.heldout_ids(limit), whole[:limit])
    assert counting.characters < min(spent, 40 * (limit + MARGIN))


def test_a_pool_is_read_as_far_as_a_fit_needs_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effbench.nn.data.POOL", 100)
    documents = texts(50)
    some = data(tokenizer, documents)
    assert 100 <= sum(len(example.ids) for example in some.pool) < 300
    few = len(some.pool)
    assert some.extend(1000) > 0 and len(some.pool) > few
    assert some.extend(10**9) == 0 and some.pool[-1].id.startswith("d49")
    assert data(tokenizer, documents).pool == some.pool[:few]


def test_calibration_reads_a_multiple_of_what_it_draws(tokenizer: Any) -> None:
    counting = Counting(tokenizer)
    many = data(counting, [], calibration=texts(2000))
    windows = many.calibration(2, 16, 0)
    assert windows.shape == (2, 16) and counting.characters < 8 * (2 * 16 * 16 + MARGIN) + 1
    assert not torch.equal(windows, many.calibration(2, 16, 1)) and torch.equal(windows, many.calibration(2, 16, 0))


# Short text


def write(folder: Path, number: int, words: int) -> Path:
    folder.mkdir(exist_ok=True)
    for document in texts(number, words):
        (folder / f"{document.name}.txt").write_text(document.text)
    return folder


def test_a_short_corpus_serves_as_long_as_it_has_the_tokens(tokenizer: Any, tmp_path: Path) -> None:
    source = sources.data(f"text:{write(tmp_path / 'short', 12, 60)}")
    calibration = open_data(source, tokenizer, length=1).ids("calibration")
    length = len(calibration) + 50
    borrowed = open_data(source, tokenizer, length=length)
    assert borrowed.calibration(4, length, 0).shape == (4, length)
    assert f"shorter than {length} tokens and filled up with the training part" in borrowed.protocol
    assert set(borrowed.documents("calibration")).isdisjoint(borrowed.documents("heldout"))
    assert "filled up" not in open_data(source, tokenizer, length=8).protocol
    with pytest.raises(Unsupported, match=r"have \d+ tokens, a window needs 9999: .*calibration_length=.*sequences="):
        open_data(source, tokenizer, length=9999).calibration(4, 9999, 0)


def test_what_was_read_and_skipped_is_in_the_protocol(tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "texts", 12, 60)
    (folder / "stray.pdf").write_bytes(b"%PDF")
    (folder / "copy.txt").write_text(texts(12, 60)[0].text)
    protocol = open_data(sources.data(f"text:{folder}"), tokenizer).protocol
    assert re.match(r"text:texts@[0-9a-f]{8}, documents joined by a blank line", protocol)
    assert protocol.endswith("no token added, 13 files (1 repeated), skipped stray.pdf")


def test_data_to_calibrate_on_may_be_another(tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "texts", 12, 60)
    both = open_data(sources.data("tiny", f"text:{folder}"), tokenizer, length=8)
    alone, other = open_data(sources.data(None), tokenizer), open_data(sources.data(f"text:{folder}"), tokenizer)
    assert torch.equal(both.heldout_ids(100), alone.heldout_ids(100)) and both.tasks == alone.tasks
    assert both.documents("train") == other.documents("train")
    assert torch.equal(both.calibration(2, 8, 0), other.calibration(2, 8, 0))
    assert "calibration and training on text:texts" in both.protocol


def test_speeches_are_read(tokenizer: Any) -> None:
    speeches = open_data(sources.data("speeches"), tokenizer, 64)
    assert "HARRY S. TRUMAN" in speeches.documents("heldout")[0] and len(speeches.heldout_ids(200)) == 200


# Protocols of papers


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Hub of four data sets; what is asked of it."""
    asked: list[tuple[Any, ...]] = []
    rows = ["", " = Title = \n", "", *(document.text for document in texts(30))]

    def load(path: str, configuration: str | None = None, **options: Any) -> Any:
        asked.append((path, configuration, options["split"], options["data_files"]))
        kept = [f"{path} {options['split']} {row}" if "c4" in path or "pile" in path else row for row in rows]
        return datasets.Dataset.from_dict({"text": kept})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_wikitext_is_joined_as_gptq_joins_it(hub: list[Any], tokenizer: Any) -> None:
    found = open_data(sources.data("hub:wikitext2-gptq"), tokenizer, length=32)
    assert hub == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None),
    ]
    rows = ["", " = Title = \n", "", *(document.text for document in texts(30))]
    joined = torch.tensor(tokenizer("\n\n".join(rows))["input_ids"])
    assert torch.equal(found.heldout_ids(), joined) and found.window == 2048
    windows = found.calibration(3, 32, 0)
    assert all(any(torch.equal(w, joined[i : i + 32]) for i in range(len(joined))) for w in windows)
    assert sum(map(count_learned, [*found.pool, *found.validation, *found.target])) == len(
        tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    )


def test_wanda_measures_wikitext_and_calibrates_on_rows_of_c4(hub: list[Any], tokenizer: Any) -> None:
    found = open_data(sources.data("hub:wikitext2-wanda"), tokenizer, length=16)
    assert hub[1] == ("allenai/c4", None, "train", {"train": "en/c4-train.00000-of-01024.json.gz"})
    rows = [tokenizer(document)["input_ids"] for document in found.documents("calibration")]
    for window in found.calibration(3, 16, 0).tolist():
        assert any(window == row[i : i + 16] for row in rows for i in range(len(row)))
    with pytest.raises(Unsupported, match="0 documents have more than 999 tokens, 3 are needed"):
        found.calibration(3, 999, 0)


def test_c4_is_measured_on_so_many_rows_and_tokens(
    hub: list[Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = PROTOCOLS["c4-gptq"]
    monkeypatch.setitem(PROTOCOLS, "c4-gptq", protocol._replace(heldout=protocol.heldout._replace(first=5), tokens=40))
    found = open_data(sources.data("hub:c4-gptq"), tokenizer)
    rows = [f"allenai/c4 validation {row}" for row in ("", " = Title = \n", "", *(d.text for d in texts(30)[:2]))]
    assert found.heldout_ids().tolist() == tokenizer(" ".join(rows))["input_ids"][:40]


@pytest.mark.parametrize("name", [*PROTOCOLS, "org/name"])
@pytest.mark.parametrize("error", [ConnectionError("no route"), FileNotFoundError("gone"), ValueError("no cache")])
def test_without_a_network_hub_data_is_unavailable(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(Unavailable, match=f"^data=hub:{name} cannot be had: {error}"):
        open_data(sources.data(f"hub:{name}"), tokenizer)
    with pytest.raises(Unavailable, match=f"^calibration_data=hub:{name} cannot be had: {error}"):
        open_data(sources.data("tiny", f"hub:{name}"), tokenizer)


# What is too short is named


def test_the_text_that_is_too_short_is_named(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("long", "short"):
        (tmp_path / name).mkdir()
        for document in texts(40 if name == "long" else 2):
            (tmp_path / name / f"{document.name}.txt").write_text(document.text)
    measured, learned = f"text:{tmp_path / 'long'}", f"text:{tmp_path / 'short'}"
    with pytest.raises(Unsupported, match=r"^calibration_data text:short@.*: calibration and training text have"):
        open_data(sources.data(measured, learned), tokenizer, length=900).calibration(1, 900, 0)
    with pytest.raises(Unsupported, match=r"^text:short@.*: calibration and training text have"):
        open_data(sources.data(learned), tokenizer, length=900).calibration(1, 900, 0)
    own, other = data(tokenizer, []), Data("o", {"calibration": Part(texts(3), apart=True)}, tokenizer)
    own.learn_from(other)
    with pytest.raises(Unsupported, match=r"^calibration_data o: 0 documents have more than 999 tokens"):
        own.calibration(3, 999, 0)
    with pytest.raises(Unsupported, match=r"^calibration_data o: the train part has no text"):
        own.ids("train")
    with pytest.raises(Unsupported, match=r"^d: the heldout part has no text"):
        own.heldout_ids()
