"""Gist tokens: the authors' mask, and outputs that depend on a prompt through its gists alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys_cache import ARCHITECTURES, text
from toys_texts import at, golden
from toys_training import fit

from effbench.checks import VOCABULARY, toy_run
from effbench.core.errors import Unsupported
from effbench.core.views import Example, Segments
from effbench.methods.prompt.gist import Gist, see_gists
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.memory import find_memory
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import IGNORED, collate, pack

GOLDEN = golden("memory")
TASK, INPUT = 9, 4  # tokens


def opened(architecture: str = "llama", tokens: int = 3, **shape: Any) -> ModelRun:
    """A run whose gist token is no mean of others, in its first step."""
    run = toy_run(architecture, shape=shape)
    run.apply(Gist(tokens=tokens))
    find_memory(run.model).rows.data.normal_(generator=torch.Generator().manual_seed(2))
    return at(run, 0)


def test_the_mask_is_the_authors():
    """Theirs is not causal; their Llama adds that."""
    ids = GOLDEN["gist.ids"]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    found = see_gists(ids == 32, torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(found, GOLDEN["gist.mask"].bool() & causal)


def test_padding_sees_itself_alone_and_is_not_seen():
    gists, real = torch.tensor([[0, 1, 0, 0, 0]]).bool(), torch.tensor([[1, 1, 1, 0, 0]]).bool()
    found = see_gists(gists, real)[0, 0].int().tolist()
    assert found == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_answers_are_learned_behind_gists_and_input(layout):
    """Of an example with a prompt that cannot be divided, all of it but its last token is the task."""
    run = opened()
    run.data.train = examples = [Example("a", tuple(range(1, 15)), 10), Example("b", tuple(range(20, 26)))]
    given = collate(examples, 0, run.device) if layout == "padded" else pack(examples, 32, 0, run.device)
    batch = Gist(tokens=3).batch(given, run)
    first, second = (row[real].tolist() for row, real in zip(batch["input_ids"], batch["example"] >= 0, strict=True))
    assert first == [*range(1, 10), *[VOCABULARY] * 3, *range(10, 15)]
    labels = batch["labels"][0]
    assert labels[labels != IGNORED].tolist() == [11, 12, 13, 14]
    lead = second.index(VOCABULARY)
    assert second == [*range(20, 20 + lead), *[VOCABULARY] * 3, *range(20 + lead, 26)]
    labels = batch["labels"][1]
    assert labels[labels != IGNORED].tolist() == [*range(20 + lead, 26)]


def test_prompts_are_divided_before_their_question():
    run = opened()
    prompt = "Read. One two three. What comes next?"
    ids = run.data.encode_prompt(prompt)
    segments = Segments(contexts=("Read. One two three. ",), question="What comes next?")
    run.data.train = [Example("a", (*ids, 7, 0), len(ids), segments=segments)]
    batch = Gist(tokens=2).batch(collate(run.data.train, 0, run.device), run)
    lead = len(run.data.encode_prompt("Read. One two three."))
    assert batch["input_ids"][0].tolist() == [*ids[:lead], *[VOCABULARY] * 2, *ids[lead:], 7, 0]


def test_the_beginning_of_a_text_is_drawn_anew_in_each_step_whatever_its_company():
    run = opened()
    run.data.train = examples = [Example(str(i), tuple(text(20, seed=i))) for i in range(4)]

    def leads(some: list[Example]) -> list[int]:
        ids = Gist(tokens=3).batch(collate(some, 0, run.device), run)["input_ids"]
        return (ids == VOCABULARY).int().argmax(1).tolist()

    first = leads(examples)
    assert first == [lead for example in examples for lead in leads([example])]
    assert len(set(first)) > 1
    at(run, 1)
    assert leads(examples) != first


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_trained_is_what_is_read(architecture):
    """Logits behind the gists of a training row are those of the cache that holds nothing but the gists."""
    run = opened(architecture)
    ids = text(TASK + INPUT + 5, seed=1)
    run.data.train = [Example("a", tuple(ids), TASK + 1)]  # all but the last token of a prompt is its task
    gist = Gist(tokens=3)
    with torch.no_grad():
        whole = gist.forward(gist.batch(collate(run.data.train, 0, run.device), run), run).logits[0]
    memory = gist.remember(ids[:TASK], run)
    assert memory is not None
    read = open_engine(run).predict([([*memory, *ids[TASK : TASK + INPUT]], ids[TASK + INPUT :])])[0]
    start = TASK + 3 + INPUT - 1
    assert torch.allclose(read, whole[start : start + len(read)], atol=2e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_outputs_are_independent_of_the_prompt_given_the_gists(architecture):
    """With the gists held as they are, nothing behind them changes with the prompt, to the last bit of a gradient."""
    run = opened(architecture)
    gist = Gist(tokens=3)
    run.data.train = [Example("a", tuple(text(TASK + INPUT + 5, seed=1)), TASK + 1)]
    batch = gist.batch(collate(run.data.train, 0, run.device), run)
    embeds: list[torch.Tensor] = []

    def tap(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embeds.append(output.requires_grad_())
        return embeds[-1]

    def hold(module: Any, inputs: Any, output: Any) -> Any:
        states = output if isinstance(output, torch.Tensor) else output[0]
        held = states.clone()
        held[:, TASK : TASK + 3] = states[:, TASK : TASK + 3].detach()
        return held if isinstance(output, torch.Tensor) else (held, *output[1:])

    def sensitivity() -> float:
        embeds.clear()
        run.model.zero_grad()
        gist.forward(batch, run).logits[:, TASK + 3 :].square().sum().backward()
        return float(embeds[0].grad[:, :TASK].abs().max())  # type: ignore[index]

    handle = run.model.get_input_embeddings().register_forward_hook(tap)
    run.model.requires_grad_(False)
    assert sensitivity() > 1e-6
    hooks = [block.register_forward_hook(hold) for block in Blocks(run.model).blocks]
    assert sensitivity() == 0
    for each in (handle, *hooks):
        each.remove()


def test_a_prompt_that_leaves_no_positions_for_gists_is_unsupported():
    run = opened()
    with pytest.raises(Unsupported, match="a prompt with its gists takes 258 positions"):
        Gist(tokens=3).remember(text(255), run)
    with pytest.raises(Unsupported, match="a row with gists takes 258 positions"):
        Gist(tokens=3).batch(collate([Example("a", tuple(text(255)))], 0, run.device), run)


def test_windows_that_slide_over_less_than_a_row_are_unsupported():
    run = toy_run("mistral", shape={"sliding_window": 16})
    run.apply(Gist())
    with pytest.raises(Unsupported, match="slides over 16 tokens"):
        fit(run, steps=1)


def test_gists_learn_what_a_prompt_says():
    """After a fit the answer that stands in a prompt is likelier behind its gists than behind those of another."""
    run = toy_run()
    examples = [Example(str(a), (60, 61, a, 62, 63, a), 5) for a in range(1, 9)]
    run.data.pool = examples
    gist = Gist(tokens=1)
    run.apply(gist)
    fit(run, steps=60, lr=3e-3, batch_size=8, clip=1.0)
    run.finish()
    engine = open_engine(run)
    memories = [gist.remember(list(example.ids[:4]), run) for example in examples]
    tables = [
        [engine.score([([*memory, 63], [other.ids[-1]])])[0].logprob for other in examples] for memory in memories
    ]
    assert all(max(range(8), key=row.__getitem__) == place for place, row in enumerate(tables))
