"""What a step of training costs beside a loop written by hand, and what layouts of batches save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effbench import sources
from effbench.core.recipe import parse_step
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun
from effbench.nn.train.fit import fit
from effbench.nn.train.samplers import Shuffled
from effbench.nn.train.settings import FitSettings

pytestmark = pytest.mark.slow

STEPS = 20
SETTINGS = FitSettings(steps=STEPS, lr=1e-4, batch_size=8, schedule="constant", warmup=0.0)


def opened() -> ModelRun:
    """The embedded model with the default pool."""
    run = open_run(sources.model("tiny", None), sources.data("tiny"), "cpu", "float32", 0)
    run.data.extend(STEPS * 8 * 512)
    return run


def batches(run: ModelRun) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What a model is given in each step, and labels, padded on the right."""
    examples = run.data.train
    sampler = Shuffled(len(examples), 0)
    for step in range(STEPS):
        rows = [torch.tensor(examples[place].ids) for place in sampler.draw(step, 8)]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        yield {"input_ids": ids, "attention_mask": (labels >= 0).long(), "use_cache": False}, labels


def by_hand(run: ModelRun) -> None:
    """The same steps as a person would write them."""
    model = run.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for inputs, labels in batches(run):
        logits = model(**inputs).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def seconds(work: Callable[[ModelRun], Any], open_one: Callable[[], ModelRun] = opened) -> float:
    run = open_one()
    begin = time.process_time()
    work(run)
    return time.process_time() - begin


def test_a_step_costs_what_a_loop_by_hand_costs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    ratios = []
    for _ in range(3):  # in turns, so that both see the same machine
        plain = seconds(by_hand)
        ratios.append(seconds(lambda run: fit(run, SETTINGS)) / plain)
    with capsys.disabled():
        print(f"\n{STEPS} steps of fit: {sorted(ratios)[1]:.3f} of a loop by hand (target at most 1.05)")


def test_layouts_of_batches(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    torch.set_num_threads(1)
    plain = seconds(lambda run: fit(run, SETTINGS))
    for layout in ("by_length", "packed"):
        settings = dataclasses.replace(SETTINGS, layout=layout)  # type: ignore[arg-type]
        gain = plain / seconds(lambda run, settings=settings: fit(run, settings))  # type: ignore[misc]
        with capsys.disabled():
            print(f"\nbatches {layout}: {gain:.2f} times as fast as padded ones")


def distil_by_hand(run: ModelRun) -> None:
    """The same steps of distillation as a person would write them; the teacher is the unchanged model."""
    model, teacher = run.model.train(), run.reference
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    for inputs, labels in batches(run):
        logits = model(**inputs).logits[:, :-1]
        with torch.no_grad():
            targets = (teacher(**inputs).logits[:, :-1] / 2).softmax(-1)
        hard = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        soft = nn.functional.kl_div((logits / 2).log_softmax(-1), targets, reduction="none").sum(-1)
        learned = labels[:, 1:] >= 0
        (0.5 * hard + 0.5 * 4 * soft[learned].mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def student() -> ModelRun:
    run = opened()
    run.apply(parse_step("student()"))
    run.reference  # noqa: B018  opened here, not in what is timed
    return run


def test_a_step_of_distillation_costs_what_a_loop_by_hand_costs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)

    def distil(run: ModelRun) -> None:
        run.apply(parse_step("kd()"))
        fit(run, SETTINGS)

    ratios = []
    for _ in range(3):
        plain = seconds(distil_by_hand, student)
        ratios.append(seconds(distil, student) / plain)
    with capsys.disabled():
        print(f"\n{STEPS} steps of kd: {sorted(ratios)[1]:.3f} of a loop by hand (target at most 1.05)")
