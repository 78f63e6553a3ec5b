"""The embedded default: its generator, tokenizer, tasks and checkpoint."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch
from lm_eval.utils import apply_template
from transformers import AutoTokenizer, LlamaForCausalLM

from effbench.sources.duplicates import count_shared
from effbench.tiny import MODEL, Split, ask, ask_about, documents, world
from effbench.tiny.make import build, card
from effbench.tiny.make.train import Trainer

NOTES = ("needle_256", "needle_1024", "contexts", "stream_3072")
CHOICES = ("cloze", "facts", "multihop", "arithmetic", "copy", *NOTES)
EARLY = ("needle_256", "needle_1024", "recall_256")  # what is asked for stands in the first half
PARTS = ("train", "validation", "target", "calibration", "heldout")


@pytest.fixture(scope="module")
def items() -> dict[str, list[build.Item]]:
    return build.build()


@pytest.fixture(scope="module")
def train() -> str:
    return "\n".join(documents("train", 3000))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return card.load()[0]


@pytest.fixture(scope="module")
def tokenizer():
    return card.load()[1]


@pytest.mark.parametrize("split", get_args(Split))
def test_documents_repeat(split: Split) -> None:
    assert documents(split, 8) == documents(split, 16)[:8]
    assert documents(split, 8) != documents(split, 8, seed=1)


def test_splits_share_no_document() -> None:
    texts = [text for split in get_args(Split) for text in documents(split, 300 if split != "long" else 30)]
    assert len(set(texts)) == len(texts)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no split 'test': train, validation"):
        documents("test", 1)  # type: ignore[arg-type]


def test_training_never_words_a_fact_as_held_out_text_does(train: str, items: dict[str, list[build.Item]]) -> None:
    for item in items["facts"]:
        sentence = f"{item['question']} {item['choices'][item['gold']]}."
        # a hop may end alike: "The mentor of Anna Moss lives in Arden."
        assert not any(f"{before} {sentence}" in train for before in (":", ".", "?"))


def test_training_never_adds_held_out_operands(train: str, items: dict[str, list[build.Item]]) -> None:
    assert "Sums:" in train
    for item in items["arithmetic"]:
        assert f" {item['question']}" not in train


def test_training_never_spells_out_held_out_hops(train: str, items: dict[str, list[build.Item]]) -> None:
    assert "Links:" in train
    for item in items["multihop"]:
        assert f"{item['question'].lower()} " not in train.lower()


def test_parts_of_the_new_task_agree_in_two_of_five_words_at_most() -> None:
    said = {part: [answer.rstrip(".").split() for _, answer in ask(part, 300)] for part in world.ASKED}
    for one, other in itertools.combinations(world.ASKED, 2):
        alike = (sum(a == b for a, b in zip(*pair, strict=True)) for pair in itertools.product(said[one], said[other]))
        assert max(alike) == 2, (one, other)
        mine, theirs = (["".join(pair) for pair in ask(part, 300)] for part in (one, other))
        assert count_shared(mine, theirs, 15.5 / 23) == 0, (one, other)
    assert len({tuple(answer) for answer in said["train"]}) > 280


def test_data_files_are_what_build_writes(items: dict[str, list[build.Item]]) -> None:
    assert {path.stem for path in build.DATA.iterdir()} == set(items)
    for name, rows in items.items():
        assert (build.DATA / f"{name}.jsonl").read_text(encoding="utf-8") == build.lines(rows)


@pytest.mark.parametrize("name", CHOICES)
def test_chance_is_a_quarter(name: str, items: dict[str, list[build.Item]]) -> None:
    rows = items[name]
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert set(Counter(row["gold"] for row in rows).values()) == {len(rows) // 4}
    assert len({build.join(row) for row in rows}) == len(rows)


def test_facts_and_hops_are_true(items: dict[str, list[build.Item]]) -> None:
    w = world.world()
    for row in items["facts"]:
        person = next(p for p in w.people if p in row["question"])
        assert row["choices"][row["gold"]] == w.facts[row["kind"]][person]
    for row in items["multihop"]:
        relation, via = row["kind"].split(" of ")
        person = next(p for p in w.people if p in row["question"])
        assert row["choices"][row["gold"]] == w.hop(person, (via, relation))


@pytest.mark.parametrize("tokens", [256, 1024])
def test_needles_fit_and_all_choices_stand_in_the_context(
    tokens: int, items: dict[str, list[build.Item]], tokenizer
) -> None:
    for row in items[f"needle_{tokens}"]:
        prompt = build.join(row)
        assert tokens * 0.8 < len(tokenizer(prompt)["input_ids"]) < tokens
        assert all(f" {choice}." in row["context"] for choice in row["choices"])
        assert f"{row['question']} {row['choices'][row['gold']]}." in row["context"]


def noted(row: build.Item) -> str:
    """The note that holds what an item asks for."""
    text = row["context"] if "context" in row else " ".join(row["contexts"])
    if "choices" in row:
        return f"{row['question']} {row['choices'][row['gold']]}."
    begin = text.index("Say: ")
    return text[begin : text.index(".", begin) + 1]


@pytest.mark.parametrize("name", EARLY)
def test_what_is_asked_for_is_outside_the_last_half(name: str, items: dict[str, list[build.Item]], tokenizer) -> None:
    assert len(items[name]) == 200
    for row in items[name]:
        before, after = row["context"].split(noted(row))
        early, late = world.length(before + noted(row)), world.length(after)
        assert early <= late
        assert row["depth"] == round(world.length(before) / (early + late), 2)
        prompt = tokenizer(build.join(row))["input_ids"]
        window = tokenizer.decode(prompt[len(prompt) // 2 : -len(tokenizer(row["question"])["input_ids"])])
        asked = row["question"].removeprefix("Again:").removeprefix("The code")
        assert f"{asked} " not in window


@pytest.mark.parametrize("name", EARLY)
def test_depths_are_even(name: str, items: dict[str, list[build.Item]]) -> None:
    depths = [row["depth"] for row in items[name]]
    for some in (depths[:40], depths[40:80], depths):
        bands = Counter(min(int(depth * 10), 4) for depth in some)  # a tenth of the context each
        assert all(0.1 <= bands[band] / len(some) <= 0.3 for band in range(5)), bands


def test_one_context_in_five_is_asked_about(items: dict[str, list[build.Item]]) -> None:
    places: Counter[int] = Counter()
    for row in items["contexts"]:
        key, answer = row["question"].split()[-1], row["choices"][row["gold"]]
        (place,) = [i for i, context in enumerate(row["contexts"]) if key in context.split()]
        assert [i for i, context in enumerate(row["contexts"]) if f" {answer}." in context] == [place]
        assert all(f" {choice}." in " ".join(row["contexts"]) for choice in row["choices"])
        places[place] += 1
    assert places == {place: 40 for place in range(5)}


def test_the_stream_outruns_the_positions_and_its_needle_is_near(items: dict[str, list[build.Item]], tokenizer) -> None:
    for row in items["stream_3072"]:
        prompt = tokenizer(build.join(row))["input_ids"]
        assert 2900 < len(prompt) < 3072
        assert noted(row) in tokenizer.decode(prompt[-200:])
        assert row["depth"] > 0.9


def codes_in(text: str) -> set[tuple[str, ...]]:
    """The pairs of a key and a value that a text notes."""
    return {tuple(note.split()) for note in re.findall(r"The code (\w+ \w+)\.", text)}


def test_questions_and_tasks_have_no_code_in_common(items: dict[str, list[build.Item]]) -> None:
    noted = {part: codes_in(" ".join(" ".join(q.contexts) for q in ask_about(part, 200))) for part in PARTS}
    rows = itertools.chain.from_iterable(items[name] for name in NOTES)
    noted["tasks"] = codes_in(" ".join(map(build.join, rows)))
    for one, other in itertools.combinations(noted, 2):
        assert noted[one] and not noted[one] & noted[other], (one, other)


def test_questions_to_train_on_are_like_those_of_the_task(items: dict[str, list[build.Item]]) -> None:
    assert ask_about("train", 4) == ask_about("train", 8)[:4] != ask_about("train", 4, seed=1)
    places = Counter()
    for asked in ask_about("target", 50):
        assert {type(part) for part in asked} == {str, list}
        (place,) = [i for i, text in enumerate(asked.contexts) if f"{asked.question} {asked.answer}." in text]
        places[place] += 1
        assert asked.instruction == items["contexts"][0]["instruction"]
    assert places == {place: 10 for place in range(5)}


def test_tasks_load_through_lm_eval() -> None:
    found = card.manager().load(["tiny", "tiny_long"])["tasks"]
    assert set(found) == {"tiny_ppl", "tiny_recall_256", *(f"tiny_{name}" for name in CHOICES)}
    assert set(found) - set(card.manager().load(["tiny"])["tasks"]) == {"tiny_stream_3072"}
    assert all(found[f"tiny_{name}"].config.metadata["chance"] == 0.25 for name in CHOICES)
    assert {name for name in found if found[name].VERSION == 2} == {"tiny_needle_256", "tiny_needle_1024"}


@pytest.mark.parametrize("name", [*CHOICES, "recall_256"])
def test_segments_render_to_the_prompt(name: str, items: dict[str, list[build.Item]]) -> None:
    task = card.manager().load([f"tiny_{name}"])["tasks"][f"tiny_{name}"]
    for row, item in zip(task.test_docs(), items[name], strict=True):
        parts = []
        for segment in task.config.metadata["segments"].values():
            value = row[segment["field"]] if isinstance(segment, dict) else apply_template(segment, row)
            parts += value if isinstance(value, list) else [value]
        assert " ".join(filter(None, parts)) == task.doc_to_text(row) == build.join(item)
        assert not task.doc_to_text(row).endswith(" ")


@pytest.mark.parametrize(("name", "least"), [("needle_256", 0.9), ("contexts", 0.9), ("recall_256", 0.7)])
def test_the_model_can_do_the_task(name: str, least: float, model: LlamaForCausalLM, tokenizer) -> None:
    task = f"tiny_{name}"
    assert card.accuracies(model, tokenizer, [task], limit=30)[task]["accuracy"] >= least


@torch.no_grad()
def test_the_model_can_do_the_stream_from_its_beginning_and_end(
    model: LlamaForCausalLM, tokenizer, items: dict[str, list[build.Item]]
) -> None:
    for row in items["stream_3072"]:
        prompt = tokenizer(build.join(row), return_tensors="pt")["input_ids"]
        choices = [tokenizer.encode(f" {choice}") for choice in row["choices"]]
        logits = model(input_ids=torch.cat([prompt[:, :4], prompt[:, -300:]], 1)).logits[0, -1]
        assert logits[torch.tensor(choices).flatten()].argmax() == row["gold"]


def test_tokenizer_round_trip(tokenizer) -> None:
    for text in [*documents("heldout", 50), *("".join(pair) for pair in ask("train", 5)), "Grüße, 字 42!\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_length_counts_tokens(tokenizer) -> None:
    for text in documents("train", 200):
        assert world.length(text) == len(tokenizer(text)["input_ids"])


def test_checkpoint_is_whole_and_small() -> None:
    model, info = LlamaForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads == model.config.num_attention_heads
    assert model.config.hidden_size % 128 == model.config.intermediate_size % 128 == 0
    assert model.config.max_position_embeddings >= 2048
    assert len(AutoTokenizer.from_pretrained(MODEL)) == model.config.vocab_size
    assert sum(path.stat().st_size for path in Path(MODEL).iterdir()) <= 16 * 2**20


def test_perplexity_is_that_of_the_card(model: LlamaForCausalLM, tokenizer) -> None:
    told = json.loads((card.HERE / "card.json").read_text())
    assert card.perplexity(model, tokenizer, documents("heldout", 20)) < 1.02 * told["perplexity_of_20"]
    assert card.table(told) in (card.HERE / "README.md").read_text()


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("effbench.tiny.make.train.BATCH_TOKENS", 256)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "tokenizer")

    def trained(steps: int, workers: int, resume: bool) -> Trainer:
        trainer = Trainer(tmp_path, "cpu", workers)
        if resume:
            trainer.load()
        trainer.run(steps * 256, lambda step, _: 1e-3 / (step + 1), saving=True)
        assert trainer.step == steps
        return trainer

    whole = trained(4, 0, resume=False).model.state_dict()
    trained(2, 0, resume=False)
    again = trained(4, 1, resume=True).model.state_dict()  # another process writes the text: the same text
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
