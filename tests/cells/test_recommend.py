"""`effbench recommend`: from planted quality and predicted bytes, cheapest first, and what it does not know."""

import dataclasses
import json

import pytest
from fake_records import make, store_records

from effbench import recommend as recommending
from effbench.cells.predict import PlanOptions, predict
from effbench.cli.main import main
from effbench.core.errors import Usage
from effbench.recommend import RecommendOptions, foretell, parse_drop, recommend
from effbench.records.record import Metric

SPEED = {"decode_tok_per_s_b1_c128": Metric(200.0), "prefill_tok_per_s_b1_c128": Metric(4000.0)}
RECORDS = [
    make(),
    make("rtn(bits=8)", worse=0.002, bits=8.25, rng_seed=1),
    make("rtn()", worse=0.008, bits=4.25, rng_seed=2),
    make("rtn(bits=2)", worse=0.9, wrong=40, bits=2.25, rng_seed=3),
    make("fp8_weight()", worse=0.0, bits=8.0, simulated=True),
    make("lora(), fit()", worse=-0.2, rng_seed=4),
    make("nosuch(bits=4)", worse=0.0, rng_seed=5),
]


KNOWN = {}


@pytest.fixture(autouse=True)
def foretell_once(monkeypatch):
    """Each recipe is rehearsed once in this file."""

    def look_up(source, steps, batch, context):
        key = source.name, str(steps), batch, context
        if key not in KNOWN:
            KNOWN[key] = foretell(source, steps, batch, context)
        return KNOWN[key]

    monkeypatch.setattr(recommending, "foretell", look_up)


def ask(records=RECORDS, **options):
    return recommend(RecommendOptions(**{"model": "tiny", "memory": "1GB", "context": 64} | options), records)


def test_within_both_budgets_and_cheapest_first():
    answer = ask(quality_drop="2%")
    assert [one.recipe for one in answer.advice] == ["rtn()", "rtn(bits=8)", "16 bits"]
    assert all(one.fits and not one.outcome for one in answer.advice)
    assert [one.row.recipe for one in answer.beyond] == ["rtn(bits=2)"]
    assert 0.5 < answer.advice[0].drop < 1.1 and answer.advice[0].sure and answer.advice[0].most > answer.advice[0].drop
    totals = [one.total for one in answer.advice]
    assert totals == sorted(totals)


def test_bytes_are_those_of_plan():
    (advice,) = [one for one in ask(batch=3).advice if one.recipe == "rtn()"]
    (planned,) = predict(PlanOptions(recipe="rtn()", model="tiny", batch=3, context=64))
    assert (advice.weights, advice.cache) == (planned.held.resident, planned.held.cache)
    baseline = next(one for one in ask(batch=3).advice if one.recipe == "16 bits")
    assert baseline.weights == planned.held.opened and baseline.cache == planned.held.cache


def test_what_does_not_fit_comes_last():
    whole = {one.recipe: one.total for one in ask().advice}
    answer = ask(memory=f"{(whole['rtn()'] + whole['rtn(bits=8)']) // 2}B")
    assert [(one.recipe, one.fits) for one in answer.advice] == [
        ("rtn()", True), ("rtn(bits=8)", False), ("16 bits", False),
    ]  # fmt: skip


def test_a_loss_that_may_be_larger_is_said_to_be():
    """0.8 % is within 0.9 %, and the end of its interval is not."""
    (sure,) = [one for one in ask(quality_drop="2%").advice if one.recipe == "rtn()"]
    (unsure,) = [one for one in ask(quality_drop=f"{(sure.drop + sure.most) / 2:.4f}%").advice if one.recipe == "rtn()"]
    assert sure.sure and not unsure.sure


def test_accuracy_counts_too():
    """40 of 120 answers fewer are 33 points, whatever perplexity does."""
    records = [make(), make("rtn()", wrong=40, bits=4.25, rng_seed=2)]
    answer = ask(records, quality_drop="5%")
    (lost,) = answer.beyond
    assert lost.metric == "tasks_acc" and lost.drop == pytest.approx(100 / 3)


def test_speed_is_of_the_model_and_the_device_that_were_asked_for():
    timed = dataclasses.replace(RECORDS[2], metrics=RECORDS[2].metrics | SPEED)
    records = [timed if one is RECORDS[2] else one for one in RECORDS]
    (found,) = [one.speed for one in ask(records, device="ACME").advice if one.recipe == "rtn()"]
    assert (found.tokens_per_s, found.first_token_ms, found.point, found.machine) == (
        200.0, pytest.approx(32.0), "b1 c128", "acme-cpu-2core",
    )  # fmt: skip
    assert not ask(records, device="h100").timed and ask(records).timed
    other = [dataclasses.replace(one, cell=dataclasses.replace(one.cell, model="smollm2")) for one in records]
    answer = ask(other)
    assert answer.measured_on == "smollm2" and not answer.timed


def test_quality_is_of_the_model_else_of_a_real_one():
    def move(tier, model):
        return [make(one.cell.recipe, worse=0.001 * k, tier=tier, model=model) for k, one in enumerate(RECORDS[:3])]

    real, tiny = move("real", "smollm2"), move("full", "tiny")
    assert ask(real + tiny).measured_on == "tiny"
    assert ask(real + tiny, model="shape:deep-tiny").measured_on == "smollm2"
    assert ask(real + tiny, model="shape:deep-tiny", measured_on="tiny").measured_on == "tiny"


def test_the_command(tmp_path, capsys):
    results = store_records(tmp_path / "results", RECORDS).results
    words = ["recommend", "model=shape:deep-tiny", "quality_drop=2%", "context=64", f"results={results}", "rows=rtn*"]
    assert main([*words, "memory=1GB"]) == 0
    out = capsys.readouterr().out
    assert "Cheapest: rtn()." in out and "No record times shape:deep-tiny on any device" in out
    assert "No record tells quality of shape:deep-tiny: what another model loses need not hold" in out
    assert "Beyond the loss allowed, nearest first: rtn(bits=2)" in out
    assert main([*words, "memory=1kB"]) == 1
    assert "Nothing that loses so little fits" in capsys.readouterr().out
    assert main([*words, "memory=1GB", "--json", "device=h100"]) == 0
    body = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert body["advice"][0]["recipe"] == "rtn()" and body["beyond"][0]["recipe"] == "rtn(bits=2)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["memory=24GB"], "name the model and the memory"),
        (["model=tiny", "memory=24XB"], "memory=24XB: must be a size such as 24GB"),
        (["model=tiny", "memory=1GB", "quality_drop=little"], "quality_drop=little: must be a share in percent"),
        (["model=shape:lama", "memory=1GB"], "shape"),
        (["model=tiny", "memory=1GB", "measured_on=tinny"], "did you mean 'tiny'"),
        (["model=tiny", "memory=1GB", "rows=qqq"], "no row of rows=qqq of tiny without training"),
        (["model=tiny", "memory=1GB", "context=0"], "context=0: must be a whole number from 1 up"),
    ],
)
def test_wrong_usage_costs_one_line(tmp_path, capsys, words, message):
    results = store_records(tmp_path / "results", RECORDS).results
    assert main(["recommend", *words, f"results={results}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_records_without_quality_are_no_ground():
    with pytest.raises(Usage, match="no record tells quality"):
        ask([make(metrics={"stored_bytes": Metric(1.0)}, samples={})])


@pytest.mark.parametrize(("text", "percent"), [("1%", 1.0), ("0.5", 0.5), (" 2 % ", 2.0)])
def test_percent(text, percent):
    assert parse_drop(text) == percent
