"""Random tokens are drawn within the budget, by the seed and the prompt."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

from effbench.core.views import Segments
from effbench.methods.prompt.random_tokens import RandomTokens
from effbench.nn.run import ModelRun

WORDS = (
    "fog mole code rope hall coin tower parrot seeds kitchen "
    "glove judge attic winter drummer stage wind ferret eggs lamp"
)
PROMPT = Segments(instruction="Notes: ", contexts=(WORDS + " ",), question="The code")


def keep(share: float, run: ModelRun, prompt: Segments = PROMPT, seed: int = 0) -> list[str]:
    """The words that stay, each a token, where a share of the 20 words has room beside all else."""
    asked = SimpleNamespace(seed=seed, tokenizer=run.tokenizer)
    total = len(run.tokenizer(prompt.text(), add_special_tokens=False)["input_ids"])
    return "".join(RandomTokens(keep=(total - 20 + 20 * share) / total).rewrite(prompt, asked).contexts).split()  # type: ignore[arg-type]


def test_exactly_the_budget_of_the_contexts_is_kept(run: ModelRun) -> None:
    assert len(run.tokenizer(" " + WORDS, add_special_tokens=False)["input_ids"]) == len(WORDS.split()) == 20
    for share in (0.05, 0.1, 0.33, 0.5, 0.99):
        assert len(keep(share, run)) == int(share * 20)
    assert keep(0.01, run) == []


def test_a_larger_budget_keeps_what_a_smaller_one_kept(run: ModelRun) -> None:
    kept = [set(keep(share / 20, run)) for share in range(1, 20)]
    assert all(small < large for small, large in itertools.pairwise(kept))


def test_seed_and_prompt_decide(run: ModelRun) -> None:
    other = Segments(instruction="Notes: ", contexts=(WORDS + " ",), question="The rope")
    assert keep(0.5, run) == keep(0.5, run)
    assert len({tuple(words) for words in (keep(0.5, run), keep(0.5, run, seed=1), keep(0.5, run, other))}) == 3


def test_every_token_is_as_likely(run: ModelRun) -> None:
    drawn = Counter(word for seed in range(400) for word in keep(0.5, run, seed=seed))
    assert len(drawn) == 20 and all(150 < count < 250 for count in drawn.values())  # 200 +- 5 deviations


def test_one_budget_for_all_contexts(run: ModelRun) -> None:
    words = WORDS.split()
    prompt = Segments("", "Notes: ", (" ".join(words[:5]) + " ", " ".join(words[5:]) + " "), "The code")
    sizes = set()
    for seed in range(20):
        kept = keep(0.5, run, prompt, seed)
        assert len(kept) == 10
        sizes.add(len(set(kept) & set(words[:5])))
    assert len(sizes) > 1


def test_the_last_token_of_a_whole_prompt_stays(run: ModelRun) -> None:
    whole = Segments(contexts=(" " + WORDS,), whole=True)
    assert all(keep(share, run, whole, seed)[-1] == "lamp" for share in (0.01, 0.2) for seed in range(20))
    assert len(keep(0.2, run, whole)) == 4
