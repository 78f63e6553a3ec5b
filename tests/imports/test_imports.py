"""Results of other tools as records: what is taken, what is left out, and that they stay apart."""

import json

import pytest
from fake_records import make, store_records
from imports_files import STAMP, make_benchmark, make_comparison, write_harness

from effbench.cli.main import main
from effbench.imports import import_results
from effbench.imports.found import Names
from effbench.records.definitions import describe
from effbench.records.imported import is_imported
from effbench.records.store import Store
from effbench.report.groups import group_records
from effbench.stats import intervals

NONE = Names()


def read(path):
    (record,) = import_results(path, NONE)
    assert is_imported(record) and all(map(describe, record.metrics))
    return record


def dump(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))
    return path


# ---- lm-eval ------------------------------------------------------------------------------------


def test_the_harness_with_its_samples(tmp_path):
    record = read(write_harness(tmp_path / "org__model"))
    cell = record.cell
    assert (cell.suite, cell.tier, cell.model, cell.recipe, cell.seed) == (
        "lm-eval", "imported", "org/model", "org/model", 7,
    )  # fmt: skip
    assert record.samples["quiz_acc"] == [1, 0, 1, 1]  # in the order of the documents
    assert record.metrics["quiz_acc"] == intervals.fraction([1, 0, 1, 1])
    assert record.metrics["book_word_ppl"].value == pytest.approx(28.0316249)  # e to the 100 nats over 30 words
    assert record.protocols["quiz_acc"] == (
        "lm-eval 0.4.13, task quiz v1.0, 5-shot, acc, filter none, 4 of 100 items, no chat template, "
        "prompts abababababab"
    )
    assert record.metrics["quiz_f1"].value == 0.4 and "quiz_f1" not in record.samples  # no mean of its items
    assert record.metrics["quiz_lm_eval_brier_score"].value == 0.3
    assert record.facts["imported"]["left_out"] == ["all (a mean over tasks)"]
    assert record.started.startswith("2026-01-02T03:04:05") and record.seconds == 12.5
    assert "results per item" not in record.facts["missing"] and "speed" in record.facts["missing"]


def test_the_harness_without_samples_has_the_interval_of_its_error(tmp_path):
    record = read(write_harness(tmp_path, samples=False))
    metric = record.metrics["quiz_acc"]
    assert (metric.value, metric.low, metric.high, metric.n) == (0.75, pytest.approx(0.75 - 1.96 * 0.25, 1e-3), 1.0, 4)
    assert record.metrics["sums_exact_match"].value == 0.5  # of the first filter; others have its name
    assert record.metrics["sums_exact_match_loose"].value == 0.75
    assert "results per item" in record.facts["missing"]
    assert record.facts["caveats"][0].startswith("imported from lm-eval 0.4.13; without size, memory, speed")


def test_samples_of_another_run_are_refused(tmp_path, capsys):
    path = write_harness(tmp_path, share=0.5)
    assert main(["import", str(path), f"results={tmp_path / 'runs'}"]) == 2
    assert "quiz_acc is 0.5, and 0.75 by the samples beside it: of another run" in capsys.readouterr().err


def test_two_results_of_one_model_are_compared_by_item(tmp_path, capsys):
    runs = tmp_path / "runs"
    right = [1] * 60 + [0] * 40
    wrong = [0] * 40 + [1] * 20 + [0] * 40
    for name, answers in (("dense", right), ("four-bits", wrong)):
        path = write_harness(tmp_path / name, answers=answers, model=f"org/{name}")
        assert main(["import", str(path), f"recipe={name}", "model=small", f"results={runs}"]) == 0
    capsys.readouterr()
    assert main(["compare", "dense", "four-bits", f"results={runs}", "fail_on=worse"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "quiz_acc" in line)
    assert "| 40, 0 |" in line.replace("  ", "") or "40, 0" in line
    assert line.rstrip(" |").endswith("worse")


# ---- PEFT ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", ["accelerator", "cuda"])
def test_method_comparison(tmp_path, accelerator):
    path = dump(tmp_path / "lora--small-rank8.json", make_comparison(accelerator=accelerator))
    record = read(path)
    values = {name: metric.value for name, metric in record.metrics.items()}
    assert values == pytest.approx(
        {
            "fit_trained_parameters": 10_000, "fit_trained_share": 0.01, "checkpoint_bytes": 40_000,
            "run_peak_reserved_bytes": 5_000_000, "fit_step_ms": 250.0, "fit_seconds": 5.0, "fit_tokens": 4000,
            "fit_tok_per_s": 800.0, "gsm8k_exact_match": 0.25,
        }
    )  # fmt: skip
    assert record.samples["fit_step_ms"] == [200.0, 300.0]
    assert record.cell.resolved[0]["peft_config"]["r"] == 8 and record.cell.seed == 3
    assert record.environment["machine"] == "Acme GPU" and record.environment["packages"]["torch"] == "2.13.0"
    left_out = record.facts["imported"]["left_out"]
    assert {"valid accuracy", "train loss", f"{accelerator}_memory_reserved_avg"} <= {*left_out}
    assert {"results per item", "size"} - {*record.facts["missing"]} == {"size"}


@pytest.mark.parametrize(
    ("status", "error", "outcome"),
    [
        ("failed", "CUDA out of memory. Tried to allocate", "oom"),
        ("failed", "ValueError: no", "crashed"),
        ("canceled", "by hand", "unavailable"),
    ],
)
def test_runs_that_failed_are_kept_as_such(tmp_path, status, error, outcome):
    record = read(dump(tmp_path / "x.json", make_comparison(status=status, error=error)))
    assert record.outcome == outcome and error in record.reason


def test_full_fine_tuning_trains_all(tmp_path):
    record = read(dump(tmp_path / "full.json", make_comparison(total=10_000)))
    assert record.metrics["fit_trained_share"].value == 1


# ---- optimum-benchmark --------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_optimum_benchmark(tmp_path, whole):
    config, report = make_benchmark()
    if whole:
        path = dump(tmp_path / "benchmark.json", {"config": config, "report": report})
    else:
        dump(tmp_path / "benchmark_config.json", config)
        path = dump(tmp_path / "benchmark_report.json", report)
    record = read(path)
    values = {name: metric.value for name, metric in record.metrics.items()}
    assert values == pytest.approx(
        {
            "prefill_tok_per_s_b2_c64": 2 * 64 / 0.11, "decode_tok_per_s_b2_c64": 20 / 0.22,
            "decode_ms_per_token_b2_c64": 22.0, "decode_energy_j_per_token_b2_c64": 1e-5 * 3.6e6 / 20,
            "run_peak_rss_bytes": 1.2e9, "run_peak_allocated_bytes": 2e9, "run_peak_reserved_bytes": 3e9,
            "run_peak_process_bytes": 4e9,
        }
    )  # fmt: skip
    assert record.metrics["decode_tok_per_s_b2_c64"].low < 20 / 0.22  # seven calls have an interval
    assert record.samples["decode_seconds_b2_c64"][0] == pytest.approx(0.02)  # of a step of both sequences
    assert record.environment["machine"] == "Acme GPU" and record.cell.recipe == "small-awq"
    assert record.facts["imported"]["left_out"] == ["max_global_vram", "per_token latency"]
    assert "timing in turns with the unchanged model" in record.facts["missing"]


def test_a_report_alone_says_not_what_was_measured(tmp_path, capsys):
    path = dump(tmp_path / "benchmark_report.json", make_benchmark()[1])
    assert main(["import", str(path)]) == 2
    assert "no benchmark_config.json lies beside it" in capsys.readouterr().err


# ---- all ----------------------------------------------------------------------------------------


def test_imported_and_measured_records_share_no_table(tmp_path, capsys):
    runs = store_records(tmp_path / "runs", [make(), make("gptq(bits=4)", model="org/small")]).results
    folder = tmp_path / "theirs"
    for name in ("lora/small-rank8", "ia3/small"):
        dump(folder / f"{name.replace('/', '--')}.json", make_comparison(name=name))
    assert main(["import", str(folder), f"results={runs}"]) == 0
    assert "wrote 2 imported records" in capsys.readouterr().out
    records, notes = Store(runs).read()
    assert not notes and len(records) == 4
    tables = group_records(records)
    assert sorted({*map(is_imported, table.records)} != {True, False} for table in tables) == [True] * len(tables)
    assert all(table.baseline is None for table in tables if is_imported(table.records[0]))
    assert main(["report", f"results={runs}", "suite=peft-method-comparison", "format=md"]) == 0
    page = capsys.readouterr().out
    assert "peft-method-comparison v1, imported tier" in page and "imported from peft-method-comparison 0.19.0" in page
    assert main(["compare", "gptq(bits=4)", "ia3/small", f"results={runs}"]) == 2
    assert "one was imported from another tool and the other measured here" in capsys.readouterr().err


def test_again_changes_nothing_and_a_dry_run_writes_nothing(tmp_path, capsys):
    path, runs = dump(tmp_path / "x.json", make_comparison()), tmp_path / "runs"
    assert main(["import", str(path), f"results={runs}", "--dry-run"]) == 0 and not runs.exists()
    assert "would write 1 imported records" in capsys.readouterr().out
    for _ in range(2):
        assert main(["import", str(path), f"results={runs}", "--json"]) == 0
    assert len(Store(runs).read()[0]) == 1
    (told,) = json.loads(capsys.readouterr().out.splitlines()[0])
    assert told["suite"] == "peft-method-comparison" and told["imported"]["file"] == "x.json"


def test_of_a_folder_each_result_is_taken_once(tmp_path):
    config, report = make_benchmark()
    dump(tmp_path / "benchmark.json", {"config": config, "report": report})
    dump(tmp_path / "benchmark_config.json", config)
    dump(tmp_path / "benchmark_report.json", report)
    dump(tmp_path / "below" / "x.json", make_comparison())
    dump(tmp_path / "other.json", {"something": "else"})
    write_harness(tmp_path / "deep" / "er")
    assert sorted(record.cell.suite for record in import_results(tmp_path, NONE)) == [
        "lm-eval", "optimum-benchmark", "peft-method-comparison",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON ("),
        ("[1, 2]", "not a file of results of lm-eval, peft-method-comparison, optimum-benchmark"),
        ('{"a": 1}', "not a file of results of"),
        ('{"results": {"quiz": {"acc,none": 0.5}}, "configs": {"quiz": {}}, "config": []}', "not as lm-eval writes it"),
        ('{"results": {}, "configs": {}}', "no metric of any task"),
        ('{"run_info": {}, "train_info": {}, "meta_info": {}}', "not as peft-method-comparison writes it (KeyError"),
        ('{"config": {}, "report": {"decode": {"latency": null}}}', "not as optimum-benchmark writes it (KeyError"),
        ("\x00" * 9, "not JSON ("),
        ("[" * 100_000, "not JSON ("),
    ],
)
def test_what_no_tool_wrote_costs_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main(["import", str(path), f"results={tmp_path / 'runs'}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1 and str(path) in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.json"], "nowhere.json: cannot be read (No such file"),
        ([], "required: file"),
        (["."], "holds no file of results of lm-eval"),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["import", *words]) == 2
    assert message in capsys.readouterr().err


def test_damaged_samples_are_named(tmp_path, capsys):
    path = write_harness(tmp_path)
    (tmp_path / f"samples_quiz_{STAMP}.jsonl").write_text('{"acc": 1}\n')
    assert main(["import", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"samples_quiz_{STAMP}.jsonl: not a file of samples of lm-eval" in err and err.count("\n") == 1


@pytest.mark.slow
def test_what_lm_eval_itself_writes_is_read(tmp_path):
    """The harness's own evaluator and writer, on a task of the tiny model with random answers."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    from effbench.core.paths import PACKAGE
    from effbench.sources.tasks import index_tasks

    tracker = EvaluationTracker(output_path=str(tmp_path))
    results = lm_eval.simple_evaluate(
        model="dummy",
        tasks=["tiny_facts", "tiny_ppl"],
        limit=8,
        log_samples=True,
        task_manager=index_tasks(["tiny_facts", "tiny_ppl"], [PACKAGE / "tiny" / "tasks"]),
        evaluation_tracker=tracker,
        bootstrap_iters=0,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, lines in samples.items():
        tracker.save_results_samples(task_name=task, samples=lines)
    (record,) = import_results(tmp_path, NONE)
    assert record.metrics["tiny_facts_acc"].value == results["results"]["tiny_facts"]["acc,none"]
    assert len(record.samples["tiny_facts_acc"]) == 8
    assert record.metrics["tiny_ppl_word_ppl"].value == pytest.approx(
        results["results"]["tiny_ppl"]["word_perplexity,none"]
    )
    assert len(record.samples["tiny_ppl_word_ppl"]) == 8
