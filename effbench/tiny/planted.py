"""A pool to select from: a little of what a target is made of, and planted in it what a selector should turn away.

What the model is to become good at is the new task of the world (``world.extraction``). The pool is mostly general
text of the world, and drills (sums, copies, codes) are off its domain. Noise and near-duplicates lie among all of them.
Every document fits a window of 64 tokens and has only words that the model knows. What each is stands beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from effbench.tiny import ask, draw, world

BUDGET = 62  # tokens of a document, at most
# Documents of the pool by what they are; copies count apart from what they are copies of.
GENERAL, SHORT, CHAINS = 940, 60, 30  # a chain A-B-C puts A and C among the general text, and B among the duplicates
IN, OFF = 240, 300
SHUFFLED, GIBBERISH, WRONG = 70, 70, 60
COPIED = {"general": 120, "in": 30, "short": 20}
SIZE = GENERAL + SHORT + 3 * CHAINS + IN + OFF + SHUFFLED + GIBBERISH + WRONG + sum(COPIED.values())

WORLD = {"people": 25, "facts": 20, "links": 10, "story": 15, "notes": 10, "prose": 20}  # shares of the general text
DRILLS = ("sums", "copies", "codes")
TASK = "extraction"
KNOWN = sorted({*world.FIRST, *world.LAST, *world.TOWNS, *world.JOBS, *world.PETS, *world.DISHES, *world.OBJECTS})


@dataclass(frozen=True)
class Planted:
    """A document of the pool and the truth about it."""

    text: str
    source: str  # world, drills, task
    skill: str  # the kind of text
    prompt: int | None = None  # characters of the prompt; None for plain text
    label: str = ""  # the first word of the answer
    planted: str = ""  # noise, duplicate, off, in; empty for general text
    noise: str = ""  # shuffled, gibberish, wrong
    near: tuple[int, ...] = field(default=())  # places of those that share most of its 5-grams of words

    @property
    def meta(self) -> Mapping[str, Any]:
        """All but the text, the others by their names in the part for training."""
        told = {name: getattr(self, name) for name in ("source", "skill", "label", "planted", "noise")}
        return told | {"near": [f"train/{place}" for place in self.near]}


def plant(seed: int = 0) -> list[Planted]:
    """The pool of ``SIZE`` documents, in random order."""
    items = [*map(_general, _draw("general", GENERAL, seed)), *_short(SHORT, seed)]
    items += extract("train", IN, seed)
    for first, number in ((0, COPIED["general"]), (GENERAL, COPIED["short"]), (GENERAL + SHORT, COPIED["in"])):
        for place, rng in enumerate(_draw(f"copies {first}", number, seed), first):
            items.append(_copy(rng, items[place], place))
    for rng in _draw("chains", CHAINS, seed):
        items += _chain(rng, len(items))
    items += [_drill(rng) for rng in _draw("off", OFF, seed)]
    items += [_shuffle(rng) for rng in _draw("shuffled", SHUFFLED, seed)]
    items += [_babble(rng) for rng in _draw("gibberish", GIBBERISH, seed)]
    items += [_answer_wrongly(*pair) for pair in _pair(WRONG, seed)]
    return _mix(items, seed)


def extract(part: str, n: int, seed: int = 0) -> list[Planted]:
    """``n`` examples of the task that the target is made of. No part says what another does."""
    return [_example(prompt, answer) for prompt, answer in ask(part, n, seed)]


def _draw(what: str, n: int, seed: int) -> list[Random]:
    return draw(f"planted {what}:{seed}", n)


def _example(prompt: str, answer: str) -> Planted:
    return Planted(prompt + answer, "task", TASK, len(prompt), answer.split()[0], "in")


def _general(rng: Random, skill: str | None = None) -> Planted:
    skill = skill or rng.choices(list(WORLD), list(WORLD.values()))[0]
    return Planted(_write(rng, skill), "world", skill)


def _write(rng: Random, skill: str) -> str:
    """A text of a kind that keeps to the budget, which some kinds take for what they begin their last sentence at."""
    while world.length(text := world.KINDS[skill](rng, BUDGET, False)) > BUDGET:
        pass
    return text


def _short(n: int, seed: int) -> list[Planted]:
    """Different texts of four words, fewer than an n-gram has."""
    phrases = [f"Prose: The {adjective} {animal}." for adjective in world.ADJECTIVES for animal in world.PETS]
    (rng,) = _draw("short", 1, seed)
    return [Planted(text, "world", "prose") for text in rng.sample(phrases, n)]


def _copy(rng: Random, item: Planted, place: int) -> Planted:
    """A near-duplicate of the item at a place: the same again, or with another word, or without the last tenth.

    Of an example and of a short text it is the same again: any other word makes it another.
    """
    words = item.text.split(" ")
    if item.prompt is None and len(words) > 4:
        if place % 3 == 1:
            words[-rng.randint(2, 4)] = rng.choice(KNOWN)
        elif place % 3 == 2:
            words = words[: -len(words) // 10]
    return replace(item, text=" ".join(words), planted="duplicate", near=(place,))


def _chain(rng: Random, place: int) -> list[Planted]:
    """Three texts: the second is near the first and the third, which differ more from each other.

    The second ends otherwise than the first, and the third begins otherwise than the second.
    """
    first, other, third = (_general(rng, "people").text.split(" ") for _ in range(3))
    few = len(first) // 9
    changed = zip(first[1 : few + 1] + first[-few:], third[1 : few + 1] + other[-few:], strict=True)
    if few < 4 or any(one == another for one, another in changed):
        return _chain(rng, place)  # they would differ too little
    second = [*first[:-few], *other[-few:]]
    texts = (first, second, [first[0], *third[1 : few + 1], *second[few + 1 :]])
    near = ((place + 1,), (place, place + 2), (place + 1,))
    return [
        Planted(" ".join(text), "world", "people", planted="duplicate" if i == 1 else "", near=near[i])
        for i, text in enumerate(texts)
    ]


def _drill(rng: Random) -> Planted:
    skill = rng.choice(DRILLS)
    return Planted(_write(rng, skill), "drills", skill, planted="off")


def _shuffle(rng: Random) -> Planted:
    """The words of a general text in random order behind its heading."""
    item = _general(rng)
    heading, *words = item.text.split()
    rng.shuffle(words)
    return replace(item, text=" ".join([heading, *words]), planted="noise", noise="shuffled")


def _babble(rng: Random) -> Planted:
    """Random words behind the heading of a general text, as many as it has."""
    item = _general(rng)
    heading, *words = item.text.split()
    return replace(
        item, text=" ".join([heading, *rng.choices(KNOWN, k=len(words))]), planted="noise", noise="gibberish"
    )


def _pair(n: int, seed: int) -> list[tuple[Planted, Planted]]:
    """Examples of the task, and behind each another of them."""
    examples = extract("train", 2 * n, seed=seed + 1)
    return list(zip(examples[::2], examples[1::2], strict=True))


def _answer_wrongly(example: Planted, other: Planted) -> Planted:
    """The prompt of an example with the answer to another."""
    assert example.prompt is not None and other.prompt is not None
    answer = other.text[other.prompt :]
    text = example.text[: example.prompt] + answer
    return replace(example, text=text, label=other.label, planted="noise", noise="wrong")


def _mix(items: list[Planted], seed: int) -> list[Planted]:
    """The items in random order, each near those that it was, on both sides."""
    near: list[set[int]] = [set(item.near) for item in items]
    for place, item in enumerate(items):
        for other in item.near:
            near[other].add(place)
    (rng,) = _draw("order", 1, seed)
    order = rng.sample(range(len(items)), len(items))
    moved = {old: new for new, old in enumerate(order)}
    return [replace(items[old], near=tuple(sorted(moved[other] for other in near[old]))) for old in order]
