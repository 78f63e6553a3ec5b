"""Small files of results in the layouts of other tools, made up for tests: no result of anybody is in them."""

from __future__ import annotations

import json

STAMP = "2026-01-02T03-04-05.678901"


def write_harness(folder, *, answers=(1, 0, 1, 1), share=None, samples=True, model="org/model", **changes):
    """`results_<date>.json` of lm-eval 0.4 with a task of choices, a text, a group and what else stands there."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [(-40.0, 10), (-60.0, 20)]
    value = sum(answers) / len(answers) if share is None else share
    body = {
        "results": {
            "quiz": {
                "alias": "quiz", "acc,none": value, "acc_stderr,none": 0.25, "f1,none": 0.4, "f1_stderr,none": "N/A",
                "brier_score,none": 0.3,
            },
            "book": {"alias": "book", "word_perplexity,none": 28.031624894526125, "word_perplexity_stderr,none": "N/A"},
            "sums": {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "exact_match,loose": 0.75},
            "all": {"alias": "all", "acc,none": 0.6},
        },
        "group_subtasks": {"all": ["quiz"]},
        "configs": {"quiz": {"task": "quiz"}, "book": {"task": "book"}, "sums": {"task": "sums"}},
        "versions": {"quiz": 1.0, "book": 2, "sums": 3},
        "n-shot": {"quiz": 5, "book": 0, "sums": 8},
        "n-samples": {
            "quiz": {"original": 100, "effective": 4}, "book": {"original": 2, "effective": 2},
            "sums": {"original": 40, "effective": 40},
        },
        "config": {"model": "hf", "model_args": f"pretrained={model},dtype=float16", "limit": 4, "random_seed": 7},
        "date": 1767323045.0,
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.17.0",
        "task_hashes": {"quiz": "ab" * 32},
        "model_source": "hf",
        "model_name": model,
        "chat_template_sha": None,
        "total_evaluation_time_seconds": "12.5",
    }  # fmt: skip
    path = folder / f"results_{STAMP}.json"
    path.write_text(json.dumps(body | changes))
    if samples:
        lines = [
            {"doc_id": k, "filter": "none", "metrics": ["acc"], "acc": float(right), "f1": [right, 1], "target": "1"}
            for k, right in reversed(list(enumerate(answers)))
        ]
        (folder / f"samples_quiz_{STAMP}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines = [{"doc_id": k, "filter": "none", "word_perplexity": list(text)} for k, text in enumerate(texts)]
        (folder / f"samples_book_{STAMP}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make_comparison(*, name="lora/small-rank8", status="success", error="", accelerator="accelerator", total=1_010_000):
    """The content of a file of PEFT's method comparison, of 20 steps."""
    device = {"accelerator": "accelerator", "cuda": "gpu"}[accelerator]
    entries = [
        {
            "step": 10,
            "valid accuracy": 0.2,
            "train loss": 1.5,
            "train samples": 40,
            "train time": 2.0,
            "eval time": 1.0,
        },
        {
            "step": 20,
            "valid accuracy": 0.3,
            "train loss": 1.2,
            "train samples": 80,
            "train time": 3.0,
            "eval time": 1.0,
        },
        {"step": 20, "test accuracy": 0.25, "train loss": 1.2, "train samples": 80, "train total tokens": 4000},
    ]
    return {
        "run_info": {
            "created_at": "2026-01-02T03:04:05+00:00", "total_time": 20.0, "experiment_name": name,
            "peft_branch": "main",
            "train_config": {
                "model_id": "org/small", "dtype": "bfloat16", "max_seq_length": 64, "batch_size": 4, "max_steps": 20,
                "seed": 3,
            },
            "peft_config": {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]},
            "error_msg": error,
        },
        "train_info": {
            f"{accelerator}_memory_reserved_avg": 10, f"{accelerator}_memory_max": 5_000_000,
            f"{accelerator}_memory_reserved_99th": 20, "train_time": 9.0, "file_size": 40_000,
            "num_trainable_params": 10_000, "num_total_params": total, "status": status, "metrics": entries,
        },
        "meta_info": {
            "model_info": {"sha": "aa" * 20, "created_at": "2026-01-01T00:00:00+00:00"},
            "dataset_info": {"metamath": {"sha": "bb" * 20}, "gsm8k": {"sha": "cc" * 20}},
            "package_info": {"peft-version": "0.19.0", "peft-commit-hash": None, "torch-version": "2.13.0"},
            "system_info": {"system": "Linux", "release": "6", "machine": "x86_64", device: "Acme GPU"},
            "pytorch_info": "built",
        },
    }  # fmt: skip


def measure(seconds, rate, unit, energy=None):
    """A target of optimum-benchmark."""
    mean = sum(seconds) / len(seconds)
    latency = {"unit": "s", "values": list(seconds), "count": len(seconds), "total": sum(seconds), "mean": mean}
    memory = {
        "unit": "MB", "max_ram": 900.0, "max_global_vram": 5000.0, "max_process_vram": 4000.0, "max_reserved": 3000.0,
        "max_allocated": 2000.0,
    }  # fmt: skip
    power = None if energy is None else {"unit": "kWh", "cpu": 1e-6, "ram": 1e-6, "gpu": energy, "total": energy + 2e-6}
    return {
        "memory": memory, "latency": latency | {"p50": sorted(seconds)[len(seconds) // 2], "stdev": 0.0},
        "throughput": {"unit": unit, "value": rate / mean}, "energy": power, "efficiency": None,
    }  # fmt: skip


def make_benchmark():
    """(config, report) of a text generation: batch 2, 64 tokens of context, 11 new ones, on a GPU."""
    config = {
        "name": "small-awq",
        "backend": {
            "name": "pytorch", "version": "2.13.0", "model": "org/small", "device": "cuda", "device_ids": "0",
            "seed": 42, "torch_dtype": "float16", "quantization_scheme": "awq", "quantization_config": {"bits": 4},
        },
        "scenario": {"name": "inference", "input_shapes": {"batch_size": 2, "sequence_length": 64}},
        "environment": {
            "cpu": " Acme CPU", "gpu": ["Acme GPU"], "platform": "Linux", "optimum_benchmark_version": "0.6.0",
            "transformers_version": "4.50.0", "peft_version": None,
        },
    }  # fmt: skip
    report = {
        "load_model": {"memory": {"unit": "MB", "max_ram": 1200.0}, "latency": None, "throughput": None},
        "prefill": measure([0.10, 0.11, 0.12, 0.10, 0.10, 0.13, 0.11], 2, "samples/s"),
        "decode": measure([0.20, 0.22, 0.24, 0.20, 0.20, 0.26, 0.22], 20, "tokens/s", energy=1e-5),
        "per_token": {"memory": None, "latency": {"unit": "s", "values": [0.02]}, "throughput": None},
    }
    return config, report
