"""Every registered method passes the contract; exceptions are declared in the method's own class."""

import pytest

from effbench import checks
from effbench.core import registry
from effbench.core.errors import Usage
from effbench.core.recipe import parse_step

CASES = [(key, name) for key in registry.catalog() for name in checks.all_checks()]


@pytest.mark.parametrize(("key", "name"), CASES, ids=[f"{key}-{name}" for key, name in CASES])
def test_contract(key, name, request):
    cls = registry.load(key)
    method = cls(**cls.trial)
    if name in method.exceptions:
        request.applymarker(pytest.mark.xfail(reason=method.exceptions[name], strict=True))
    checks.all_checks()[name](method)


# Settings whose code differs from the defaults'; each passes the checks of packing and saving.
VARIANTS = [
    *(f"rtn(bits={bits})" for bits in (2, 3, 8)),
    "rtn(granularity='tensor', bits=8)",
    "rtn(granularity='channel', symmetric=True)",
    "rtn(grid='awq')",
    "gptq(bits=3, act_order=True)",
    "gptq(bits=2, group_size=None)",
    "gptq(static_groups=True, act_order=True, symmetric=True)",
    "gptq(true_sequential=True, mse=True)",
    "awq(bits=3)",
    "quip_sharp(bits=3, tune_iters=1)",
    "quip_sharp(bits=4, tune_iters=0)",
    "nf4(double_quant=True)",
    "squeezellm(bits=3)",
    "fp8_weight(granularity='tensor', activations=False)",
    "magnitude(scope='global')",
    "wanda(pattern='4:8')",
    "wanda(pattern='block:16x16')",
    "sparsegpt(pattern='2:4', bits=4)",
    "gmp(pattern='2:4')",
    "gmp(pattern='block:16x16')",
    "movement(pattern='2:4')",
    "learned_mask(pattern='unstructured')",
]


@pytest.mark.parametrize("step", VARIANTS)
def test_variants_pack_and_save(step):
    method = parse_step(step)
    checks.check_linear_protocol(method)
    checks.check_save_and_load(method)


def test_the_index_in_the_docs_is_the_registry():
    from effbench.report import methods as docs

    assert docs.main({"check": True}) == 0


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
