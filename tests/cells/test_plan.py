"""Planning: which cells run, why, and that whatever a user writes ends in a plan or in `Usage`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from effbench.cells.options import RunOptions
from effbench.cells.plan import Batch, find_jobs, plan
from effbench.cli.main import main
from effbench.core.errors import Usage
from effbench.core.paths import PACKAGE
from effbench.records.metric import Metric
from effbench.records.record import OUTCOMES, RETRIED, Record
from effbench.records.store import Store
from effbench.sources import tasks


@pytest.fixture
def options(tmp_path):
    return RunOptions(suite="quant", recipes="rtn-4b", device="cpu", results=str(tmp_path / "runs"))


def reasons(batch: Batch) -> list[str]:
    return [planned.why for planned in batch.cells]


def end(options: RunOptions, outcome: str, again: bool = False) -> None:
    """Write a record of this outcome for every cell that is to run."""
    for job in plan(options, again=again).todo:
        Store(options.folder).write(Record(job.cell, outcome, attempt=job.attempt))


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_what_is_tried_again(options, outcome):
    assert reasons(plan(options)) == ["new", "new"]
    end(options, outcome)
    batch = plan(options)
    if outcome in RETRIED:
        assert reasons(batch) == [f"{outcome} before: attempt 2"] * 2 and len(batch.todo) == 2
    else:
        assert reasons(batch) == [f"done: {outcome}"] * 2 and batch.todo == []
    assert [job.attempt for job in plan(options, again=True).todo] == [2, 2]


def test_again_counts_every_attempt(options):
    """An attempt that was cut short does not hide the one that ended, and is not overwritten."""
    end(options, "ok")
    end(options, "crashed", again=True)
    assert reasons(plan(options)) == ["done: ok", "done: ok"]
    assert [job.attempt for job in plan(options, again=True).todo] == [3, 3]
    end(options, "diverged", again=True)
    assert reasons(plan(options)) == ["done: diverged"] * 2
    assert {record.attempt for record in plan(options).done} == {3}


def test_settings_are_resolved_by_the_schema(options):
    before = plan(options).cells[0].job.cell
    after = plan(options, {"score_block": 4, "limit": None}).cells[0].job.cell
    assert after.settings == {name: value for name, value in before.settings.items() if name != "limit"} | {
        "score_block": 4
    }
    for wrong in ({"score_block": 0}, {"score_blok": 4}, {"probes": ["spead"]}, {"probes": []}, {"tasks": "tiny"}):
        with pytest.raises(Usage):
            plan(options, wrong)


WORDS = st.text() | st.text(alphabet=string.ascii_letters + string.digits + ":,*@[](){}='\"- \0\n²٣")
FIELDS = {
    "suite": WORDS,
    "recipe": WORDS,
    "model": WORDS | WORDS.map("shape:{}".format),
    "data": WORDS | WORDS.map("hub:{}".format) | WORDS.map("text:no-such-folder{}".format),
    "tokenizer": WORDS,
    "device": WORDS | WORDS.map("cuda:{}".format),
    "dtype": WORDS,
    "tier": WORDS,
    "recipes": WORDS,
    "probes": WORDS,
}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), min_size=1, max_size=2), st.data())
@example({"device": None}, None)
def test_any_options_are_a_plan_or_usage(options, names, data):
    changes = {name: data.draw(FIELDS[name]) for name in names} if data is not None else {"device": "cuda:²"}
    try:
        plan(dataclasses.replace(options, **changes))
    except Usage as error:
        assert str(error).strip()


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"window": 2049}, 2049),
        ({"calibration_length": 2049}, 2049),
        ({"speed_points": [[1, 8], [1, 2048]]}, 2049),
        ({"speed_points": [[1, 2040]], "speed_new_tokens": 9}, 2049),
    ],
)
def test_no_setting_asks_for_more_tokens_than_the_model_sees(options, changes, tokens):
    with pytest.raises(Usage, match=rf"takes {tokens} tokens, and the model tiny has 2048 positions; --set \w+=null"):
        plan(options, changes)
    plan(options, {name: None for name in changes})
    plan(dataclasses.replace(options, model="shape:llama-2-7b"), changes)
    plan(dataclasses.replace(options, model="org/name"), changes)


SHORT = '{"max_position_embeddings": 128}'
UNSET = {"speed_points": None, "calibration_length": None, "text_tokens": None}


@pytest.fixture
def short(tmp_path):
    """A folder with a model of 128 positions."""
    (tmp_path / "config.json").write_text(SHORT)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("probes", "changes"),
    [
        ("perplexity,quality", {"speed_points": [[1, 128]]}),
        ("memory,flops,cost", {"speed_points": [[1, 128]], "window": 256}),
        ("speed,energy", {"window": 256, "stride": 300, "speed_points": [[1, 8]]}),
        ("quality", {"window": 256, "text_tokens": 100}),
    ],
)
def test_a_setting_that_no_probe_reads_costs_nothing(options, short, probes, changes):
    find_jobs(dataclasses.replace(options, model=short, probes=probes), UNSET | changes)


@pytest.mark.parametrize(
    ("probes", "changes", "words"),
    [
        ("speed", {"speed_points": [[1, 128]]}, "speed_points takes"),
        ("energy", {"speed_points": [[1, 128]]}, "speed_points takes"),
        ("distance", {"window": 256}, "window takes 256"),
        ("perplexity", {"window": 256}, "window takes 256"),
        ("cost", {"calibration_length": 256}, "calibration_length takes 256"),
        ("perplexity", {"stride": 129}, "^stride=129: is more than the window, 128 tokens"),
        ("distance", {"window": 64, "stride": 65}, "^stride=65: is more than the window, 64 tokens.*; --set stride=64"),
        ("distance", {"window": 64, "text_tokens": 63}, "^text_tokens=63: is less than the window, 64 tokens"),
        (
            "perplexity",
            {"text_tokens": 100},
            "^text_tokens=100: is less than the window, 128 .*; --set text_tokens=128",
        ),
    ],
)
def test_a_setting_that_leaves_its_probe_no_chance_is_refused(options, short, probes, changes, words):
    options = dataclasses.replace(options, model=short, probes=probes)
    with pytest.raises(Usage, match=words):
        plan(options, UNSET | changes)


def test_windows_that_just_fit_are_planned(options, short):
    for changes in ({"window": 64, "stride": 64, "text_tokens": 64}, {"text_tokens": 128, "stride": 128}):
        find_jobs(dataclasses.replace(options, model=short), UNSET | changes)
    with pytest.raises(Usage, match="text_tokens=16384: is less than the window, 20000"):
        plan(dataclasses.replace(options, model="org/name"), {"window": 20000, "text_tokens": None})
    paper = dataclasses.replace(options, model="org/name", data="hub:wikitext2-gptq")
    plan(paper, {"window": 20000, "text_tokens": None})  # which is measured whole
    plan(dataclasses.replace(paper, model="org/name"), {"stride": 2048, "text_tokens": None})  # positions are not known
    with pytest.raises(Usage, match="stride=2049: is more than the window, 2048 tokens"):
        plan(dataclasses.replace(paper, model="tiny"), {"stride": 2049, "text_tokens": None, "speed_points": None})


@pytest.mark.parametrize(
    ("recipe", "idle"),
    [
        ("movement()", r"movement\(\)"),
        ("gmp(sparsity=0.6)", r"gmp\(sparsity=0\.6\)"),
        ("learned_mask()", r"learned_mask\(\)"),
        ("wanda(), lora()", r"lora\(\)"),
        ("gmp(), fit(), lora()", r"lora\(\)"),
        ("lottery_ticket(), movement(), magnitude()", r"movement\(\)"),
    ],
)
def test_what_acts_in_a_fit_needs_one_behind_it(options, tmp_path, recipe, idle):
    line = f"{idle} acts through the fit that follows it, and none does: add fit"
    with pytest.raises(Usage, match=f"^{line}"):
        plan(dataclasses.replace(options, recipe=recipe))
    body = (
        f"name: mine\nversion: 1\ndescription: d\nrecipes: [{{name: a, steps: '{recipe}'}}]\ntiers: {{quick: {{}}}}\n"
    )
    (tmp_path / "mine.yaml").write_text(body)
    with pytest.raises(Usage, match=rf"mine\.yaml: recipes\.a: {line}"):
        plan(RunOptions(suite=str(tmp_path / "mine.yaml"), device="cpu"))
    plan(dataclasses.replace(options, recipe=f"{recipe}, recover()"))


def test_a_selection_needs_a_fit_behind_it(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "method", "Select", "longest"]) == 0
    (file,) = tmp_path.rglob("longest.py")
    step = f"{file}:Longest()"
    with pytest.raises(Usage, match="acts through the fit that follows it"):
        plan(dataclasses.replace(options, recipe=step))
    plan(dataclasses.replace(options, recipe=f"{step}, fit()"))


AIMING = ("dsir()", "influence()", "datainf()", "trak()", "skill_it()", "perplexity_filter()")


@pytest.mark.parametrize("recipe", AIMING)
def test_a_selection_needs_what_it_aims_at(options, tmp_path, recipe):
    """Own data without a target, and random weights, which have no text: nothing has to run to tell."""
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(f'{{"text": "{n}", "part": "{part}"}}' for n, part in enumerate(("train", "heldout"))))
    asked = dataclasses.replace(options, suite=None, recipes=None, recipe=f"{recipe}, fit()")
    for changes in ({"data": f"jsonl:{file}"}, {"calibration_data": f"jsonl:{file}"}, {"model": "shape:deep-tiny"}):
        with pytest.raises(Usage, match=r"^\w+\(\): .* has no target part"):
            plan(dataclasses.replace(asked, **changes))
    assert plan(dataclasses.replace(asked, data="tiny:planted")).todo
    file.write_text(file.read_text() + '\n{"text": "aim", "part": "target"}')
    assert plan(dataclasses.replace(asked, data=f"jsonl:{file}")).todo


def test_methods_that_aim_are_all_known(options):
    """Who reads the target is found in source, so that the list above lacks none."""
    asks = re.compile(r"Aimed|data\.target").search
    reading = {path.stem for path in (PACKAGE / "methods" / "select").glob("[!_]*.py") if asks(path.read_text())}
    assert reading == {recipe.removesuffix("()") for recipe in AIMING}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("baseline", "^recipe=baseline: the baseline is the row of no steps, which always runs; name a step"),
        (" baseline() ", "the baseline is the row of no steps"),
        ("gptq-4b", "^recipe=gptq-4b: is the name of a row, not its steps; recipes=gptq-4b chooses it"),
        ("wandaa", "wandaa is not a step; no method has this name; did you mean 'wanda'"),
        ("wanda", r"wanda is not a step; write wanda\(\)$"),
        ("recover", r"recover is not a step; write recover\(\)$"),
    ],
)
def test_what_is_no_step_is_told_what_it_is(options, recipe, words):
    with pytest.raises(Usage, match=words):
        plan(dataclasses.replace(options, recipe=recipe))


def test_steps_of_a_row_with_the_name_of_its_method_are_that_row(options):
    assert plan(dataclasses.replace(options, recipe="nf4()")).cells[-1].job.cell.recipe == "nf4"


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ('{"max_position_embeddings": 64}', 64),
        ('{"n_positions": 64}', 64),
        ("{}", None),
        ("[]", None),
        ("{", None),
        ('{"max_position_embeddings": "many"}', None),
    ],
)
def test_positions_are_read_from_a_model_s_folder(options, tmp_path, config, positions):
    (tmp_path / "config.json").write_text(config)
    options = dataclasses.replace(options, model=str(tmp_path))
    fits = {"window": 64, "calibration_length": 64, "speed_points": [[1, 63]]}
    find_jobs(options, fits)
    mend = "64 positions; --set window=null --set speed_points=null takes what fits"
    with contextlib.nullcontext() if positions is None else pytest.raises(Usage, match=mend):
        find_jobs(options, fits | {"window": 65, "speed_points": [[1, 64]]})


@pytest.fixture
def no_own_tasks(monkeypatch):
    """lm-eval without its thousands of tasks, which take seconds to read; those are what it was asked for."""
    manager, asked = tasks.TaskManager, []

    def make(include_path, include_defaults=True):
        asked.append(include_defaults)
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", make)
    return asked


def test_unknown_tasks_are_refused(options, no_own_tasks):
    for wrong, words in (("tiny_fact", "did you mean 'tiny_facts'"), ("nope", "unknown task 'nope'; there is ")):
        with pytest.raises(Usage, match=words):
            plan(options, {"tasks": ["tiny_copy", wrong]})
    with pytest.raises(Usage, match="unknown task 'tiny_copy'"):  # it comes with the data
        plan(dataclasses.replace(options, data="hub:org/name"), {"tasks": ["tiny_copy"]})
    no_own_tasks.clear()
    changes = {"tasks": ["tiny", "tiny_copy"]}  # a group, and one of its tasks
    jobs = plan(options, changes).todo
    assert no_own_tasks == [False]
    for job in jobs:
        Store(options.folder).write(Record(job.cell, "ok"))
    no_own_tasks.clear()
    assert plan(options, changes).todo == [] and no_own_tasks == []  # what is done had its tasks


@pytest.mark.parametrize("lost", ["protocols", "environment"])
def test_a_record_that_no_longer_says_how_it_was_measured_is_measured_again(options, lost):
    told = {"protocols": {"token_ppl": "windows of 512"}, "environment": {"machine": "m"}}
    for job in plan(options).todo:
        Store(options.folder).write(Record(job.cell, "ok", metrics={"token_ppl": Metric(5.0)}, **told))
    assert reasons(plan(options)) == ["done: ok"] * 2
    pattern = "protocols.json" if lost == "protocols" else "environments/*.json"
    for path in (options.folder / "records").rglob(pattern):
        path.unlink()
    assert reasons(plan(options)) == ["how it was measured is lost: attempt 2"] * 2


def test_a_probe_that_is_not_taken_any_more_is_a_changed_setting_and_no_more(options):
    end(options, "ok")
    (why,) = set(reasons(plan(dataclasses.replace(options, probes="memory"))))
    assert why == "changed: probes"
