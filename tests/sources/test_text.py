"""Documents from files: the same text whatever the line endings, duplicates and stray files around it."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from effbench import sources
from effbench.core.errors import Usage
from effbench.sources.text import PARTS, Corpus, read_folder, read_lines, read_presidents, read_speeches

TEXTS = {f"{number}.txt": f"Caf\xe9 number {number}.\nIt serves {'tea ' * number}.\n" for number in range(40)}


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def names(corpus: Corpus) -> dict[str, list[str]]:
    return {part: [document.name for document in documents] for part, documents in corpus.parts.items()}


@pytest.fixture
def plain(tmp_path: Path) -> Corpus:
    return read_folder(write(tmp_path / "plain", dict(TEXTS)))


FORMS = {
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "Latin-1": lambda text: text.encode("latin-1"),
    "decomposed": lambda text: unicodedata.normalize("NFD", text).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_means_the_same_however_its_files_are_stored(tmp_path: Path, plain: Corpus, form: str) -> None:
    again = read_folder(write(tmp_path / "again", {name: FORMS[form](text) for name, text in TEXTS.items()}))
    assert again.parts == plain.parts and again.digest == plain.digest
    assert ("40 as Latin-1" in again.notes) == (form == "Latin-1")
    assert "\r" not in "".join(document.text for document in again.parts["train"])


def test_copies_count_once_and_are_counted(tmp_path: Path, plain: Corpus) -> None:
    folder = write(tmp_path / "twice", dict(TEXTS))
    write(folder / "copy", {name: text.replace("\n", "\r\n") for name, text in TEXTS.items()})
    again = read_folder(folder)
    assert names(again) == names(plain) and again.digest == plain.digest
    assert plain.notes == ", 40 files" and again.notes == ", 80 files (40 repeated)"


def test_stray_files_are_skipped_and_named(tmp_path: Path, plain: Corpus) -> None:
    stray = {".DS_Store": b"\0\1", "a.pdf": b"%PDF\0", ".git/objects/a": b"\0", ".git/config": "x", "sub/.x/y.txt": "x"}
    again = read_folder(write(tmp_path / "stray", TEXTS | stray | {"empty.txt": " \n"}))
    assert again.parts == plain.parts and again.digest == plain.digest
    assert again.notes == ", 40 files (1 empty), skipped .DS_Store, .git, a.pdf, sub/.x"
    many = read_folder(write(tmp_path / "many", TEXTS | {f"{number}.png": b"\0" for number in range(9)}))
    assert many.notes.endswith("skipped 0.png, 1.png, 2.png, 3.png, 4.png and 4 more")


def test_a_part_is_chosen_by_content_and_stays_chosen(tmp_path: Path, plain: Corpus) -> None:
    assert all(plain.parts.values())
    folder = write(
        tmp_path / "more", {name.replace("txt", "md"): text for name, text in TEXTS.items()} | {"new": "New"}
    )
    again = read_folder(folder)
    texts = {part: {document.text for document in documents} for part, documents in again.parts.items()}
    assert all({d.text for d in documents} <= texts[part] for part, documents in plain.parts.items())
    assert sum(map(len, texts.values())) == 41 and again.digest != plain.digest


@pytest.mark.parametrize(("number", "parts"), [(1, 1), (2, 1), (3, 3), (4, 4)])
def test_few_files_still_give_three_parts(tmp_path: Path, number: int, parts: int) -> None:
    corpus = read_folder(write(tmp_path, dict(list(TEXTS.items())[:number])))
    assert all(corpus.parts.values())
    assert ("cut in three" in corpus.notes) == (number < 3)
    whole = "".join(document.text for part in ("heldout", "calibration", "train") for document in corpus.parts[part])
    assert len(whole) >= sum(len(text) for text in list(TEXTS.values())[:number])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": " \n"}, r"holds no text; text files end in \.md"),
        ({"a.pdf": b"%PDF"}, r"holds no text; skipped a\.pdf; text files end in"),
        ({"a.txt": "text", "b.txt": b"\x00\x01\x02"}, r"b\.txt: is binary, not text"),
    ],
)
def test_folders_without_text_are_wrong_usage(tmp_path: Path, files: Any, message: str) -> None:
    with pytest.raises(Usage, match=message) as error:
        sources.data(f"text:{write(tmp_path, files)}")
    assert "\n" not in str(error.value)


ROWS = [{"prompt": f"What is {n} + 1? ", "completion": f"It is {n + 1}.", "id": n} for n in range(20)]


def lines(path: Path, rows: list[Any], end: str = "\n") -> Path:
    path.write_bytes(end.join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode())
    return path


def test_completions_and_plain_text_from_lines(tmp_path: Path) -> None:
    corpus = read_lines(lines(tmp_path / "a.jsonl", [*ROWS, "", {"text": "Plain."}, {"text": " "}, ROWS[0]]))
    documents = {document.name: document for part in corpus.parts.values() for document in part}
    assert documents["a.jsonl:3"].text == "What is 2 + 1? It is 3." and documents["a.jsonl:3"].prompt == 15
    assert documents["a.jsonl:22"].prompt is None and len(documents) == 21
    assert all(corpus.parts.values()) and corpus.notes == ", 22 lines (1 empty, 1 repeated)"
    again = read_lines(lines(tmp_path / "b.jsonl", [*ROWS, "", {"text": "Plain."}], "\r\n"))
    assert again.digest == corpus.digest
    assert sources.data(f"jsonl:{tmp_path / 'a.jsonl'}").digest == corpus.digest


def test_lines_name_their_parts(tmp_path: Path) -> None:
    """A part that lines name holds just these; the others fall as they would without them."""
    plain = read_lines(lines(tmp_path / "a.jsonl", ROWS))
    aimed = [{"text": f"Target {n}.", "part": "target"} for n in range(3)]
    corpus = read_lines(lines(tmp_path / "b.jsonl", [*ROWS, *aimed]))
    assert {document.text for document in corpus.parts.pop("target")} == {row["text"] for row in aimed}
    told = {part: {document.text for document in documents} for part, documents in corpus.parts.items()}
    assert told == {part: {document.text for document in documents} for part, documents in plain.parts.items()}
    assert corpus.notes == ", 23 lines (3 told into target)" and corpus.digest != plain.digest
    whole = ("train", "validation", "target", "heldout")
    rows = [row | {"part": whole[place % 4]} for place, row in enumerate(ROWS)]
    full = read_lines(lines(tmp_path / "c.jsonl", rows))
    assert {part: len(found) for part, found in full.parts.items()} == dict.fromkeys(whole, 5) | {"calibration": 0}
    assert not any("part" in (document.meta or {}) for document in full.parts["train"])
    moved = read_lines(lines(tmp_path / "d.jsonl", [rows[0] | {"part": "target"}, *rows[1:]]))
    assert moved.digest != full.digest  # the same text in another part is other data


@pytest.mark.parametrize("named", [("heldout",), ("train",), ("heldout", "calibration"), ("train", "calibration")])
def test_what_names_no_part_falls_into_those_that_nobody_names(tmp_path: Path, named: tuple[str, ...]) -> None:
    told = [{"text": f"Told {part} {n}.", "part": part} for part in named for n in range(2)]
    for number in (2, 20):
        parts = read_lines(lines(tmp_path / "a.jsonl", [*ROWS[:number], *told])).parts
        for part in named:
            assert {document.text for document in parts[part]} == {f"Told {part} {n}." for n in range(2)}
        assert sum(map(len, parts.values())) == number + len(told) and all(parts.values())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "a", "part": "target"}, {"text": "b"}],
            "no example is of the part heldout, and too few name no part",
        ),
        ([{"text": "a", "part": "heldout"}], "no example is of the part train, and too few name no part"),
        (
            [{"text": str(n), "part": part} for n, part in enumerate(("train", "calibration", "heldout", None))],
            "1 examples name no part, and others name all that these could fall in",
        ),
    ],
)
def test_parts_that_stay_empty_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(Usage, match=message):
        read_lines(lines(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "part": "test"}, "part is 'test': it must be one of train, validation, target, calibration"),
        ({"text": "a", "part": ["train"]}, "part is \\['train'\\]: it must be"),
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ([1], "no object: write"),
        ({"prompt": "a"}, "has prompt: it takes prompt and completion, or text alone"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "has prompt, completion, text: it takes"),
        ({"messages": []}, "has messages: it takes"),
        ({}, "has no keys"),
        ({"prompt": "a", "completion": 1}, "completion is no text"),
        ({"text": None}, "text is no text"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ('{"text": "\\ud800"}', "holds half of a character"),
    ],
)
def test_bad_lines_are_named_with_their_number(tmp_path: Path, row: Any, message: str) -> None:
    path = lines(tmp_path / "a.jsonl", [*ROWS[:3], row, ROWS[4], row])
    with pytest.raises(Usage, match=f"line 4: {message}") as error:
        sources.data(f"jsonl:{path}")
    assert str(error.value).endswith("also wrong: line 6") and "\n" not in str(error.value)


def test_files_that_are_no_lines_of_json(tmp_path: Path) -> None:
    for content, message in ((b"", "holds no text"), (b"\xff\xfe\xff", "is not UTF-8")):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(Usage, match=message):
            sources.data(f"jsonl:{tmp_path / 'a.jsonl'}")
    with pytest.raises(Usage, match="no such file"):
        sources.data("jsonl:nowhere")
    with pytest.raises(Usage, match="give at least 3"):
        sources.data(f"jsonl:{lines(tmp_path / 'b.jsonl', ROWS[:2])}")


def test_the_speeches_that_ship_have_fixed_parts() -> None:
    corpus = read_speeches()
    assert {part: len(documents) for part, documents in corpus.parts.items()} == {
        "train": 48, "calibration": 9, "heldout": 8
    }  # fmt: skip
    everything = [document for documents in corpus.parts.values() for document in documents]
    assert len({document.name for document in everything}) == len({document.digest for document in everything}) == 65
    assert corpus.parts["heldout"][0].name == "1949-Truman" and sources.data("speeches").digest == corpus.digest
    folder = Path(sources.__file__).parent / "speeches"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
    assert "public\n  domain" in (folder / "README.md").read_text()


def test_data_to_calibrate_on_is_part_of_what_the_data_is(tmp_path: Path) -> None:
    alone, both = sources.data("tiny"), sources.data("tiny", "speeches")
    assert both.shown == "tiny calibrated on speeches" and both.digest not in (
        alone.digest,
        sources.data("speeches").digest,
    )
    assert sources.data("speeches", "tiny").digest != both.digest
    assert sources.data("tiny", "hub:c4-gptq").digest == sources.UNRESOLVED
    with pytest.raises(
        Usage,
        match="calibration_data=nothing: must be tiny, tiny:task, tiny:questions, tiny:planted, speeches, "
        "speeches:presidents, speeches:questions, text:",
    ):
        sources.data("tiny", "nothing")


@pytest.mark.parametrize("option", ["data", "calibration_data"])
@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ['{"prompt": "a", "completion": "b"}'] * 3,
            "1 different examples do not fall in three parts: give at least 3",
        ),
        (['{"prompt": "a", "completion": "b"}', '{"text": "c"}'], "2 different examples do not fall in three parts"),
        (['{"text": " "}'], "holds no text"),
        (["{"], "line 1: no JSON"),
    ],
)
def test_a_message_names_the_option_and_the_file(tmp_path: Path, option: str, lines: list[str], words: str) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(Usage) as error:
        sources.data(*([f"jsonl:{file}"] if option == "data" else ["tiny", f"jsonl:{file}"]))
    assert str(error.value).startswith(f"{option}=jsonl:{file}: {words}")


def test_passages_of_presidents_are_of_addresses_that_no_other_part_has() -> None:
    parts, whole = read_presidents().parts, read_speeches().parts
    addresses = {part: {passage.name.rpartition("/")[0] for passage in parts[part]} for part in PARTS}
    assert sum(map(len, addresses.values())) == len(set().union(*addresses.values()))
    assert addresses["heldout"] == {address.name for address in whole["heldout"]}
    aside = addresses["train"] | addresses["validation"] | addresses["target"]
    assert aside == {address.name for address in whole["train"]}
    texts = {" ".join(address.text.split()) for part in whole.values() for address in part}
    for part in PARTS:
        for text, name, prompt, meta, _ in parts[part]:
            passage, asked = text[:prompt].split("\n\n")
            assert any(passage in speech for speech in texts) and asked.endswith("President")
            surname = text[prompt:].split()[-1]
            assert meta["president"].endswith(surname) and surname in name
            assert not any(word in passage.lower() for word in ("truman", "nixon", "reagan", "clinton", "kennedy"))
    # The first items of a part are of all its addresses.
    number = len(addresses["heldout"])
    assert {passage.name.rpartition("/")[0] for passage in parts["heldout"][:number]} == addresses["heldout"]
    assert {each.meta["president"] for each in parts["heldout"]} <= {each.meta["president"] for each in parts["train"]}
