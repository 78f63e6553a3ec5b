"""A generated world: seeded, deterministic, English-like text about people, codes, sums and rooms.

Everything a document can say is either *knowledge* (1,600 people with five facts each, towns in lands, what a
trade uses) or *state* that holds inside one document (who holds the lamp, which code belongs to which word).
Every word of the closed vocabulary is one token of the tokenizer, and every document opens with a heading,
so a word never stands without the space before it: ``length`` counts tokens without a tokenizer.

Held-out text states the same facts in phrasings that training text never uses *for that fact*, sums of
operands that training never adds, and hops through people whose hops training never spells out.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, count, product
from random import Random
from typing import NamedTuple


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


def rows(text: str) -> list[list[str]]:
    """The words between semicolons."""
    return [row.split() for row in text.split(";")]


def syllables(heads: str, tails: str) -> list[str]:
    """Made-up words: every head with every tail."""
    return [head + tail for head, tail in product(heads.split(), tails.split())]


FIRST = words(
    """
    Anna Boris Clara Dora Edgar Fiona Georg Hanna Igor Julia Karl Lena Marta Nils Olga Peter Quinn Rosa
    Simon Tessa Ursula Viktor Wanda Xenia Yusuf Zelda Arno Berta Cyril Doris Emil Frida Gustav Helga
    Ivan Jonas Kira Lars Mona Nora
    """
)
LAST = words(
    """
    Moss Hill Brook Stone Reed Ford Lake Wood Marsh Dale Thorn Birch Frost Snow Bell Clay Cross Flint
    Glass Heath Knight Lamb Mills North Oakes Pike Rowe Shaw Stark Tate Vance Wells York Blythe Croft
    Drake Finch Grove Hale Keane
    """
)
TOWNS = words(
    """
    Arden Bexley Corva Dunmore Elston Farrow Galby Harwick Ilford Jarrow Kelso Lorne Merton Norby Oxley
    Perth Quorn Rugby Selby Tarvin Upton Varna Wexford Yarm Zeal Ashby Brill Crewe Deal Epsom Frome
    Goole
    """
)
LANDS = words("Avalon Borduria Caledon Drachen Estoria Florin Gondal Hyrkan")

#: trade, where it is done, what with, what comes of it
TRADES = rows(
    """
    baker bakery oven bread; smith forge hammer swords; tailor shop needle coats;
    farmer field plough wheat; fisher harbour net salmon; miller mill wheel flour;
    potter kiln clay bowls; weaver loom yarn carpets; brewer cellar barrel beer;
    mason quarry chisel bricks; painter studio brush portraits; tanner shed knife leather;
    gardener garden spade roses; hunter forest bow venison; teacher school chalk lessons;
    doctor hospital needle cures; sailor ship compass voyages; printer press ink books;
    cooper yard saw barrels; jeweller vault pliers rings; shepherd meadow staff wool;
    beekeeper orchard smoke honey; cobbler stall thread shoes; carpenter workshop plane tables;
    glazier glasshouse torch windows; clerk office pen letters; drummer stage drum songs;
    judge court gavel verdicts; pilot airfield map flights; nurse ward thermometer comfort;
    monk abbey candle prayers; ranger park whistle trails
    """
)
JOBS = [row[0] for row in TRADES]
#: an animal and what it eats
ANIMALS = rows(
    """
    cat mice; dog bones; horse oats; parrot seeds; rabbit carrots; goat grass; lizard flies;
    turtle lettuce; ferret eggs; pigeon crumbs; hamster nuts; snake frogs; monkey bananas; fox hens;
    bear berries; squirrel acorns; deer leaves; heron fish; hedgehog worms; swan weeds; donkey hay;
    mole beetles; spider moths; tortoise clover
    """
)
PETS = [row[0] for row in ANIMALS]
DISHES = words(
    """
    soup stew pasta rice curry salad pizza dumplings porridge pancakes noodles omelette sausages beans
    lentils mushrooms potatoes cabbage spinach pumpkin waffles tofu risotto lasagne tacos sushi goulash
    haggis paella couscous ravioli chowder
    """
)
OBJECTS = words(
    """
    lamp key rope coin mirror bottle basket ring clock flute ladder bucket kettle pillow ribbon button
    candle hat glove spoon fork plate cup box
    """
)
ROOMS = words("kitchen hall attic library tower stable porch pantry parlour chapel barn courtyard")
ADJECTIVES = words(
    """
    old young tall quiet clever tired happy proud honest gentle brave lazy careful hungry cheerful
    lonely famous humble patient curious
    """
)
TIMES = words("morning evening afternoon night summer winter spring autumn")
WEATHER = words("rain fog sun wind storm thunder hail ice")
KEYS = syllables("z v kr tw bl dr gw sn", "arn elt ib ox urm isk ond ump")
VALUES = syllables("p f gl tr sp ch j qu", "arno elto iba oxi urma isku onda umpo")

RELATIONS = ("city", "job", "pet", "dish", "mentor")
PHRASINGS = {
    "city": (
        "{p} lives in {v}.",
        "The home of {p} is in {v}.",
        "{p} has a house in {v}.",
        "You can visit {p} in {v}.",
        "Where does {p} live? In {v}.",
    ),
    "job": (
        "{p} works as a {v}.",
        "The job of {p} is {v}.",
        "{p} was trained as a {v}.",
        "{p} earns money as a {v}.",
        "What is the work of {p}? It is {v}.",
    ),
    "pet": (
        "{p} keeps a {v}.",
        "The pet of {p} is a {v}.",
        "{p} often walks with a {v}.",
        "{p} has a tame {v}.",
        "Which pet has {p}? A {v}.",
    ),
    "dish": (
        "{p} likes to eat {v}.",
        "The best dish for {p} is {v}.",
        "{p} always orders {v}.",
        "For dinner {p} cooks {v}.",
        "What does {p} eat? Only {v}.",
    ),
    "mentor": (
        "{p} learned from {v}.",
        "The mentor of {p} is {v}.",
        "{p} was taught by {v}.",
        "{p} thanks a teacher called {v}.",
        "Who taught {p}? It was {v}.",
    ),
}
#: how a two-hop sentence reads: the relation to follow first, what is then told
HOPS = {
    ("mentor", "city"): "The mentor of {p} lives in {v}.",
    ("mentor", "job"): "The mentor of {p} works as a {v}.",
    ("city", "land"): "{p} lives in the land of {v}.",
}
CODE_FORMS = ("{k} {v}", "{k} {v},", "The code {k} {v}.")
NOTE = CODE_FORMS[2]


def length(text: str) -> int:
    """Number of tokens of a generated text: words, single digits, and marks."""
    return len(re.findall(r"\d|[^\W\d]+|[^\w\s]", text))


@dataclass(frozen=True)
class World:
    """All the knowledge there is: ``facts[relation][person]`` and ``lands[town]``; people are full names."""

    people: tuple[str, ...]
    facts: dict[str, dict[str, str]]
    lands: dict[str, str]

    def phrasing(self, rng: Random, person: str, relation: str, held_out: bool) -> str:
        """A phrasing of one fact: the one withheld from training for this fact, or one of the others."""
        forms = PHRASINGS[relation]
        withheld = (self.people.index(person) + RELATIONS.index(relation)) % len(forms)
        return forms[withheld if held_out else rng.choice([i for i in range(len(forms)) if i != withheld])]

    def hop(self, person: str, path: tuple[str, str]) -> str:
        """Where two hops from a person lead."""
        middle = self.facts[path[0]][person]
        return self.lands[middle] if path[1] == "land" else self.facts[path[1]][middle]

    def hops_withheld(self, person: str) -> bool:
        """Whether training text never spells out the two-hop facts of this person."""
        return self.people.index(person) % 4 == 0


@cache
def world() -> World:
    """The world (there is one)."""
    rng = Random("world")
    people = tuple(f"{first} {last}" for first, last in product(FIRST, LAST))
    pools = {"city": TOWNS, "job": JOBS, "pet": PETS, "dish": DISHES, "mentor": people}
    facts = {relation: {p: rng.choice(pools[relation]) for p in people} for relation in RELATIONS}
    return World(people, facts, {town: LANDS[i % len(LANDS)] for i, town in enumerate(TOWNS)})


def fact(rng: Random, person: str, relation: str, held_out: bool) -> str:
    """One fact as a sentence."""
    w = world()
    return w.phrasing(rng, person, relation, held_out).format(p=person, v=w.facts[relation][person])


def fill(sentence: Callable[[], str], heading: str, budget: int) -> str:
    """Sentences one after the other under a heading, as many as fit the budget (at least one)."""
    parts = [heading]
    used = length(heading)
    while True:
        parts.append(sentence())
        used += length(parts[-1])
        if used >= budget - 8:
            return " ".join(parts)


def people_text(rng: Random, budget: int, held_out: bool) -> str:
    """All facts of a few people, one person after the other."""
    w = world()
    parts = ["People:"]
    used = 2
    while used < budget - 24:
        person = rng.choice(w.people)
        for relation in rng.sample(RELATIONS, len(RELATIONS)):
            parts.append(fact(rng, person, relation, held_out))
            used += length(parts[-1])
    return " ".join(parts)


def facts_text(rng: Random, budget: int, held_out: bool) -> str:
    """Single facts of many people."""
    w = world()
    return fill(lambda: fact(rng, rng.choice(w.people), rng.choice(RELATIONS), held_out), "Facts:", budget)


def hop_sentence(rng: Random, held_out: bool) -> str:
    """A two-hop fact, half of the time with the way to it; or the land of a town."""
    w = world()
    if rng.random() < 0.1:
        town = rng.choice(TOWNS)
        return f"{town} is a town of {w.lands[town]}."
    path = rng.choice(list(HOPS))
    person = rng.choice(w.people)
    while w.hops_withheld(person) != held_out:
        person = rng.choice(w.people)
    hop = HOPS[path].format(p=person, v=w.hop(person, path))
    middle = w.facts[path[0]][person]
    if rng.random() < 0.5:
        return hop
    first = fact(rng, person, path[0], held_out)
    if path[1] == "land":
        return f"{first} {middle} is a town of {w.lands[middle]}. So {hop}"
    return f"{first} {fact(rng, middle, path[1], held_out)} So {hop[0].lower()}{hop[1:]}"


def hops_text(rng: Random, budget: int, held_out: bool) -> str:
    """Two-hop facts."""
    return fill(lambda: hop_sentence(rng, held_out), "Links:", budget)


def sum_withheld(a: int, b: int) -> bool:
    """Whether training text never adds or subtracts this pair."""
    return (a * 31 + b * 17) % 10 == 0


def operands(rng: Random, held_out: bool) -> tuple[int, int, str]:
    """Two operands under fifty and a sign, such that the result is not negative."""
    while True:
        a, b, sign = rng.randrange(50), rng.randrange(50), rng.choice("+-")
        if sign == "-" and a < b:
            a, b = b, a
        if sum_withheld(a, b) == held_out:
            return a, b, sign


def sums_text(rng: Random, budget: int, held_out: bool) -> str:
    """Additions and subtractions of numbers under fifty."""

    def line() -> str:
        a, b, sign = operands(rng, held_out)
        return f"{a} {sign} {b} = {a + b if sign == '+' else a - b}."

    return fill(line, "Sums:", budget)


def copy_words(rng: Random, n: int) -> list[str]:
    """Random different words (and, at times, digits instead)."""
    if rng.random() < 0.25:
        return [str(rng.randrange(10)) for _ in range(n)]
    pool = KEYS + VALUES + OBJECTS
    return rng.sample(pool, n) if n <= len(pool) else rng.choices(pool, k=n)


def copies_text(rng: Random, budget: int, held_out: bool) -> str:
    """Random word sequences, each said again as a whole or in pieces."""
    parts = ["Copies:"]
    used = 2
    while used < budget - 12:
        times = rng.randint(1, 3)
        n = rng.randint(3, max(4, min(120, (budget - used) // (times + 1) - 3)))
        words = copy_words(rng, n)
        parts.append(f"Say: {' '.join(words)}.")
        whole = rng.random() < 0.5
        again = 0
        while again < n * times:
            # pieces from anywhere cannot be found by their distance, only by their words
            begin = 0 if whole else rng.randrange(max(1, n - 3))
            piece = words[begin:] if whole else words[begin : begin + rng.randint(3, 8)]
            parts.append(f"Again: {' '.join(piece)}.")
            again += len(piece) + 3
        used += n + 3 + again
    return " ".join(parts)


def codes_text(rng: Random, budget: int, held_out: bool) -> str:
    """Codes given to words, then looked up round after round in random order, in one form per document."""
    form = rng.choice(CODE_FORMS)
    widths = [n for n in (2, 3, 4, 6, 8, 12, 16, 24) if 3 * n * length(form.format(k="k", v="v")) <= budget]
    width = rng.choice(widths)
    codes = dict(zip(rng.sample(KEYS, width), rng.sample(VALUES, width), strict=True))
    order: list[str] = []

    def line() -> str:
        if not order:
            order.extend(rng.sample(sorted(codes), width))
        key = order.pop()
        return form.format(k=key, v=codes[key])

    return fill(line, "Codes:", budget)


def prose_sentence(rng: Random) -> str:
    """A sentence of daily life: a trade has its place, tool and product, an animal its food."""
    kind = rng.randrange(7)
    job, place, tool, made = rng.choice(TRADES)
    animal, food = rng.choice(ANIMALS)
    adjective, time, weather = rng.choice(ADJECTIVES), rng.choice(TIMES), rng.choice(WEATHER)
    if kind == 0:
        return f"In the {time} the {adjective} {job} went to the {place}."
    if kind == 1:
        return f"The {adjective} {job} came with a {tool} and made {made}."
    if kind == 2:
        return f"After the {weather} the {adjective} {animal} looked for {food}."
    if kind == 3:
        return f"At the {place} the {job} sold {made} and felt {adjective}."
    if kind == 4:
        return f"The {adjective} {animal} ate some {food} in the {rng.choice(ROOMS)}."
    if kind == 5:
        return f"There was {weather} in the {time}, so the {job} left the {tool} at the {place}."
    return f"The {rng.choice(OBJECTS)} of the {adjective} {job} fell in the {rng.choice(ROOMS)}."


def prose(rng: Random, budget: int) -> list[str]:
    """Sentences of prose, of about ``budget`` tokens in all."""
    sentences: list[str] = []
    used = 0
    while used < budget - 14:
        sentences.append(prose_sentence(rng))
        used += length(sentences[-1])
    return sentences


def prose_text(rng: Random, budget: int, held_out: bool) -> str:
    """Plain prose."""
    return fill(lambda: prose_sentence(rng), "Prose:", budget)


class Story:
    """People walk between rooms, take things, hand them over and leave them; questions test the state."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.people = rng.sample(FIRST, rng.randint(2, 4))
        self.things = rng.sample(OBJECTS, rng.randint(2, 3))
        self.rooms = rng.sample(ROOMS, rng.randint(3, 5))
        self.place: dict[str, str] = {}
        self.holder: dict[str, str] = {}

    def event(self) -> str:
        """One thing that happens."""
        rng = self.rng
        person = rng.choice(self.people)
        thing = rng.choice(self.things)
        holder = self.holder.get(thing)
        others = [p for p in self.people if p != holder]
        if person not in self.place or rng.random() < 0.4:
            self.place[person] = rng.choice([r for r in self.rooms if r != self.place.get(person)])
            return f"{person} went to the {self.place[person]}."
        if holder is None:
            self.holder[thing] = person
            return f"{person} took the {thing}."
        if rng.random() < 0.2:
            del self.holder[thing]
            return f"{holder} dropped the {thing}."
        self.holder[thing] = rng.choice(others)
        return f"{holder} gave the {thing} to {self.holder[thing]}."

    def questions(self) -> list[tuple[str, str, list[str]]]:
        """What can be asked now: the question up to its answer, the answer, the other answers of its kind."""
        asked = [
            (f"Where is {p}? In the", room, [r for r in self.rooms if r != room]) for p, room in self.place.items()
        ]
        return asked + [
            (f"Who has the {t}? It is", p, [q for q in self.people if q != p]) for t, p in self.holder.items()
        ]

    def line(self) -> str:
        """An event or a question with its answer."""
        questions = self.questions()
        if questions and self.rng.random() < 0.35:
            question, answer, _ = self.rng.choice(questions)
            return f"{question} {answer}."
        return self.event()


def story_text(rng: Random, budget: int, held_out: bool) -> str:
    """A story with questions."""
    return fill(Story(rng).line, "Story:", budget)


def needle_parts(rng: Random, budget: int, needles: int) -> tuple[str, dict[str, str]]:
    """Prose of about ``budget`` tokens with notes of codes at random places, and the codes."""
    codes = dict(zip(rng.sample(KEYS, needles), rng.sample(VALUES, needles), strict=True))
    notes = [NOTE.format(k=key, v=value) for key, value in codes.items()]
    sentences = prose(rng, budget - 2 - sum(map(length, notes)))
    for note in notes:
        sentences.insert(rng.randint(0, len(sentences)), note)
    return " ".join(["Notes:", *sentences]), codes


def notes_text(rng: Random, budget: int, held_out: bool) -> str:
    """Codes noted amid prose; each is looked up at the end, where the notes are out of near sight."""
    needles = rng.randint(2, max(3, min(8, budget // 32)))
    text, codes = needle_parts(rng, budget - needles * length(NOTE), needles)
    asked = rng.sample(sorted(codes), needles)
    return " ".join([text, *(NOTE.format(k=key, v=codes[key]) for key in asked)])


#: of eight shares of all pairs of a key and a value, those that the tasks note, and each part of the questions
NOTED = {"train": range(3), "validation": range(3, 4), "target": range(4, 5), "calibration": range(5, 6)}
NOTED |= {"heldout": range(6, 7), "tasks": range(7, 8)}


def share(key: str, value: str) -> int:
    """Which of eight shares a pair of a key and a value is in. Every key has at least five values in each."""
    return (31 * KEYS.index(key) + 17 * VALUES.index(value)) % 67 % 8


def draw_codes(rng: Random, n: int, part: str) -> dict[str, str]:
    """Different values of ``n`` different keys, at most five, all of them pairs of one part."""
    codes: dict[str, str] = {}
    for key in rng.sample(KEYS, n):
        free = [value for value in VALUES if value not in codes.values()]
        codes[key] = rng.choice([value for value in free if share(key, value) in NOTED[part]])
    return codes


class Question(NamedTuple):
    """The parts of a prompt and the answer; all joined by spaces are text of the world up to its last full stop."""

    instruction: str
    contexts: list[str]
    question: str
    answer: str


def ask_code(rng: Random, codes: dict[str, str], asked: str, budget: int) -> Question:
    """A question about one code, where every context is prose of about ``budget`` tokens with a note of one."""
    contexts = []
    for key, value in codes.items():
        note = NOTE.format(k=key, v=value)
        sentences = prose(rng, budget - length(note))
        sentences.insert(rng.randint(0, len(sentences)), note)
        contexts.append(" ".join(sentences))
    return Question("Notes:", contexts, NOTE.partition(" {v}")[0].format(k=asked), codes[asked])


def insert_early(sentences: list[str], note: str, depth: float) -> tuple[list[str], float]:
    """Sentences with a note as near to a depth as it can be and end before the middle; and the depth where it is.

    The depth is the share of all tokens that stand before the note.
    """
    starts = [0, *accumulate(map(length, sentences))]
    total = starts[-1] + length(note)
    places = [place for place, start in enumerate(starts) if 2 * (start + length(note)) <= total]
    place = min(places, key=lambda place: abs(starts[place] / total - depth))
    return [*sentences[:place], note, *sentences[place:]], starts[place] / total


#: of eight shares of all that an example of the new task can say, those that each part has
ASKED = {"train": range(4), "validation": range(4, 5), "target": range(5, 6), "calibration": range(6, 7)}
ASKED["heldout"] = range(7, 8)
FIELD = 31  # a prime, and no more than there are names, towns, jobs and dishes


def extraction(rng: Random, part: str) -> tuple[str, str]:
    """The new task: a passage, and as the answer what it says, in another order. Training text has nothing like it, but
    its words are those of training text, so that the model has learned an embedding for each.

    What is said are five values of a polynomial of degree two over a finite field, whose constant term says of what
    part it is. So two examples of unlike parts agree in two places at most, and in 15 of 23 words."""
    c, b, a = rng.choice([i for i in range(FIELD) if i % 8 in ASKED[part]]), rng.randrange(FIELD), rng.randrange(FIELD)
    said = (FIRST, LAST, TOWNS, JOBS, DISHES)
    first, last, town, job, dish = (words[(c + b * x + a * x * x) % FIELD] for x, words in enumerate(said, 1))
    clauses = [f"lives in {town}", f"works as a {job}", f"likes to eat {dish}"]
    rng.shuffle(clauses)
    passage = f"{first} {last} {clauses[0]}, {clauses[1]} and {clauses[2]}."
    return f"People: {passage} So:", f" {dish} {job} {town} {first} {last}."


KINDS: dict[str, Callable[[Random, int, bool], str]] = {
    "people": people_text,
    "facts": facts_text,
    "links": hops_text,
    "story": story_text,
    "sums": sums_text,
    "copies": copies_text,
    "codes": codes_text,
    "notes": notes_text,
    "prose": prose_text,
}
#: shares of the kinds in training text from this window on: at first mostly facts and looking up at short range,
#: which a model learns late or never if it is rare; then everything, over growing distances
SHARES = {
    64: (8, 4, 0, 0, 0, 18, 70, 0, 0),
    128: (32, 14, 6, 7, 6, 12, 16, 2, 5),
    256: (32, 14, 6, 7, 6, 7, 8, 15, 5),
}
SIZES = (62, 94, 126, 254, 510, 1022)


def write(rng: Random, window: int, held_out: bool = False) -> tuple[str, str]:
    """One document of a random kind that fits a window of so many tokens: the kind, and the text."""
    shares = SHARES[min(window, max(SHARES))]
    kind = rng.choices(list(KINDS), shares)[0]
    # short documents stay in long windows
    budget = rng.choice([size for size in SIZES if size < window])
    return kind, KINDS[kind](rng, budget, held_out)


def stream(window: int, seed: str) -> Iterator[str]:
    """Training documents without end; document ``i`` depends on nothing but its number and the seed."""
    for i in count():
        yield write(Random(f"train:{seed}:{window}:{i}"), window)[1]
