"""Presets: their parameters go to the one step that has them, and what a record holds are the steps."""

from __future__ import annotations

import pytest

from effbench.core import registry
from effbench.core.errors import Conflict, Usage
from effbench.core.recipe import parse, preset_parameters

PRESETS = {
    "small": "rtn(bits=2, group_size=32), lora(rank=4), fit()",
    "twice": "rtn(bits=4), gptq(bits=3)",
    "outer": "small(rank=8), twice()",
    "bare": "bf16()",
}


@pytest.fixture(autouse=True)
def _presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "presets", lambda: PRESETS)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("small()", "rtn(bits=2, group_size=32), lora(rank=4), fit()"),
        ("small(rank=8)", "rtn(bits=2, group_size=32), lora(rank=8), fit()"),
        ("small(group_size=64, steps=5, alpha=1)", "rtn(bits=2, group_size=64), lora(rank=4, alpha=1), fit(steps=5)"),
        ("wanda(), small(lr=(0.1, 0.2)), bf16()", "wanda(), rtn(bits=2, group_size=32), lora(rank=4), "
         "fit(lr=(0.1, 0.2)), bf16()"),
        ("outer()", "rtn(bits=2, group_size=32), lora(rank=8), fit(), rtn(bits=4), gptq(bits=3)"),
        ("outer(rank=2)", "rtn(bits=2, group_size=32), lora(rank=2), fit(), rtn(bits=4), gptq(bits=3)"),
        ("bare()", "bf16()"),
    ],
)  # fmt: skip
def test_a_parameter_goes_to_the_step_that_has_it(text: str, steps: str) -> None:
    recipe, expected = parse(text), parse(steps)
    assert recipe.steps == expected.steps and recipe.name == text
    assert str(recipe) == str(expected) and recipe.resolved() == expected.resolved()  # what records hold


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("small(rnk=8)", r"small\(rnk=8\): no parameter 'rnk'; did you mean 'rank'\?"),
        ("bare(rank=8)", "no parameter 'rank'; there is none"),
        (
            "twice(bits=3)",
            r"twice\(bits=3\): bits may be rtn.bits and gptq.bits: write the steps out, rtn\(bits=4\), gp",
        ),
        ("outer(bits=3)", "bits may be rtn.bits and rtn.bits and gptq.bits"),
        ("small(8)", "arguments must be named; the parameters are .*rank"),
        ("small(rank=8, rank=9)", "rank is given twice"),
        ("small(**{})", r"\*\* is not allowed"),
        ("small(rank=open('x'))", r"rank=open\('x'\) is not a literal; it must be a whole number"),
        ("small(targets=all)", r"targets=all is not a literal; write targets='all'"),
        ("small(rank='8')", "lora.rank='8': must be a whole number"),
        ("small(rank=0)", r"lora\(rank=0\): rank must be at least 1"),
        ("smal()", "unknown method 'smal'; did you mean 'small'"),
    ],
)
def test_wrong_parameters(text: str, words: str) -> None:
    with pytest.raises(Usage, match=words):
        parse(text)


def test_a_slot_that_two_presets_write_is_a_conflict() -> None:
    with pytest.raises(Conflict, match=r"train\.precision"):
        parse("bare(), bare()")


def test_what_a_preset_takes_has_its_own_defaults() -> None:
    takes = {parameter.name: (step, parameter.default) for step, parameter in preset_parameters("small")}
    assert takes["rank"] == ("lora", "4") and takes["group_size"] == ("rtn", "32") and takes["steps"] == ("fit", "200")
    assert takes["dropout"] == ("lora", "0.0")
    several = {parameter.name for _, parameter in preset_parameters("twice")}
    assert "bits" not in several and "act_order" in several
    outer = {parameter.name: (step, parameter.default) for step, parameter in preset_parameters("outer")}
    assert outer["rank"] == ("lora", "8") and "bits" not in outer
    assert preset_parameters("bare") == []
    for name in PRESETS:
        for _, parameter in preset_parameters(name):
            assert parameter.default is not None
            assert parse(f"{name}({parameter.name}={parameter.default})").steps == parse(f"{name}()").steps


def test_qlora_is_what_its_authors_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    quantized, adapted, paged, precision = parse("qlora()").steps
    assert (quantized.key, quantized.block, quantized.double_quant) == ("nf4", 64, True)  # type: ignore[attr-defined]
    assert (adapted.key, adapted.rank, adapted.alpha, adapted.dropout) == ("lora", 64, 16, 0.1)  # type: ignore[attr-defined]
    assert (adapted.targets, adapted.merge) == ("all", "separate")  # type: ignore[attr-defined]
    assert (paged.key, paged.bits, precision.key) == ("paged_adamw", 32, "bf16")  # type: ignore[attr-defined]
    assert str(parse("qlora(rank=8, bits=8)")) == (
        "nf4(double_quant=True), lora(rank=8, dropout=0.1, merge='separate', alpha=16.0), paged_adamw(bits=8), bf16()"
    )
