"""H2O: what stays is what an explicit attention matrix says."""

from __future__ import annotations

import pytest
import torch
from toys_cache import GROUPED, HeavyHitters, compare, fill, kept, run_of, text

from effbench.methods.cache.h2o import H2O


@pytest.mark.parametrize(
    ("keep", "budget", "recent", "shape"),
    [
        (0.3, 0, 0.5, {}),
        (0.3, 0, 0.5, GROUPED),
        (None, 9, 0.5, GROUPED),
        (None, 7, 0.0, {}),
        (None, 6, 1.0, {}),
        (None, 1, 0.5, {}),
        (None, 30, 0.25, {}),  # reached while decoding
    ],
)
def test_tokens_kept_are_those_of_an_explicit_attention_matrix(keep, budget, recent, shape):
    """Slots of each layer and head and all logits, over a prompt of 24 tokens and 16 that follow it."""
    size = f"keep={keep}" if keep else f"budget={budget}"
    run = run_of(f"h2o({size},recent={recent})", **shape)
    rules = [HeavyHitters(keep, budget, recent) for _ in range(2)]
    cache = compare(run, 25, 41, rules)
    for layer, rule in zip(cache.slot_layers, rules, strict=True):
        assert layer.held() == min(rule.budget, 40)
        held = torch.stack([rule.mass[head, places] for head, places in enumerate(kept(layer))])
        torch.testing.assert_close(layer.mass.double(), held, atol=1e-5, rtol=0)


def test_a_share_is_one_of_the_prompt():
    """The number of slots is fixed where the prompt ends, and does not grow with what follows."""
    run = run_of("h2o(keep=0.25)")
    for length in (40, 41, 80):
        assert {len(places) for layer in fill(run, text(length), 40).slot_layers for places in kept(layer)} == {10}


def test_the_newest_stay_and_hitters_are_chosen_beside_them():
    layer = fill(run_of("h2o(budget=10,recent=0.5)"), text(60), 40).slot_layers[0]
    assert all(places[-5:] == list(range(55, 60)) and len(places) == 10 for places in kept(layer))


@pytest.mark.parametrize("bad", [{"recent": 1.5}, {"keep": 0.0}, {"budget": 0}, {"budget": 3, "keep": 0.5}])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(Exception, match=r"h2o|recent|keep|budget"):
        H2O(**bad)
