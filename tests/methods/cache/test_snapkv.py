"""SnapKV: what stays of a prompt is what the attention of its last queries says."""

from __future__ import annotations

import pytest
from toys_cache import GROUPED, Votes, compare, fill, kept, run_of, text


@pytest.mark.parametrize("shape", [{}, GROUPED])
@pytest.mark.parametrize(
    ("budget", "window", "kernel"), [(16, 4, 5), (16, 4, 1), (16, 8, 3), (12, 32, 5), (5, 4, 7), (1, 4, 5), (64, 8, 5)]
)
def test_tokens_kept_are_those_of_explicit_votes(budget, window, kernel, shape):
    """Slots of each layer and head, and all logits; a window that the budget does not hold is half of it."""
    run = run_of(f"snapkv(budget={budget},window={window},kernel={kernel})", **shape)
    compare(run, 41, 49, [Votes(budget, window, kernel) for _ in range(2)])


def test_the_cache_grows_while_decoding():
    """What comes after the prompt stays."""
    run = run_of("snapkv(keep=0.25,window=4)")
    for new in (0, 1, 20):
        for layer in fill(run, text(40 + new), 40).slot_layers:
            assert all(len(places) == 10 + new for places in kept(layer))
            assert all(places[-4 - new :] == list(range(36, 40 + new)) for places in kept(layer))


@pytest.mark.parametrize("bad", ["snapkv(window=0)", "snapkv(kernel=4)"])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(Exception, match=r"window must|kernel must"):
        run_of(bad)
