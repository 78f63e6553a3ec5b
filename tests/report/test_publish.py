"""`effbench publish`: what may be published, and what it takes the place of."""

import dataclasses
import functools
import json

import pytest
import yaml
from fake_records import make, store_records

from effbench import publish as publishing
from effbench.cells import suite as suites
from effbench.cells.lock import check_locked, write_lock
from effbench.cells.stale import is_stale
from effbench.core.errors import Usage
from effbench.core.recipe import parse
from effbench.publish import choose, publish
from effbench.records.record import OUTCOMES, RETRIED
from effbench.records.store import Store
from effbench.report.pages import check, load

ROWS = [{"name": "rtn-4b", "steps": "rtn(bits=4)"}, {"name": "gptq-4b", "steps": "gptq(bits=4)"}]


def written(folder, version=1, **tier):
    """A suite file of two rows, one of which is measured on two seeds."""
    body = {
        "name": "small", "version": version, "description": "", "recipes": ROWS,
        "tiers": {"quick": {"seeds": [0, 1], "settings": {"probes": ["cost", "quality"], "limit": 8}} | tier},
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(body))
    return str(folder / "small.yaml")


SETTINGS = {
    "probes": ["cost", "quality"], "limit": 8, "calibration_sequences": 128,
    "threads": 1, "dtype": "float32", "device": "cpu", "machine": "m",
}  # fmt: skip
CLEAN = {"machine": "m", "host": "aa", "commit": "a" * 40, "dirty": False}


def cell(name, steps, seed, **changes):
    recipe = parse(steps)
    options = {"suite": "small", "steps": str(recipe), "resolved": tuple(recipe.resolved()), "settings": SETTINGS}
    return make(name, seed, **options | {"environment": CLEAN, "bits": 4.0 if steps else 16.0} | changes)


def complete(**changes):
    """Own records of the whole tier: the baseline and rtn have one seed, as nothing of them depends on it."""
    rows = [
        ("baseline", "", 0),
        ("rtn-4b", "rtn(bits=4)", 0),
        ("gptq-4b", "gptq(bits=4)", 0),
        ("gptq-4b", "gptq(bits=4)", 1),
    ]
    return [cell(*row, **changes) for row in rows]


def fresh(record):
    return False


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The suite, locked, in a checkout without changes."""
    monkeypatch.setattr(publishing, "source", lambda: {"commit": "a" * 40, "dirty": False})
    path = written(tmp_path)
    write_lock(tmp_path)
    monkeypatch.setattr(publishing, "check_locked", functools.partial(check_locked, folder=tmp_path))
    return path


def runs(tmp_path, records):
    return store_records(tmp_path / "runs", records).results


def test_a_complete_tier_is_published(small, tmp_path):
    extra = [cell("mine", "nf4()", 0), cell("gptq-4b", "gptq(bits=4)", 7)]  # no row and no seed of the suite
    results = tmp_path / "results"
    own = runs(tmp_path, [*complete(), *extra])
    (own / "records" / "small" / "v1" / "cut.json").write_text("{")
    (publication,), changed = publish(small, own, results, stale=fresh)
    assert str(publication) == "small v1, quick tier, model tiny" and len(publication.records) == 4
    assert {(r.cell.recipe, r.cell.seed) for r in load(results, "small")} == {
        ("baseline", 0), ("rtn-4b", 0), ("gptq-4b", 0), ("gptq-4b", 1),
    }  # fmt: skip
    assert {path.name for path in changed} == {"small.json", "small.md", "small.csv"}
    assert check(results) == []
    assert publish(small, own, results, stale=fresh)[1] == []


def test_a_tier_with_data_of_its_own_is_published_on_them_alone(small, tmp_path):
    written(tmp_path, version=2, data="speeches")
    write_lock(tmp_path)
    elsewhere = runs(tmp_path / "tiny", complete(suite_version=2))
    with pytest.raises(Usage, match="no own records with the settings of the suite"):
        publish(small, elsewhere, tmp_path / "results", stale=fresh)
    (publication,), _ = publish(
        small, runs(tmp_path, complete(suite_version=2, data="speeches")), tmp_path / "results", stale=fresh
    )
    assert {record.cell.data for record in publication.records} == {"speeches"}


def test_a_publication_takes_the_place_of_the_one_before(small, tmp_path):
    results = tmp_path / "results"
    publish(small, runs(tmp_path, complete()), results, stale=fresh)
    other_tier = make("baseline", suite="small", tier="full")
    Store(results).write(other_tier)
    Store(results).write(make("baseline", suite="other"))
    edited = [
        dataclasses.replace(
            r, cell=dataclasses.replace(r.cell, digests=r.cell.digests | {"open": "2"}), started="2027-01-01"
        )
        for r in complete()
    ]
    publish(small, runs(tmp_path, edited), results, stale=fresh)
    assert {record.cell.digests.get("open") for record in load(results, "small") if record.cell.tier == "quick"} == {
        "2"
    }
    assert len(load(results, "small")) == 5 and len(load(results, "other")) == 1


def test_measuring_again_replaces_what_was_published(small, tmp_path):
    """The same cells with other numbers: identities do not change, and yet the new ones count."""
    results = tmp_path / "results"
    publish(small, runs(tmp_path, complete()), results, stale=fresh)
    again = complete(worse=0.25, attempt=2)
    publish(small, runs(tmp_path, again), results, stale=fresh)
    published = {record.name: record.metrics["token_ppl"].value for record in load(results, "small")}
    assert published == {record.name: record.metrics["token_ppl"].value for record in again}
    assert [path.name for path in (results / "records" / "small" / "v1").glob("*.parquet")] == ["quick.parquet"]


def test_a_new_version_replaces_the_old_one(small, tmp_path):
    results = tmp_path / "results"
    publish(small, runs(tmp_path, complete()), results, stale=fresh)
    written(tmp_path, version=2, settings={"probes": ["cost", "quality"], "limit": 9})
    write_lock(tmp_path)
    own = runs(tmp_path, complete(suite_version=2, settings=SETTINGS | {"limit": 9}))
    publish(small, own, results, stale=fresh)
    assert {record.cell.suite_version for record in load(results, "small")} == {2}
    assert [path.name for path in (results / "records" / "small").iterdir()] == ["v2"]


def test_a_row_that_was_renamed_is_published_by_its_present_name(small, tmp_path):
    own = [*complete()[:1], cell("rtn-old", "rtn(bits=4)", 0), *complete()[2:]]
    (publication,) = choose(suites.load(small), own, None, fresh)
    assert [record.cell.recipe for record in publication.records] == ["baseline", "rtn-4b", "gptq-4b", "gptq-4b"]


def spoil(index, **changes):
    def act(records):
        return [dataclasses.replace(r, **changes) if i == index else r for i, r in enumerate(records)]

    return act


def moved(index, **settings):
    def act(records):
        cells = [dataclasses.replace(r.cell, settings=r.cell.settings | settings) for r in records]
        return [
            dataclasses.replace(r, cell=c) if index in (i, None) else r
            for i, (r, c) in enumerate(zip(records, cells, strict=True))
        ]

    return act


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[:-1], "gptq-4b seed 1 not measured by the present source; `effbench run"),
        (lambda records: records[1:], "baseline seed 0 not measured"),
        (lambda records: records[:1], "rtn-4b seed 0, gptq-4b seed 0, gptq-4b seed 1 not measured"),
        (lambda records: [], "no own records of small v1"),
        (lambda records: [cell("rtn-4b", "rtn(bits=4)", 0, suite_version=2)], "no own records of small v1"),
        (spoil(1, environment=CLEAN | {"dirty": True}), "rtn-4b seed 0 measured with changes that are not committed"),
        (spoil(1, environment={"machine": "m", "host": "aa"}), "or by an installed package"),
        (
            spoil(1, environment=CLEAN | {"host": "bb"}),
            "several hosts, or with several settings of one: aa (3 cells), bb (",
        ),
        (moved(None, limit=9), "no own records with the settings of the suite"),
        (moved(None, dtype="bfloat16"), "no own records with the settings of the suite"),
        (moved(3, threads=2), "several hosts, or with several settings of one"),
        *((spoil(2, outcome=outcome), "gptq-4b seed 0 did not end and would be tried again") for outcome in RETRIED),
    ],
)
def test_what_is_not_fit_is_refused_with_one_line(small, tmp_path, change, message):
    own = change(complete())
    with pytest.raises(Usage) as caught:
        choose(suites.load(small), own, None, fresh)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("outcome", sorted(set(OUTCOMES) - set(RETRIED)))
def test_final_outcomes_are_published(small, outcome):
    assert choose(suites.load(small), spoil(2, outcome=outcome)(complete()), None, fresh)


def test_a_baseline_of_another_host_is_not_published(small):
    """A table may show it, without its speed; the publication has to have its own."""
    own = spoil(0, environment=CLEAN | {"host": "bb"})(complete())
    with pytest.raises(Usage, match="baseline seed 0 not measured"):
        choose(suites.load(small), own, None, fresh)


def test_data_of_another_kind_is_not_that_of_the_suite(small):
    with pytest.raises(Usage, match="no own records with the settings of the suite"):
        choose(suites.load(small), complete(data="text:a"), None, fresh)


def test_stale_records_are_refused(small, tmp_path):
    with pytest.raises(Usage, match="rtn-4b seed 0 measured by another source, model or data than the present"):
        choose(suites.load(small), complete(), None, lambda record: record.cell.recipe == "rtn-4b")
    with pytest.raises(Usage, match="and 1 more cells measured by another source"):
        choose(suites.load(small), complete(), None, is_stale)  # digests of synthetic records are those of no source


def test_a_working_tree_with_changes_is_refused(small, monkeypatch):
    monkeypatch.setattr(publishing, "source", lambda: {"commit": "a" * 40, "dirty": True})
    with pytest.raises(Usage, match="changes that are not committed"):
        choose(suites.load(small), complete(), None, fresh)


def test_a_suite_that_is_not_locked_is_refused(small, tmp_path):
    written(tmp_path, settings={"probes": ["cost", "quality"], "limit": 9})
    with pytest.raises(Usage, match="limit of the quick tier changed; raise `version:`"):
        choose(suites.load(small), complete(), None, fresh)
    (tmp_path / "lock.json").unlink()
    with pytest.raises(Usage, match="run `effbench lock` first"):
        choose(suites.load(small), complete(), None, fresh)


def test_the_tier_is_named_where_there_are_several(small, tmp_path):
    both = {"quick": {"settings": {"limit": 8}}, "full": {"settings": {"limit": 9}}}
    body = yaml.safe_load((tmp_path / "small.yaml").read_text()) | {"tiers": both, "version": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(body))
    write_lock(tmp_path)
    chosen = suites.load(small)
    own = [cell("baseline", "", 0, suite_version=2, tier=tier) for tier in both]
    with pytest.raises(Usage, match="tier=: there are own records of full and quick; name the one to publish"):
        choose(chosen, own, None, fresh)
    with pytest.raises(Usage, match="tier=fast: small has full and quick"):
        choose(chosen, own, "fast", fresh)


def test_nothing_changes_where_something_is_refused(small, tmp_path):
    results = tmp_path / "results"
    publish(small, runs(tmp_path, complete()), results, stale=fresh)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    (tmp_path / "runs" / "records" / "small" / "v1" / complete()[1].name).unlink()
    with pytest.raises(Usage):
        publish(small, tmp_path / "runs", results, stale=fresh)
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_the_command(small, tmp_path, monkeypatch, capsys):
    from effbench.cli.main import main

    monkeypatch.setattr(publishing, "is_stale", fresh)
    own, results = runs(tmp_path, complete()), tmp_path / "results"
    assert main(["publish", f"suite={small}", f"runs={own}", f"results={results}"]) == 0
    assert "published small v1, quick tier, model tiny: 4 records" in capsys.readouterr().out
    assert json.loads((results / "statistics" / "small.json").read_text())["rows"]
    for words, message in (
        ([], "suite=: name the suite"),
        (["suite=quan"], "unknown suite 'quan'"),
        ([f"suite={small}", f"runs={tmp_path / 'none'}"], "no records of suite"),
        ([f"suite={small}", "results=a\0b"], "must be text"),
        ([f"suite={small}", f"runs={own}", "tier=fast"], "tier=fast: small has quick"),
    ):
        assert main(["publish", *words]) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and out == ""
