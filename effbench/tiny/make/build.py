"""Write the items of the lm-eval tasks: ``python -m effbench.tiny.make.build`` regenerates ``data/`` exactly.

An item has ``instruction``, ``context`` (or a list ``contexts``) and ``question``, which joined by spaces are the
prompt. A multiple-choice item has four ``choices`` in an order that puts ``gold`` at each place equally often, others
an ``answer``. ``depth`` is the share of the tokens of the context that stand before what is asked for.
"""

import json
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

from effbench.tiny import CONTEXT, CONTEXTS, MODEL, documents, world

DATA = MODEL.parent / "data"
Item = dict[str, Any]


def item(i: int, kind: str, prompt: tuple[str, str | list[str], str], answer: str, others: list[str]) -> Item:
    """The ``i``-th item of a task, with the answer at place ``i % 4`` among the three others."""
    choices = [*others]
    choices.insert(i % 4, answer)
    instruction, context, question = prompt
    return {
        "kind": kind,
        "instruction": instruction,
        "contexts" if isinstance(context, list) else "context": context,
        "question": question,
        "choices": choices,
        "gold": i % 4,
    }


def join(row: Item) -> str:
    """The prompt of an item: its parts, and the contexts where there are several, joined by spaces."""
    contexts = row["contexts"] if "contexts" in row else [row["context"]]
    return " ".join(filter(None, [row["instruction"], *contexts, row["question"]]))


def others(rng: Random, answer: str, pool: list[str]) -> list[str]:
    """Three different wrong answers."""
    return rng.sample(sorted(set(pool) - {answer}), 3)


def before(sentence: str, answer: str) -> str:
    """A sentence up to its answer, which is its end."""
    return sentence.removesuffix(f" {answer}.")


def fact_item(rng: Random, i: int) -> Item:
    """A fact in the phrasing that training text never uses for it; others are values of the same relation."""
    w = world.world()
    person, relation = rng.choice(w.people), world.RELATIONS[i % len(world.RELATIONS)]
    answer = w.facts[relation][person]
    question = before(world.fact(rng, person, relation, held_out=True), answer)
    pool = list(w.facts[relation].values())
    return item(i, relation, ("Facts:", "", question), answer, others(rng, answer, pool))


def multihop_item(rng: Random, i: int) -> Item:
    """A two-hop fact of a person whose two-hop facts training text never tells."""
    w = world.world()
    path = list(world.HOPS)[i % len(world.HOPS)]
    person = rng.choice([p for p in w.people if w.hops_withheld(p)])
    answer = w.hop(person, path)
    question = before(world.HOPS[path].format(p=person, v=answer), answer)
    pool = world.LANDS if path[1] == "land" else list(w.facts[path[1]].values())
    return item(i, " of ".join(reversed(path)), ("Links:", "", question), answer, others(rng, answer, pool))


def arithmetic_item(rng: Random, i: int) -> Item:
    """A sum or difference that training text never shows; the others are near."""
    a, b, sign = world.operands(rng, held_out=True)
    answer = a + b if sign == "+" else a - b
    near = [answer + d for d in (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11) if answer + d >= 0]
    wrong = [str(n) for n in rng.sample(near, 3)]
    kind = "addition" if sign == "+" else "subtraction"
    return item(i, kind, ("Sums:", "", f"{a} {sign} {b} ="), str(answer), wrong)


def copy_item(rng: Random, i: int) -> Item:
    """A sequence of random words, said again up to some word; the others are words of the sequence."""
    words = rng.sample(world.KEYS + world.VALUES + world.OBJECTS, rng.randint(8, 40))
    place = rng.randint(2, len(words) - 1)
    question = " ".join(["Again:", *words[:place]])
    context = f"Say: {' '.join(words)}."
    return item(i, "words", ("Copies:", context, question), words[place], others(rng, words[place], words))


def cloze_item(rng: Random, i: int) -> Item:
    """The last word of a passage of daily life, or of a question about the state of a story."""
    if i // 4 % 2:
        return story_item(rng, i)
    pools = [[row[column] for row in world.TRADES] for column in range(1, 4)]
    pools.append([food for _, food in world.ANIMALS])
    context = " ".join(world.prose_sentence(rng) for _ in range(2))
    while True:
        sentence = world.prose_sentence(rng)
        answer = sentence.split()[-1].removesuffix(".")
        for pool in pools:
            if answer in pool:
                prompt = ("Prose:", context, before(sentence, answer))
                return item(i, "prose", prompt, answer, others(rng, answer, pool))


def story_item(rng: Random, i: int) -> Item:
    """Where someone is, or who has something, after a story; wrong answers come from the story if it can."""
    story = world.Story(rng)
    context = " ".join(story.line() for _ in range(rng.randint(5, 12)))
    while not story.questions():
        context += f" {story.event()}"
    question, answer, inside = rng.choice(story.questions())
    pool = world.ROOMS if answer in world.ROOMS else world.FIRST
    inside = inside[:3]
    outside = rng.sample([word for word in pool if word not in (*inside, answer)], 3 - len(inside))
    return item(i, "story", ("Story:", context, question), answer, inside + outside)


def needle_item(rng: Random, i: int, tokens: int) -> Item:
    """One of four codes noted in prose: the asked one in the first half, the others one in each third."""
    (key, answer), *rest = world.draw_codes(rng, 4, "tasks").items()
    sentences = world.prose(rng, tokens - 34)
    for third, (other, value) in enumerate(rest):
        place = rng.randint(third * len(sentences) // 3, (third + 1) * len(sentences) // 3)
        sentences.insert(place, world.NOTE.format(k=other, v=value))
    note = world.NOTE.format(k=key, v=answer)
    sentences, depth = world.insert_early(sentences, note, draw_depth(rng, i))
    prompt = ("Notes:", " ".join(sentences), before(note, answer))
    return item(i, "code", prompt, answer, sorted(value for _, value in rest)) | {"depth": round(depth, 2)}


def draw_depth(rng: Random, i: int) -> float:
    """A depth in the first half: of ten bands the next for every four items, so that each answer's place has all."""
    return (i // 4 % 10 + rng.random()) / 20


def stream_item(rng: Random, i: int) -> Item:
    """A needle in 200 tokens, which stand after so much prose that the prompt is longer than the model's positions."""
    needle = needle_item(rng, i, 200)
    prose = " ".join(world.prose(rng, 2860))
    early, late = world.length(prose), world.length(needle["context"])
    depth = (early + needle["depth"] * late) / (early + late)
    return needle | {"context": f"{prose} {needle['context']}", "depth": round(depth, 2)}


def recall_item(rng: Random, i: int) -> Item:
    """Three words that follow three others in a sequence said in the first half of prose."""
    words = rng.sample(world.KEYS + world.VALUES + world.OBJECTS, 12)
    note = f"Say: {' '.join(words)}."
    sentences, depth = world.insert_early(world.prose(rng, 220), note, draw_depth(rng, i))
    begin = rng.randint(0, len(words) - 6)
    return {
        "kind": "words",
        "instruction": "Notes:",
        "context": " ".join(sentences),
        "question": " ".join(["Again:", *words[begin : begin + 3]]),
        "answer": " ".join(words[begin + 3 : begin + 6]),
        "depth": round(depth, 2),
    }


def contexts_item(rng: Random, i: int) -> Item:
    """A code noted in one of five contexts; the others are codes of other contexts."""
    codes = world.draw_codes(rng, CONTEXTS, "tasks")
    asked = list(codes)[i // 4 % CONTEXTS]
    instruction, contexts, question, answer = world.ask_code(rng, codes, asked, CONTEXT)
    return item(i, "code", (instruction, contexts, question), answer, others(rng, answer, list(codes.values())))


def distinct(name: str, make: Callable[[Random, int], Item], n: int) -> list[Item]:
    """``n`` items of which no two have the same prompt."""
    items: dict[str, Item] = {}
    for draw in count():
        if len(items) == n:
            break
        new = make(Random(f"task:{name}:{draw}"), len(items))
        items.setdefault(join(new), new)
    return list(items.values())


def build() -> dict[str, list[Item]]:
    """The items of every task, by file name."""
    makers: dict[str, tuple[Callable[[Random, int], Item], int]] = {
        "cloze": (cloze_item, 240),
        "facts": (fact_item, 400),
        "multihop": (multihop_item, 240),
        "arithmetic": (arithmetic_item, 200),
        "copy": (copy_item, 200),
        "needle_256": (lambda rng, i: needle_item(rng, i, 256), 200),
        "needle_1024": (lambda rng, i: needle_item(rng, i, 1024), 200),
        "recall_256": (recall_item, 200),
        "contexts": (contexts_item, 200),
        "stream_3072": (stream_item, 12),
    }
    items = {name: distinct(name, make, n) for name, (make, n) in makers.items()}
    ppl = [{"text": text} for text in documents("heldout", 120, seed=-1)]
    return {"ppl": ppl, **items}


def lines(items: list[Item]) -> str:
    """Items as the text of a file."""
    return "".join(json.dumps(item) + "\n" for item in items)


def main() -> None:
    DATA.mkdir(exist_ok=True)
    for name, items in build().items():
        (DATA / f"{name}.jsonl").write_text(lines(items), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
