"""AutoCompressor: the authors' passes and gradients, and segments that know the past by its summaries alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_cache import ARCHITECTURES, text
from toys_texts import at, golden
from toys_training import fit

from effbench.checks import toy_run
from effbench.core.errors import Unsupported, Usage
from effbench.core.views import Example
from effbench.methods.prompt.autocompressor import SHORTEST, AutoCompressor, draw_lengths
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.memory import find_memory
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate

GOLDEN = golden("memory")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
LENGTHS = [5, 4, 6, 2]


def opened(method: AutoCompressor, architecture: str = "llama", **shape: Any) -> ModelRun:
    """A run whose summary tokens differ, in its first step."""
    run = toy_run(architecture, shape=shape)
    run.apply(method)
    find_memory(run.model).rows.data.normal_(generator=torch.Generator().manual_seed(2))
    return at(run, 0)


def authors(method: AutoCompressor) -> tuple[ModelRun, dict[str, Tensor]]:
    """The authors' model, and their batch with their lengths of segments."""
    run = opened(method, **SHAPE, vocab_size=32)
    weights = {name.removeprefix("model."): value for name, value in GOLDEN.items() if name.startswith("model.")}
    run.model.load_state_dict(weights | {"memory.rows": GOLDEN["auto.rows"]})
    batch = collate([Example(str(i), tuple(row)) for i, row in enumerate(GOLDEN["auto.ids"].tolist())], 0, run.device)
    return run, batch | {"lengths": torch.tensor(LENGTHS)}


def test_logits_and_gradients_are_the_authors():
    """Two substeps of two segments: gradients go back over two."""
    method = AutoCompressor(tokens=3)
    run, batch = authors(method)
    logits = method.forward(batch, run).logits
    assert torch.allclose(logits, GOLDEN["auto.logits"], atol=1e-5)
    (GOLDEN["auto.weights"] * logits).sum().backward()
    assert torch.allclose(find_memory(run.model).rows.grad, GOLDEN["auto.grad.rows"], rtol=1e-4, atol=1e-4)
    table = run.model.get_input_embeddings().weight.grad
    assert torch.allclose(table, GOLDEN["auto.grad.table"], rtol=1e-4, atol=1e-4)


def test_summaries_of_a_prompt_are_the_authors():
    """Segments of one length give the vectors of a fourth segment behind those of three."""
    method = AutoCompressor(tokens=3)
    run, batch = authors(method)
    embeds, real = run.model.get_input_embeddings()(batch["input_ids"]), batch["attention_mask"]
    summaries = embeds[:, :0]
    for segment, seen in zip(embeds.split(LENGTHS, 1), real.split(LENGTHS, 1), strict=True):
        summaries = torch.cat([summaries, method.read(summaries, segment, seen, run, None)[1]], 1)
    assert torch.allclose(summaries, GOLDEN["auto.summaries"], atol=1e-5)


def test_a_prompt_is_cut_into_even_segments_and_each_adds_its_summaries():
    method = AutoCompressor(tokens=3, length=6)
    run = opened(method)
    ids = text(17)
    found = method.remember(ids, run)
    assert found is not None and len(found) == 9
    embeds = run.model.get_input_embeddings()(torch.tensor([ids]))
    rows = find_memory(run.model).rows[None]
    summaries = embeds[:, :0]
    with torch.no_grad():
        for segment in embeds.split([6, 6, 5], 1):
            states = run.model.base_model(inputs_embeds=torch.cat([summaries, segment, rows], 1)).last_hidden_state
            summaries = torch.cat([summaries, states[:, -3:]], 1)
    assert torch.allclose(torch.stack([*found]), summaries[0], atol=1e-5)
    assert method.remember(text(3), run) is None, "as long as what it stands for"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_token_changes_what_is_said_before_it(architecture):
    """Each token of a row, in each of its segments, is seen by the logits from its place on, and by all later ones."""
    method = AutoCompressor(tokens=2, segments=3)
    run = opened(method, architecture)
    ids = text(12, seed=1)
    batch = method.batch(collate([Example("a", tuple(ids))], 0, run.device), run)
    with torch.no_grad():
        logits = method.forward(batch, run).logits[0]
        for place in range(12):
            other = batch["input_ids"].clone()
            other[0, place] = ids[place] % 90 + 1
            changed = (method.forward(batch | {"input_ids": other}, run).logits[0] - logits).abs().amax(-1) > 1e-7
            assert not changed[:place].any()
            assert changed[place:].all(), "a segment does not reach those behind it"


def test_later_segments_know_the_past_by_its_summaries_alone():
    """With the vectors held as they are, no earlier token counts; with those of one segment free, its tokens do."""
    method = AutoCompressor(tokens=2, stop=9)
    run = opened(method)
    read = AutoCompressor.read
    free: set[int] = set()

    class Held(AutoCompressor):
        def read(self, summaries: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
            hidden, new = read(self, summaries, *rest, **options)
            return hidden, new if summaries.shape[1] // 2 in free else new.detach()

    object.__setattr__(method, "__class__", Held)
    batch = collate([Example("a", tuple(text(17)))], 0, run.device) | {"lengths": torch.tensor(LENGTHS)}
    embeds: list[Tensor] = []
    run.model.requires_grad_(False)
    run.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embeds.append(output.requires_grad_()) or output
    )
    for free_now, counts in ((set(), []), ({0}, [True, False, False]), ({1}, [False, True, False])):
        free.clear()
        free.update(free_now)
        embeds.clear()
        method.forward(batch, run).logits[:, -2:].square().sum().backward()
        grads = [bool(part.any()) for part in embeds[0].grad.split(LENGTHS, 1)]  # type: ignore[union-attr]
        assert grads == [*(counts or [False] * 3), True]


@pytest.mark.parametrize(("stop", "reached"), [(1, [0, 0, 0, 1]), (2, [0, 0, 1, 1]), (3, [0, 0, 0, 1]), (4, [1] * 4)])
def test_gradients_stop_after_so_many_segments(stop, reached):
    method = AutoCompressor(tokens=2, stop=stop)
    run = opened(method)
    batch = collate([Example("a", tuple(text(17)))], 0, run.device) | {"lengths": torch.tensor(LENGTHS)}
    embeds: list[Tensor] = []
    run.model.requires_grad_(False)
    run.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: embeds.append(output.requires_grad_()) or output
    )
    method.forward(batch, run).logits[:, -2:].square().sum().backward()
    assert [int(part.any()) for part in embeds[0].grad.split(LENGTHS, 1)] == reached  # type: ignore[union-attr]


def test_a_padded_row_gives_what_it_gives_alone():
    method = AutoCompressor(tokens=2, segments=3)
    run = opened(method)
    rows = [Example("a", tuple(text(17))), Example("b", tuple(text(7, seed=1)))]
    for lengths in ([5, 4, 8], [9, 4, 4]):
        together = collate(rows, 0, run.device) | {"lengths": torch.tensor(lengths)}
        own = [min(7 - sum(lengths[:i]), length) for i, length in enumerate(lengths) if sum(lengths[:i]) < 7]
        alone = collate(rows[1:], 0, run.device) | {"lengths": torch.tensor(own)}
        with torch.no_grad():
            pair = [method.forward(batch, run).logits for batch in (together, alone)]
        assert torch.allclose(pair[0][1, :7], pair[1][0], atol=1e-5)


def test_lengths_are_drawn_as_the_authors_draw_them():
    """Segments of at least two tokens; a break is as likely at each place."""
    counts = dict.fromkeys(range(2, 8), 0)
    for seed in range(600):
        lengths = draw_lengths(10, 2, random.Random(seed))
        assert sum(lengths) == 10
        counts[lengths[0]] += 1
    assert all(60 < count < 140 for count in counts.values())
    for width in range(1, 12):
        lengths = draw_lengths(width, 4, random.Random(width))
        assert sum(lengths) == width
        assert min(lengths) >= min(SHORTEST, width)
        assert len(lengths) == max(1, min(4, (width + 1) // 3))


def test_lengths_differ_from_step_to_step():
    method = AutoCompressor(tokens=2)
    run = opened(method)
    batch = collate([Example("a", tuple(text(30)))], 0, run.device)
    drawn = [method.batch(batch, at(run, step))["lengths"].tolist() for step in (0, 1, 2, 0)]
    assert drawn[0] == drawn[3]
    assert len({tuple(lengths) for lengths in drawn}) == 3


def test_what_has_no_room_or_no_segments_is_unsupported():
    with pytest.raises(Unsupported, match=r"a segment with summaries takes \d+ positions, and the model has 256"):
        fit(opened(AutoCompressor(tokens=80)), steps=1)
    with pytest.raises(Unsupported, match="give a smaller length, or fewer tokens"):
        method = AutoCompressor(tokens=10)
        method.remember(text(250), opened(method))
    with pytest.raises(Unsupported, match="layout='padded'"):
        fit(opened(AutoCompressor(tokens=2)), steps=1, layout="packed")
    with pytest.raises(Usage, match="stop must be at least 1"):
        AutoCompressor(stop=0)


def test_summaries_learn_what_a_text_says():
    """After a fit the end of a text is likelier behind the summaries of its beginning than behind those of another."""
    run = toy_run()
    examples = [Example(str(a), (60, a, 61, 62, 63, 64, a), 6) for a in range(1, 9)]
    run.data.pool = examples
    method = AutoCompressor(tokens=1, segments=2, length=8)
    run.apply(method)
    fit(run, steps=80, lr=3e-3, batch_size=8, clip=1.0)
    run.finish()
    engine = open_engine(run)
    for place, example in enumerate(examples):
        memory = method.remember(list(example.ids[:4]), run)
        scores = [engine.score([([*(memory or ()), 63, 64], [b])])[0].logprob for b in range(1, 9)]
        assert max(range(8), key=scores.__getitem__) == place
