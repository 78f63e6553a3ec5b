"""Every registered method passes the contract; exceptions are declared in the method's own class."""

import pytest

from effbench import checks
from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.recipe import parse_step

CHECKS = {check.__name__: check for check in checks.all_checks()}
CASES = [(key, name) for key in registry.catalog() for name in CHECKS]


@pytest.mark.parametrize(("key", "name"), CASES, ids=[f"{key}-{name}" for key, name in CASES])
def test_contract(key, name, request):
    cls = registry.load(key)
    method = cls(**cls.trials[0])
    if name in method.exceptions:
        request.applymarker(pytest.mark.xfail(reason=method.exceptions[name], strict=True))
    CHECKS[name](method)


VARIANTS = [(key, settings) for key in registry.catalog() for settings in registry.load(key).trials[1:]]


@pytest.mark.parametrize(("key", "settings"), VARIANTS, ids=lambda value: str(value))
def test_variants_pack_and_save(key, settings):
    method = registry.load(key)(**settings)
    for check in checks.PACKING:
        check(method)


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rtn.py").write_text('"""A second RTN."""\nclass RTN: pass\n')
    monkeypatch.setenv("EFFBENCH_METHODS", str(tmp_path))
    with pytest.raises(Usage, match="two methods are called 'rtn'"):
        registry.catalog()


def test_a_broken_file_names_itself_and_leaves_the_others_usable(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "bad.py").write_text("import nowhere_to_be_found\nclass Bad: pass\n")
    monkeypatch.setenv("EFFBENCH_METHODS", str(tmp_path))
    with pytest.raises(Usage, match=r"bad\.py cannot be imported.*nowhere_to_be_found"):
        registry.load("bad")
    assert str(parse_step("rtn(bits=3)")) == "rtn(bits=3)"


def test_presets_are_recipes():
    from effbench.core.recipe import parse

    for name, steps in registry.presets().items():
        assert parse(f"{name}()").steps == parse(steps).steps


SHARES = [
    (key, name) for key, entry in registry.catalog().items() for name in ("keep", "budget") if name in entry.parameters
]


@pytest.mark.parametrize(("key", "name"), SHARES)
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_what_keeps_nothing_or_more_than_all_is_wrong_usage(key, name, value):
    """A budget is a number of tokens, a share is one of what there is."""
    with pytest.raises(Usage, match=name):
        parse_step(f"{key}({name}={value})")
