"""What metrics mean: every one that is recorded is defined, once, in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from effbench.core.paths import PACKAGE
from effbench.probes import Reading
from effbench.records.definitions import DEFINITIONS, HEADLINES, Undefined, describe
from effbench.records.store import Store

RESULTS = PACKAGE.parent / "results"


def test_a_metric_without_a_definition_fails():
    reading = Reading()
    with pytest.raises(Undefined, match="'goodness' has no definition"):
        reading.add("goodness", 1.0, "as I like it")
    assert reading.metrics == {} == reading.protocols
    reading.add("flips", 0.25, "top1-changed", {"windows": 3})
    assert reading.metrics["flips"].findings == {"windows": 3}


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("token_ppl", "token_ppl"),
        ("tasks_acc", "tasks_acc"),  # not the task "tasks"
        ("tiny_facts_acc", "{task}_acc"),
        ("hellaswag_acc_norm", "{task}_acc_norm"),
        ("wikitext_word_ppl", "{task}_word_ppl"),
        ("gsm8k_exact_match_flexible-extract", "{task}_exact_match"),
        ("truthfulqa_gen_lm_eval_bleu_max", "{task}_lm_eval_{metric}"),
        ("prefill_speedup_b8_c128", "{phase}_speedup_b{batch}_c{context}"),
        ("decode_launch_overhead_ms_per_token_b1_c2", "decode_launch_overhead_ms_per_token_b{batch}_c{context}"),
        ("apply_peak_rss_bytes", "apply_peak_{peak}_bytes"),
        ("generate_peak_process_bytes", "generate_peak_{peak}_bytes"),
        ("score_peak_allocated_bytes", "score_peak_{peak}_bytes"),
    ],
)
def test_names_find_their_definition(name, pattern):
    assert describe(name).pattern == pattern


@pytest.mark.parametrize("name", ["", "ppl", "acc", "_acc", "prefill_speedup_b8", "prefill_speedup_bx_c1", "a b_acc"])
def test_other_names_have_none(name):
    with pytest.raises(Undefined):
        describe(name)


def test_definitions_are_whole_sentences_and_patterns_are_unique():
    patterns = [definition.pattern for definition in DEFINITIONS]
    assert len(set(patterns)) == len(patterns)
    for definition in DEFINITIONS:
        assert re.fullmatch(r"[A-Z].*\.", definition.meaning), definition
        assert describe(definition.pattern.replace("{", "").replace("}", "") if "{" not in definition.pattern else
                        sample(definition.pattern)) == definition  # fmt: skip


def sample(pattern: str) -> str:
    """A name of a pattern."""
    fields = {
        "batch": "1",
        "context": "2",
        "peak": "rss",
        "phase": "decode",
        "verb": "score",
        "task": "mmlu",
        "draws": "2",
        "place": "3",
        "collective": "all_reduce",
        "moment": "mean",
        "percent": "50",
    }
    return pattern.format(**fields, metric="bleu")


def test_headlines_are_defined():
    assert [describe(name).pattern for name in HEADLINES] == list(HEADLINES)


def test_every_name_that_a_probe_writes_down_is_defined():
    """Names without fields; those with fields are made up while measuring and checked by `Reading.add`."""
    names = {
        call.args[0].value
        for path in Path(PACKAGE / "probes").glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "add"
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }
    assert len(names) > 15
    for name in names:
        describe(name)


def test_every_published_metric_is_defined():
    records, _ = Store(RESULTS).read()
    names = {name for record in records for name in record.metrics}
    assert len(names) > 30
    for name in names:
        describe(name)
