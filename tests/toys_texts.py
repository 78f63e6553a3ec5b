"""Students, teachers and texts that tests of distillation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from effbench.checks import toy, toy_run
from effbench.core.method import Method
from effbench.core.run import Step
from effbench.core.views import Example
from effbench.nn.infer.sampling import Sampling
from effbench.nn.model.feed import feed
from effbench.nn.run import ModelRun
from effbench.nn.train.outputs import Roles
from effbench.nn.train.samples import Asked

SPREAD = {"initializer_range": 0.2}  # distributions that are neither flat nor sure
PROMPTS = (3, 9, 2)


def golden(name: str) -> dict[str, Tensor]:
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def taught(architecture: str = "llama", teacher: int = 1, **shape: Any) -> ModelRun:
    """A run whose model has a teacher of the same shape and other weights, at its first step."""
    run = toy_run(architecture, shape=SPREAD | shape)
    run.shelve("teacher", toy(architecture, seed=teacher, **(SPREAD | shape)), run.tokenizer)
    at(run, 0)
    return run


def at(run: ModelRun, step: int) -> ModelRun:
    run.step = Step(step, 1000)
    return run


def answered(run: ModelRun, sizes: tuple[int, ...] = (9, 20, 5)) -> list[Example]:
    """Examples of uneven length, each with a prompt."""
    pairs = zip(run.data.pool, sizes, PROMPTS, strict=False)
    return [Example(example.id, example.ids[:size], prompt) for example, size, prompt in pairs]


def written(batch: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """Prompt and learned tokens of each example of a batch."""
    found = []
    for place in range(int(batch["example"].max()) + 1):
        here = batch["example"] == place
        ids, learned = batch["input_ids"][here], batch["labels"][here] != -100
        found.append((ids[~learned].tolist(), ids[learned].tolist()))
    return found


def draw_by_hand(run: ModelRun, models: dict[Any, float], asked: Asked, most: int, temperature: float) -> list[int]:
    """A text drawn from a mixture of models, each token read anew from all before it."""
    text: list[int] = []
    (chance,) = Sampling(seed=run.seed).chances([asked.name])
    while len(text) < most:
        mixed = torch.zeros(96)
        for model, share in models.items():
            with torch.no_grad():
                logits = feed(model.eval(), {"input_ids": torch.tensor([[*asked.prompt, *text]])}).logits[0, -1, :96]
            mixed += share * (logits / temperature).softmax(-1)
        text.append(int(torch.multinomial(mixed, 1, generator=chance)))
        if text[-1] == run.tokenizer.eos_token_id:
            break
    return text


def find_terms(run: ModelRun, method: Method, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    roles = Roles(run, [method])
    with run.reading(roles), roles.open():
        return method.loss(batch, roles.feed(batch), run)
