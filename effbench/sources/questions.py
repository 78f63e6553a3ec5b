"""Questions over the addresses that ship: an invented fact among what was said, and four answers of one kind.

Facts are of people and words that no held-out address names, so that only the fact has the answer. Everything is made
from the held-out text when it is asked for, the same every time; nothing of it is stored.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from effbench.core.files import file_digest
from effbench.sources.text import Corpus, Document, read_speeches

FOLDER = Path(__file__).parent / "speeches" / "tasks"  # of lm-eval, by what they ask
ITEMS = 60  # of a task
CHOICES = 4
WORDS = 370  # of what was said in the contexts of an item, at most: with the rest about 480 tokens of SmolLM2
PASSAGES = 5  # of an item that asks over several
DEPTHS = 10  # places for a fact, at even distances from the beginning of the text to its end
STEP = 3  # depths from item to item, so that a few items in a row are spread over all
SENTENCE = re.compile(r"(?<=[a-z]{3}[.!?])\s+(?=[A-Z])")  # behind a word of some letters: no title, no initial
ASIDE = re.compile(r"[\[\](){}]")  # applause, laughter and corrections
SHORTEST, LONGEST = 5, 40  # words of a sentence that is read
INSTRUCTION = "Read the text and answer the question."
NAMES = (
    *("Alice", "Clara", "Edith", "Emma", "Felix", "Helen", "Hugo"),
    *("Martha", "Oliver", "Olivia", "Oscar", "Simon", "Sophie"),
)
ANIMALS = (  # of five letters
    *("camel", "eagle", "goose", "horse", "moose", "mouse"),
    *("panda", "rhino", "shark", "snake", "tiger", "whale", "zebra"),
)


class Question(NamedTuple):
    """An item of a task."""

    instruction: str
    contexts: list[str]
    question: str  # with the beginning of the answer
    choices: list[str]
    gold: int  # number of the choice that is right
    place: int  # of the fact that is asked for: its depth, or the number of its context


def ask_needles() -> list[Question]:
    """One text each with one fact in it, at all depths in turns; nothing else of what can be chosen is in the text."""
    asked = []
    for i, said in enumerate(itertools.islice(_take_turns(WORDS), ITEMS)):
        chance = random.Random(f"needle:{i}")
        name, words, gold = chance.choice(NAMES), chance.sample(ANIMALS, CHOICES), chance.randrange(CHOICES)
        depth = STEP * i % DEPTHS
        fact = f"The secret word of {name} is {words[gold]}."
        ends = [*itertools.accumulate((len(sentence.split()) for sentence in said), initial=0)]
        wanted = ends[-1] * depth / (DEPTHS - 1)
        place = min(range(len(ends)), key=lambda number: abs(ends[number] - wanted))
        context = " ".join([*said[:place], fact, *said[place:]])
        question = f"What is the secret word of {name}? The secret word of {name} is"
        asked.append(Question(INSTRUCTION, [context], question, words, gold, depth))
    return asked


def ask_passages() -> list[Question]:
    """Passages of several addresses with a fact in each, of another person; which is asked for takes turns.

    What can be chosen is in the passages, too.
    """
    asked, passages = [], _take_turns(WORDS // PASSAGES)
    for i in range(ITEMS):
        chance = random.Random(f"passages:{i}")
        names, animals = chance.sample(NAMES, PASSAGES), chance.sample(ANIMALS, PASSAGES)
        contexts = []
        for said, name, animal in zip(itertools.islice(passages, PASSAGES), names, animals, strict=True):
            place = chance.randint(0, len(said))
            fact = f"The favorite animal of {name} is the {animal}."
            contexts.append(" ".join([*said[:place], fact, *said[place:]]))
        place, gold = i % PASSAGES, chance.randrange(CHOICES)
        choices = chance.sample([animal for animal in animals if animal != animals[place]], CHOICES - 1)
        choices.insert(gold, animals[place])
        asked_for = f"favorite animal of {names[place]}"
        question = f"What is the {asked_for}? The {asked_for} is the"
        asked.append(Question(INSTRUCTION, contexts, question, choices, gold, place))
    return asked


TASKS: dict[str, Callable[[], list[Question]]] = {"needle": ask_needles, "passages": ask_passages}


@functools.cache
def read_questions() -> Corpus:
    """The addresses, to be measured and learned from as ever; the digest is of the questions, too."""
    speeches = read_speeches()
    items = {name: ask() for name, ask in TASKS.items()}
    files = [f"{path.name} {file_digest(path)}" for path in sorted(FOLDER.iterdir()) if path.is_file()]
    said = "\n".join([speeches.digest, json.dumps(items), *files])
    return dataclasses.replace(speeches, digest=hashlib.sha256(said.encode()).hexdigest())


def _take_turns(words: int) -> Iterator[list[str]]:
    """Stretches of held-out addresses, of at most so many words, by sentences; the addresses take turns."""
    found = [_cut_stretches(address, words) for address in read_speeches().parts["heldout"]]
    return (stretch for turn in itertools.zip_longest(*found) for stretch in turn if stretch is not None)


def _cut_stretches(address: Document, words: int) -> list[list[str]]:
    """Whole stretches of an address that share no sentence; its heading and what is no plain sentence are left out."""
    stretches: list[list[str]] = [[]]
    left = words
    _, _, body = address.text.partition("\n\n")
    for sentence in SENTENCE.split(body):
        number = len(sentence.split())
        if not sentence.isascii() or ASIDE.search(sentence) or not SHORTEST <= number <= LONGEST:
            continue
        if number > left:
            stretches.append([])
            left = words
        stretches[-1].append(" ".join(sentence.split()))
        left -= number
    return stretches[:-1]
