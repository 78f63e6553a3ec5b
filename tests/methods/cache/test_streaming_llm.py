"""StreamingLLM: sinks and the newest tokens, at positions inside of the cache."""

from __future__ import annotations

import pytest
import torch
from toys_cache import GROUPED, Sinks, compare, fill, kept, run_of, text

from effbench.core.errors import Unsupported
from effbench.nn.infer.engine import Engine


@pytest.mark.parametrize("shape", [{}, GROUPED])
@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 5), (2, 1), (1, 30), (4, 100)])
def test_logits_equal_explicit_positions_inside_of_the_cache(sinks, window, shape):
    """Where sinks and window hold the prompt and overflow while decoding, too."""
    run = run_of(f"streaming_llm(sinks={sinks},window={window})", **shape)
    compare(run, 25, 60, [Sinks(sinks, window) for _ in range(2)])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_one_layer_equals_a_dense_run_of_the_tokens_that_are_held(architecture):
    """With one layer what is held is what the same tokens give when there are no others; rotary parts of heads too."""
    run, ids, sinks, window = run_of("streaming_llm(sinks=2,window=6)", architecture, layers=1), text(40), 2, 6
    found = Engine(run.model, run.infer).predict([(ids[:20], ids[20:])])[0]
    for place, logits in zip(range(19, 39), found, strict=True):
        shown = [*ids[:sinks], *ids[place - window : place], ids[place]]
        with torch.no_grad():
            dense = run.model(torch.tensor([shown])).logits[0, -1]
        torch.testing.assert_close(logits, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [3, 8, 9, 50])
def test_sinks_and_window_are_held(length):
    """The same tokens in every layer and head, after the prompt and while decoding."""
    expected = [j for j in range(length) if j < 3 or j >= length - 5]
    for prompt in (length, max(1, length - 4)):
        for layer in fill(run_of("streaming_llm(sinks=3,window=5)"), text(length), prompt).slot_layers:
            assert kept(layer) == [expected] * 4


def test_a_text_may_be_longer_than_the_models_positions():
    """Positions are those inside of the cache, and bytes stay what they are."""
    run = run_of("streaming_llm(sinks=2,window=8)", max_position_embeddings=16)
    sizes = {int(fill(run, text(length), 12).nbytes()) for length in (12, 30, 60)}
    assert len(sizes) == 1
    assert len(Engine(run.model, run.infer).generate([text(30)], 5, set())[0]) == 5


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_learned_positions_are_unsupported(architecture):
    with pytest.raises(Unsupported, match="learned positions"):
        run_of("streaming_llm()", architecture)


@pytest.mark.parametrize("bad", ["streaming_llm(sinks=-1)", "streaming_llm(window=0)"])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(Exception, match=r"sinks must|window must"):
        run_of(bad)
