"""Active learning: how many answers are told, which ones, what each fit begins with, and going on after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from effbench import sources
from effbench.cells.plan import digests
from effbench.checks import toy_run
from effbench.core import registry
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.kinds import Select, Train
from effbench.core.recipe import parse, parse_step
from effbench.methods.select.active_learning import ActiveLearning
from effbench.methods.select.entropy import Entropy
from effbench.nn.data import Data
from effbench.nn.files.load import open_run
from effbench.nn.run import ModelRun
from effbench.nn.train.fit import fit
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.unlabelled import Annotator, rank, withhold
from effbench.probes import selection

FIT: dict[str, Any] = {"steps": 3, "lr": 3e-3, "batch_size": 4, "max_length": 32, "schedule": "constant", "warmup": 0.0}
ENTROPY = ActiveLearning(acquire="entropy()", budget=7, rounds=3, **FIT)


def asking() -> ModelRun:
    run = toy_run()
    run.data.pool = [dataclasses.replace(example, prompt=8) for example in run.data.pool]
    return run


def learn(steps: str = "", method: ActiveLearning = ENTROPY, folder: Path | None = None) -> ModelRun:
    run = asking()
    run.folder = folder
    for step in (*parse(steps).steps, method):
        run.apply(step)
    return run


@dataclasses.dataclass(frozen=True)
class Watch(Train):
    """Takes down what is in the train set of each step."""

    def on_step(self, run: Any) -> None:
        run.state(self).setdefault("seen", []).append([example.id for example in run.data.train])
        SEEN.append([example.id for example in run.data.train])


SEEN: list[list[str]] = []


def test_the_budget_is_what_is_told_in_all_and_each_round_adds_to_the_one_before() -> None:
    SEEN.clear()
    run = toy_run()
    run.apply(Watch())
    run.apply(ENTROPY)
    rounds = [list(group) for group, _ in itertools.groupby(SEEN)]
    assert [len(ids) for ids in rounds] == [2, 4, 7] and len(SEEN) == 9
    assert all(later[: len(ids)] == ids for ids, later in itertools.pairwise(rounds))
    told = [example.id for example in run.data.train]
    assert told == rounds[-1] and len(set(told)) == 7
    assert run.log.selected == {str(ENTROPY): 7} and [id for id, _ in run.log.chosen[str(ENTROPY)]] == told
    assert len(run.log.fits) == 3 and run.train.empty


def test_what_was_asked_is_reported_against_the_pool_as_selections_are(tmp_path: Path) -> None:
    run = toy_run()
    told = [{"source": "ab"[place % 2], "skill": place % 4, "label": place % 3} for place in range(64)]
    run.data.pool = [
        dataclasses.replace(example, prompt=8, ids=example.ids[: 12 + place % 5], meta=told[place])
        for place, example in enumerate(run.data.pool)
    ]
    run.apply(parse_step("random_selection(keep=0.5)"))
    run.apply(dataclasses.replace(ENTROPY, acquire="curriculum(difficulty='length')"))
    first, report = run.log.selections
    chosen = run.data.train
    assert len(chosen) == 7 == report["kept"]["examples"] and run.log.selected[report["step"]] == 7
    assert report["examined"] == 32 and report["pool"] == first["pool"] and report["pool"]["examples"] == 64
    for key, name in (("sources", "source"), ("skills", "skill")):
        counts = Counter(str(example.meta[name]) for example in chosen)
        shares: dict[str, float] = report["kept"][key]  # type: ignore[literal-required]
        assert {value: share for value, share in shares.items() if share} == {k: v / 7 for k, v in counts.items()}
        assert report["coverage"][name] == len(counts) / {"source": 2, "skill": 4}[name]
    labels = Counter(example.meta["label"] for example in chosen).values()
    balance = -sum(n / 7 * math.log(n / 7) for n in labels) / math.log(3)
    assert report["kept"]["balance"] == pytest.approx(balance) and 0 <= report["kept"]["topics"] <= math.log(7)
    assert report["kept"]["lengths"]["0.5"] == sorted(len(example.ids) for example in chosen)[3]
    assert report["seconds"] > 0 and "noise_last" not in report
    reading = selection.take(run, {}).metrics
    assert reading["select_kept"].value == 7 and reading["select_sources_covered"].value == report["coverage"]["source"]


def test_the_balance_of_answers_of_the_new_task_is_reported() -> None:
    run = open_run(sources.model("tiny"), sources.data("tiny:task"), "cpu", None, 0)
    run.apply(dataclasses.replace(ENTROPY, acquire="random_selection()", budget=40, rounds=1, steps=1))
    reading = selection.take(run, {}).metrics
    first = [example.text[len(run.tokenizer.decode(example.ids[: example.prompt])) :] for example in run.data.train]
    assert [text.split()[0] for text in first] == [example.meta["label"] for example in run.data.train]
    assert 0.5 < reading["select_kept_label_balance"].value < reading["select_pool_label_balance"].value < 1


def test_noise_is_looked_for_behind_what_the_last_round_asked() -> None:
    run = asking()
    hardest = Entropy().score(withhold(run.data.pool), run).argsort(descending=True, stable=True).tolist()
    noise = {*hardest[:4], *hardest[-4:]}
    run.data.pool = [
        dataclasses.replace(example, meta={"planted": "noise"} if place in noise else {})
        for place, example in enumerate(run.data.pool)
    ]
    run.apply(dataclasses.replace(ENTROPY, rounds=1))
    (report,) = run.log.selections
    assert report["planted"] == {"noise": 0.5} and report["noise_last"] == 0.5


def test_each_round_asks_the_model_that_the_round_before_has_fitted_from_the_start() -> None:
    run = learn()
    chosen = run.data.train
    told: list[Any] = []
    for size in (2, 2, 3):
        alone = asking()
        rest = [e for e in alone.data.pool if e.id not in {e.id for e in told}]
        alone.data.train = told
        if told:
            fit(alone, ENTROPY)
        best = Entropy().score(withhold(rest), alone).argsort(descending=True, stable=True)[:size]
        told += [rest[int(place)] for place in best]
    assert [e.id for e in told] == [e.id for e in chosen]
    alone = toy_run()
    alone.data.train = told
    fit(alone, ENTROPY)
    mine, theirs = run.model.state_dict(), alone.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    start = toy_run().model.state_dict()
    assert not all(torch.equal(mine[name], start[name]) for name in start)


def test_hooks_of_the_recipe_act_in_every_round_and_are_used_up_then(tmp_path: Path) -> None:
    run = learn("snapshot(name='old'), lora(), kd(teacher='old'), bf16()", folder=tmp_path)
    for number in range(1, 4):
        lines = [json.loads(line) for line in (tmp_path / f"fit-{number}.jsonl").read_text().splitlines()]
        assert len(lines) == 3 and all(any(term.startswith("kd.") for term in line["terms"]) for line in lines)
    assert run.train.empty and run.train.slot("precision") is None
    groups = [report["groups"] for report in run.log.fits]
    assert groups[0] == groups[1] == groups[2]
    run.finish()
    assert not any("lora" in name for name, _ in run.model.named_parameters())  # merged
    assert "kd.kd" not in str(fit(run, FitSettings(**FIT)))


def test_several_rates_are_chosen_among_in_every_round() -> None:
    run = learn(method=dataclasses.replace(ENTROPY, lr=(1e-3, 3e-3)))
    assert [len(report["rates"]) for report in run.log.fits] == [2, 2, 2]


@pytest.mark.parametrize(
    "acquire",
    ["random_selection()", "curriculum(difficulty='length')", "bald(samples=2)", "dpp()", "hybrid(second='dpp')"],
)
def test_any_selection_that_ranks_acquires(acquire: str) -> None:
    method = dataclasses.replace(ENTROPY, acquire=acquire)
    run, again = learn(method=method), learn(method=method)
    ids = [example.id for example in run.data.train]
    assert len(set(ids)) == 7 and ids == [example.id for example in again.data.train]


# Every selector that ranks, with each of its settings to test.
RANKING = [
    cls(**trial)
    for cls in (registry.load(key) for key, entry in registry.catalog().items() if entry.kind == "Select")
    for trial in cls.trials
    if not cls(**trial).admits
]


LOOKS: list[Any] = []


class Noting(dict[str, Any]):
    """What a source says of an example; takes down who asks."""

    def get(self, key: str, default: Any = None) -> Any:
        LOOKS.append(key)
        return "asked"


class Watched(list[Any]):
    """A pool; takes down who looks at what is in it, which is more than how much it is."""

    def __iter__(self) -> Iterator[Any]:
        LOOKS.append("pool")
        return super().__iter__()

    def __getitem__(self, place: Any) -> Any:
        LOOKS.append("pool")
        return super().__getitem__(place)


@contextlib.contextmanager
def watching(texts: set[tuple[int, ...]]) -> Iterator[None]:
    """Take down who has a model read one of these texts to learn from it, by a pass with gradients, and who asks for
    the documents of a part."""

    def read(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Embedding) and torch.is_grad_enabled() and inputs[0].dim() == 2:
            LOOKS.extend(row for row in map(tuple, inputs[0].tolist()) if row in texts)

    LOOKS.clear()
    hook = nn.modules.module.register_module_forward_pre_hook(read)
    with mock.patch.object(Data, "documents", lambda data, part: LOOKS.append(part) or []):
        yield
    hook.remove()


@pytest.mark.parametrize("acquisition", RANKING, ids=str)
def test_what_needs_prompts_alone_acquires_and_what_goes_by_answers_is_refused(acquisition: Select) -> None:
    """Which is which is seen on texts that are the prompts and nothing else, with all doors open."""
    run = asking()
    prompts = [dataclasses.replace(e, ids=e.ids[: e.prompt], prompt=0, meta=Noting()) for e in run.data.pool]
    run.data.pool, run.data.asked, order = Watched(prompts), 20, []
    with watching({e.ids for e in prompts}), contextlib.suppress(Unsupported):
        order = [int(place) for place in acquisition.order(prompts, run)]
    method = dataclasses.replace(ENTROPY, acquire=str(acquisition), budget=40, rounds=2, steps=1)
    if LOOKS:
        with pytest.raises(Refused, match="prompts whose answers nobody has told yet, and must not"):
            learn(method=method)
    else:
        told = [int(example.id) for example in learn(method=method).data.train]
        assert told[:20] == order[:20] and len(set(told)) == 40


def test_a_selector_is_asked_for_as_many_as_are_bought() -> None:
    """The pool, of whose size a selection is to keep a share elsewhere, is closed."""
    run = asking()
    method = registry.load("dpp")()
    assert method.count(run) == 13
    with run.data.asking(3):
        assert method.count(run) == 3
        with run.data.asking(4):
            assert method.count(run) == 4
        assert method.count(run) == 3
    assert method.count(run) == 13


class Stopped(Exception):
    """Stands for a kill."""


def test_a_killed_one_goes_on_to_the_same_bits_and_asks_no_round_again(tmp_path: Path) -> None:
    whole = learn("random_selection(keep=0.5)", folder=tmp_path / "whole")
    cut = asking()
    cut.folder = tmp_path / "cut"
    tell = cut.progress

    def progress(unit: str, done: int, total: int) -> None:
        if unit == "training step" and done > 5:
            raise Stopped
        tell(unit, done, total)

    cut.progress = progress
    with mock.patch("effbench.nn.train.fit.EVERY", 0.0), contextlib.suppress(Stopped):
        cut.apply(parse_step("random_selection(keep=0.5)"))
        cut.apply(ENTROPY)
    assert len(cut.log.fits) == 1  # killed in the second
    with mock.patch("effbench.methods.select.active_learning.rank", side_effect=rank) as ranked:
        again = learn("random_selection(keep=0.5)", folder=tmp_path / "cut")
    assert ranked.call_count == 1  # of the last round
    assert [report.get("resumed") for report in again.log.fits] == [[3], [2], None]
    assert [e.id for e in again.data.train] == [e.id for e in whole.data.train]
    reports = [dict(run.log.selections[-1]) for run in (again, whole)]
    assert min(report.pop("seconds") for report in reports) > 0 and reports[0] == reports[1]
    assert sum(json.loads(file.read_text())["seconds"] for file in (tmp_path / "cut").glob("acquired-*")) == (
        pytest.approx(again.log.selections[-1]["seconds"])
    )
    mine, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_budget_above_the_pool_is_unsupported() -> None:
    with pytest.raises(Unsupported, match=r"^a budget of 65 answers is more than the 64 examples .*give less$"):
        learn(method=dataclasses.replace(ENTROPY, budget=65))
    assert len(learn(method=dataclasses.replace(ENTROPY, budget=64, rounds=2)).data.train) == 64


def test_answers_are_told_once_and_within_the_budget() -> None:
    annotator = Annotator(toy_run().data.pool, 3)
    annotator.tell([5, 2])
    assert annotator.untold == [place for place in range(64) if place not in (5, 2)]
    for places in ([5], [1, 1], [1, 3]):
        with pytest.raises(Refused, match="of a budget of 3"):
            annotator.tell(places)
    assert [example.id for example in annotator.labelled] == ["5", "2"]


CHEAT = '''"""A cheat."""
from dataclasses import dataclass
import torch
from effbench.core.kinds import Select

@dataclass(frozen=True)
class Cheat(Select):
    """Looks at answers."""
    def score(self, examples, run):
        return torch.tensor([float({what}) for e in examples])

@dataclass(frozen=True)
class Lazy(Select):
    """Ranks a part."""
    def order(self, examples, run):
        return [0]
'''


@pytest.mark.parametrize("what", ["len(e.meta)", "len(run.data.pool)", "len(run.data.train[0].ids)"])
def test_an_acquisition_that_looks_at_answers_fails_the_cell(tmp_path: Path, what: str) -> None:
    (tmp_path / "cheat.py").write_text(CHEAT.format(what=what))
    with pytest.raises(Refused, match="must not look at"):
        learn(method=dataclasses.replace(ENTROPY, acquire=f"{tmp_path}/cheat.py:Cheat()"))
    with pytest.raises(Refused, match="gives 1 places for 64 examples"):
        learn(method=dataclasses.replace(ENTROPY, acquire=f"{tmp_path}/cheat.py:Lazy()"))


def test_what_was_told_may_be_looked_at() -> None:
    run = toy_run()
    with run.data.asking(5, run.data.pool[:3]):
        assert [example.id for example in run.data.train] == ["0", "1", "2"]
        with pytest.raises(Refused):
            run.data.pool  # noqa: B018


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ("active_learning(acquire='bold()')", "unknown method 'bold'; did you mean 'bald'"),
        ("active_learning(acquire='bald(sample=3)')", "no parameter 'sample'; did you mean 'samples'"),
        ("active_learning(acquire='bald(samples=1)')", "samples must be at least 2"),
        ("active_learning(acquire='bald(), entropy()')", "expected one step, found 2"),
        ("active_learning(acquire='bald(')", "cannot be read"),
        ("active_learning(acquire='minhash_dedup()')", "a selection that ranks"),
        ("active_learning(acquire='lora()')", "a selection that ranks"),
        ("active_learning(acquire='entropy(keep=0.5)')", "the budget says how many"),
        ("active_learning(budget=3, rounds=4)", "at most the budget"),
        ("active_learning(steps=0)", "steps must be at least 1"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(steps: str, reason: str) -> None:
    with pytest.raises(Usage, match=reason) as caught:
        parse_step(steps)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("acquire", "canonical"),
    [
        ('bald(samples=10, ensemble="prompts")', "bald(ensemble='prompts')"),
        (" entropy( )", "entropy()"),
        ("bald(ensemble='prompts', rate=0.2)", "bald(ensemble='prompts', rate=0.2)"),
    ],
)
def test_a_step_in_a_step_is_read_back(acquire: str, canonical: str) -> None:
    method = ActiveLearning(acquire=acquire)
    assert method.acquire == canonical and parse_step(str(method)) == method


def test_the_source_of_the_acquisition_is_part_of_what_the_cell_is() -> None:
    found = digests(parse("active_learning(acquire='entropy()')"), [], "model", "data")
    assert {"method.active_learning", "method.entropy"} <= found.keys()
    assert "method.bald" not in found
