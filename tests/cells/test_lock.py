"""The lock: a suite that changes its meaning needs a new version."""

import json

import pytest
import yaml

from effbench.cells.lock import FILE, check_lock, read_lock, write_lock
from effbench.cli.commands import lock as command
from effbench.cli.main import main
from effbench.core.errors import Usage
from effbench.core.paths import SUITES

BODY = {
    "name": "small", "version": 1, "description": "a",
    "recipes": [{"name": "rtn-{bits}b", "steps": "rtn(bits={bits})", "sweep": {"bits": [4, 8]}}],
    "tiers": {
        "quick": {"recipes": ["rtn-4b"], "settings": {"limit": 8}},
        "full": {"seeds": [0, 1], "settings": {"limit": 9}},
    },
}  # fmt: skip


def save(folder, **changes):
    (folder / "small.yaml").write_text(yaml.safe_dump(BODY | changes))


@pytest.fixture
def folder(tmp_path):
    """A folder with a locked suite."""
    save(tmp_path)
    assert write_lock(tmp_path)
    return tmp_path


def test_the_suites_that_ship_are_locked():
    assert check_lock() == []


def test_what_is_locked_checks_out_and_is_written_once(folder):
    assert check_lock(folder) == [] and not write_lock(folder)
    save(folder, description="other words")
    assert check_lock(folder) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipes": [{"name": "rtn-4b", "steps": "rtn(bits=3)"}]}, "row rtn-4b of the quick tier has changed"),
        ({"recipes": [{"name": "rtn-4b", "steps": "rtn(bits=4)"}]}, "row rtn-8b of the full tier is gone"),
        (
            {"tiers": BODY["tiers"] | {"full": {"seeds": [0], "settings": {"limit": 9}}}},
            "seeds of the full tier changed",
        ),
        ({"tiers": BODY["tiers"] | {"full": {"seeds": [0, 1]}}}, "limit of the full tier changed"),
        ({"tiers": {"quick": BODY["tiers"]["quick"]}}, "the full tier is gone"),
        ({"settings": {"speed_new_tokens": 16}}, "speed_new_tokens of the quick tier changed"),
        (
            {
                "tiers": BODY["tiers"]
                | {"full": {"models": ["shape:llama-3.2-1b"], "seeds": [0, 1], "settings": {"limit": 9}}}
            },
            "models of the full tier changed",
        ),
        (
            {"tiers": BODY["tiers"] | {"quick": BODY["tiers"]["quick"] | {"data": "speeches"}}},
            "data of the quick tier changed",
        ),
    ],
)
def test_a_change_without_a_new_version_is_named_with_its_mend(folder, changes, message):
    locked = (folder / FILE).read_text()
    save(folder, **changes)
    (complaint,) = check_lock(folder)
    assert complaint.startswith("suite small v1: ") and message in complaint
    assert complaint.endswith("raise `version:` in its file, or undo the change")
    with pytest.raises(Usage, match=message):
        write_lock(folder)
    assert (folder / FILE).read_text() == locked
    save(folder, **changes, version=2)
    assert check_lock(folder) == ["suite small v2: new rows or a new version; run `effbench lock`"]
    assert write_lock(folder) and check_lock(folder) == []


def test_a_default_that_changes_is_a_change(folder, monkeypatch):
    """The row reads as before and means something else."""
    from effbench.core.recipe import Recipe

    before = Recipe.resolved
    monkeypatch.setattr(Recipe, "resolved", lambda self: [step | {"group_size": 7} for step in before(self)])
    (complaint,) = check_lock(folder)
    assert "row rtn-4b of the quick tier has changed" in complaint


def test_a_parameter_that_a_method_gains_is_no_change(folder, monkeypatch):
    """The row does what it did; a new version knows the parameter, and then its default counts."""
    from effbench.core.recipe import Recipe

    before = Recipe.resolved

    def gain(rounds):
        monkeypatch.setattr(Recipe, "resolved", lambda self: [step | {"rounds": rounds} for step in before(self)])

    gain(1)
    assert check_lock(folder) == [] and not write_lock(folder)
    save(folder, version=2)
    assert write_lock(folder) and check_lock(folder) == []
    assert "rounds" in read_lock(folder)["small"]["parameters"]["rtn"]
    gain(2)
    assert "row rtn-4b of the quick tier has changed" in check_lock(folder)[0]
    monkeypatch.setattr(Recipe, "resolved", before)
    assert "row rtn-4b of the quick tier has changed" in check_lock(folder)[0]  # it is gone


def test_a_row_may_be_added(folder):
    save(folder, recipes=[*BODY["recipes"], {"name": "nf4", "steps": "nf4()"}])
    assert check_lock(folder) == ["suite small v1: new rows or a new version; run `effbench lock`"]
    assert write_lock(folder) and check_lock(folder) == []


def test_a_version_never_goes_back(folder):
    save(folder, version=2)
    write_lock(folder)
    save(folder, version=1)
    assert "version 2 was there before" in check_lock(folder)[0]


def test_a_suite_that_is_no_more_is_named(folder):
    (folder / "small.yaml").unlink()
    assert check_lock(folder) == ["suite small: is no more; run `effbench lock`"]
    assert write_lock(folder) and read_lock(folder) == {}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"small": 1}',
        '{"small": {"version": 1}}',
        '{"small": {"version": 1, "parameters": {}, "tiers": {"quick": {}}}}',
        '{"small": {"version": 1, "tiers": {}}}',
    ],
)
def test_a_lock_that_cannot_be_read_is_usage(folder, text):
    (folder / FILE).write_text(text)
    with pytest.raises(Usage, match=r"lock.json: is not what `effbench lock` writes"):
        check_lock(folder)


def test_the_command(monkeypatch, capsys):
    assert main(["lock", "--check"]) == 0
    monkeypatch.setattr(
        "effbench.cells.lock.read_lock",
        lambda folder: {"quant": json.loads((SUITES / FILE).read_text())["quant"] | {"version": 99}},
    )
    assert main(["lock", "--check"]) == 1
    assert "suite quant v1: version 99 was there before" in capsys.readouterr().err
    monkeypatch.setattr("effbench.core.paths.CHECKOUT", None)
    assert main(["lock"]) == 2 and command
