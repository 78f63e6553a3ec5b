"""Prompt: every prompt passes through the methods of the chain, in their order."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from effbench.core.errors import Unsupported
from effbench.core.kinds import Shorten
from effbench.nn.infer.answers import answer_kl
from effbench.nn.infer.engine import open_engine

if TYPE_CHECKING:
    from effbench.core.kinds import Prompt
    from effbench.core.run import Run
    from effbench.core.views import Segments

STEP = 0.1  # by which a refined method keeps more


def apply(run: Run, method: Prompt) -> None:
    """Have `run.rewrite` call the method. Raises `Unsupported` behind a step that makes memory of prompts."""
    memory = run.infer.owner("memory")
    if memory is not None:
        raise Unsupported(f"{memory} makes memory of prompts, which leaves no text to shorten: put {method} before it")
    run.infer.chain("prompt").append(method)


def rewrite(run: Run, method: Prompt, segments: Segments) -> Segments:
    """A prompt after one method, which keeps more of it until the answer diverges by no more than its `bound`.

    Raises `Unsupported` for a method that reads the question of a prompt that has none.
    """
    if method.asks and not segments.question:
        raise Unsupported(
            f"{method} reads the question, and the prompt could not be divided: see `segments` of the task"
        )
    short = method.rewrite(segments, run)
    if not isinstance(method, Shorten) or method.bound is None:
        return short
    plain, end = open_engine(run, run.reference), run.tokenizer.eos_token_id
    stops = set() if end is None else {int(end)}
    whole = run.data.encode_prompt(segments.text())
    while answer_kl(plain, plain, [whole], [run.data.encode_prompt(short.text())], stops)[0] > method.bound:
        if method.keep >= 1:
            return segments
        method = dataclasses.replace(method, keep=min(1.0, round(method.keep + STEP, 6)))
        short = method.rewrite(segments, run)
    return short
