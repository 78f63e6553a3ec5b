"""The embedded default: a small language model of a generated world, its text and its lm-eval tasks.

Nothing here imports torch. ``MODEL`` is a folder for ``LlamaForCausalLM.from_pretrained``, ``TASKS`` one for
``lm_eval.tasks.TaskManager(include_path=...)`` with the tag ``tiny``.
"""

from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

from effbench.tiny import world

MODEL = Path(__file__).parent / "model"
TASKS = Path(__file__).parent / "tasks"

Split = Literal["train", "calibration", "heldout", "finetune_train", "finetune_heldout", "long"]


def documents(split: Split, n: int, seed: int = 0) -> list[str]:
    """``n`` documents of a split, the same for the same seed, and a prefix of every longer list.

    ``train`` and ``calibration`` are further text of the kind the model was trained on; ``heldout`` words
    each fact in the one way training never uses for it, and adds numbers training never adds;
    ``finetune_*`` is a task in a format training never shows, over disjoint people; ``long`` documents have
    about 1,000 tokens, codes noted in the middle and asked for at the end. All others have up to 254 tokens.
    """
    if split == "train":
        return list(islice(world.stream(256, f"user {seed}"), n))
    draws = [Random(f"{split}:{seed}:{i}") for i in range(n)]
    match split:
        case "calibration":
            return [world.write(rng, 256) for rng in draws]
        case "heldout":
            return [world.write(rng, 256, held_out=True) for rng in draws]
        case "finetune_train" | "finetune_heldout":
            return [world.extraction(rng, held_out=split == "finetune_heldout") for rng in draws]
        case "long":
            return [world.notes_text(rng, 1022, held_out=True) for rng in draws]
    raise ValueError(f"no split {split!r}")
