"""Memory in front of a prompt: what is read behind keys and values is what a mask makes of the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys_cache import ARCHITECTURES, logprobs, run_of, text

from effbench.checks import PROMPT, toy_run
from effbench.core.errors import Unsupported
from effbench.core.views import Segments
from effbench.nn.infer.engine import open_engine
from effbench.nn.infer.memory import KeyValues, count_kept, count_places, find_lead, remember
from effbench.nn.run import ModelRun

AHEAD = ((20, 3), (9, 5), (0, 0))  # tokens that are read before a prompt, and how many of the last of them are kept
ASKED = ([5, 6, 7, 8, 9], [40, 41], [7, 3, 60])
ANSWER = [11, 80, 2, 33]
STEPS = ["h2o(budget=200)", "snapkv(budget=200)", "sliding_window(window=6)", "kv_quant(key_bits=8, value_bits=8)"]
CASES = [*(("", name, None) for name in ARCHITECTURES), *((steps, "gpt_neox", None) for steps in STEPS)]
CASES += [(steps, "qwen2", block) for steps in ("", *STEPS) for block in (1, 3)]


@torch.no_grad()
def keep(run: ModelRun, ids: list[int], kept: int) -> list[KeyValues]:
    """Keys and values of the last tokens, by transformers' own forward pass."""
    if not kept:
        return []
    layers: Any = run.model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    both = [[getattr(layer, part)[0, :, -kept:] for layer in layers] for part in ("keys", "values")]
    return [KeyValues(both[0], both[1], len(ids) - kept)]


@torch.no_grad()
def predict(run: ModelRun, ids: list[int], ahead: int, kept: int, window: int) -> Tensor:
    """[T, V] logits of a whole text, of which what stands behind the first `ahead` tokens sees the last kept ones."""
    place = torch.arange(len(ids))
    seen = place[:, None] >= place
    seen &= (place[:, None] < ahead) | (place >= ahead - kept)
    seen &= (place[:, None] < ahead) | (place[:, None] - place < window)
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
    return run.model(torch.tensor([ids]), attention_mask=mask, position_ids=place[None]).logits[0]


def lay(run: ModelRun) -> tuple[list[Any], list[tuple[list[int], int, int]]]:
    """Prompts as an engine is given them, and their whole texts."""
    texts = [(text(ahead, seed=3), kept, asked) for (ahead, kept), asked in zip(AHEAD, ASKED, strict=True)]
    prompts = [[*keep(run, first, kept), *asked] for first, kept, asked in texts]
    return prompts, [([*first, *asked], len(first), kept) for first, kept, asked in texts]


@pytest.mark.parametrize(("steps", "architecture", "block"), CASES)
def test_a_text_behind_keys_and_values_is_the_whole_one_masked(steps, architecture, block):
    """Rows of unlike memories, and one without, together and alone."""
    run = run_of(steps, architecture)
    window = 6 if "window" in steps else 10**6
    prompts, wholes = lay(run)
    expected = []
    for whole, ahead, kept in wholes:
        logits = predict(run, [*whole, *ANSWER], ahead, kept, window).log_softmax(-1)
        expected += [float(logits[len(whole) - 1 + i, token]) for i, token in enumerate(ANSWER)]
    pairs, error = [(prompt, ANSWER) for prompt in prompts], 2e-3 if "quant" in steps else 2e-5
    assert logprobs(run, pairs, block=block) == pytest.approx(expected, abs=error)
    assert logprobs(run, pairs[:1], block=block) == pytest.approx(expected[: len(ANSWER)], abs=error)


@pytest.mark.parametrize("steps", ["", "h2o(budget=200)", "sliding_window(window=6)"])
def test_texts_go_on_behind_keys_and_values(steps):
    run = run_of(steps, "qwen2")
    prompts, wholes = lay(run)
    made = open_engine(run).generate(prompts, 6, set())
    for (whole, ahead, kept), ids in zip(wholes, made, strict=True):
        for token in ids:
            logits = predict(run, whole, ahead, kept, 6 if "window" in steps else 10**6)
            assert token == int(logits[-1].argmax())
            whole = [*whole, token]
    assert open_engine(run).search(prompts, 1, 6, set()) == made


def test_what_is_kept_and_what_is_gone_is_counted():
    run = toy_run()
    tokens = [*keep(run, text(20), 3), torch.zeros(4), 5, 6]
    assert (count_kept(tokens), count_places(tokens)) == (6, 23)
    with pytest.raises(Unsupported, match="positions"):
        open_engine(run).score([([*keep(run, text(250), 3), 5, 6], text(6))])
    with pytest.raises(Unsupported, match="positions"):
        open_engine(run).generate([[*keep(run, text(250), 3), 5, 6]], 6, set())
    run = run_of("h2o(budget=200)")
    engine = open_engine(run)
    engine.generate([[*keep(run, text(20), 3), 5, 6]], 2, set())
    assert engine.uses[0].changed
    assert engine.uses[0].seen == 22
    assert engine.uses[0].kept == pytest.approx(5 / 22)


@pytest.mark.parametrize(
    "steps", ["streaming_llm(sinks=2,window=30)", "prompt_tuning(length=2)", "llm_qat(data='train')"]
)
def test_keys_of_another_form_have_no_place_behind(steps):
    run = toy_run()
    prompts, _ = lay(run)
    for step in run_of(steps).steps:
        run.apply(step)
    with pytest.raises(Unsupported, match="memory stand behind no soft prompt, and cannot be rotated anew"):
        open_engine(run).score([(prompts[0], ANSWER)])


def test_what_leads_to_a_question_ends_before_its_first_token():
    encode = toy_run().data.encode_prompt
    ids = encode(PROMPT.text())
    assert ids[find_lead(encode, PROMPT, ids) :] == encode(PROMPT.question)[-4:]
    alone = Segments(contexts=("One two three",), whole=True)
    assert find_lead(encode, alone, encode(alone.text())) == len(encode(alone.text())) - 1


def test_memory_that_is_no_shorter_than_what_it_stands_for_is_not_made():
    class Longer:
        def __init__(self, length: int) -> None:
            self.length = length

        def remember(self, ids: list[int], run: Any) -> list[Tensor]:
            return [torch.zeros(4)] * self.length

    run = toy_run()
    assert remember(run, [1, 2, 3, 4], 3) == [1, 2, 3, 4]
    for length, made in ((2, True), (3, False)):
        run.infer.close()
        method: Any = Longer(length)
        run.infer.claim("memory", method, method)
        tokens = remember(run, [1, 2, 3, 4], 3)
        assert isinstance(tokens[0], Tensor) is made
        assert tokens[-1] == 4
        assert (id(method) in run.infer.acted) is made
