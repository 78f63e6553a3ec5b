"""The embedded default: a small language model of a generated world, its text and its lm-eval tasks.

Nothing here imports torch. ``MODEL`` is a folder for ``LlamaForCausalLM.from_pretrained``, ``TASKS`` one for
``lm_eval.tasks.TaskManager(include_path=...)`` with the tag ``tiny``.
"""

from pathlib import Path
from random import Random
from typing import Literal, get_args

from effbench.tiny import world

MODEL = Path(__file__).parent / "model"
TASKS = Path(__file__).parent / "tasks"

Split = Literal["train", "validation", "target", "calibration", "heldout", "long"]
WINDOW = 256  # tokens that a document fits in
CONTEXTS, CONTEXT = 5, 50  # contexts that a question has, and tokens in each, about


def documents(split: Split, n: int, seed: int = 0) -> list[str]:
    """``n`` documents of a split, the same for the same seed, and a prefix of every longer list.

    All are further text of the kind the model was trained on, but ``heldout`` words each fact in the one way training
    never uses for it, and adds numbers training never adds; ``long`` documents have about 1,000 tokens, codes noted in
    the middle and asked for at the end. All others have up to 254 tokens.
    """
    if split not in get_args(Split):
        raise ValueError(f"there is no split {split!r}: {', '.join(get_args(Split))}")
    if split == "long":
        return [world.notes_text(rng, 1022, held_out=True) for rng in draw(f"{split}:{seed}", n)]
    return [text for _, text in write(split, n, seed)]


def write(part: str, n: int, seed: int = 0) -> list[tuple[str, str]]:
    """``n`` documents of a part: of what kind each is, and its text."""
    what = f"train:user {seed}:{WINDOW}" if part == "train" else f"{part}:{seed}"
    return [world.write(rng, WINDOW, held_out=part == "heldout") for rng in draw(what, n)]


def ask(part: str, n: int, seed: int = 0) -> list[tuple[str, str]]:
    """``n`` examples of the new task: prompt and answer. No part says what another does."""
    return [world.extraction(rng, part) for rng in draw(f"task {part}:{seed}", n)]


def ask_about(part: str, n: int, seed: int = 0) -> list[world.Question]:
    """``n`` questions of the form of ``tiny_contexts``: the same for the same seed, and a prefix of every longer list.

    The context that matters is at each of the five places in turn. No part notes a code that another part or a task
    notes; the parts are those of ``world.NOTED``.
    """
    asked: list[world.Question] = []
    for i, rng in enumerate(draw(f"question {part}:{seed}", n)):
        codes = world.draw_codes(rng, CONTEXTS, part)
        asked.append(world.ask_code(rng, codes, list(codes)[i % CONTEXTS], CONTEXT))
    return asked


def draw(what: str, n: int) -> list[Random]:
    """Chance for each of ``n`` documents."""
    return [Random(f"{what}:{i}") for i in range(n)]
