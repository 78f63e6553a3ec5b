"""What the llmlingua package keeps of prompts, and by which numbers, with a model given as a folder or a GGUF file.

`make_llmlingua.py` takes the embedded model; `make_llmlingua.py FILE.gguf` SmolLM2. The package is of transformers 4:
three patches let it run, offline, and change nothing that it computes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import tiktoken
import torch
from golden import write
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig

TINY = Path(__file__).resolve().parents[2] / "effbench" / "tiny"
CASES = [(number, rate, size) for number in (0, 1) for rate in (0.2, 0.3, 0.4, 0.5) for size in (50, 200)]
ASKED = [
    (number, rate, size, spread)
    for number in range(6)
    for rate in (0.2, 0.3, 0.4)
    for size in (50, 200)
    for spread in (0.1, 0.3)
]
NOISE = 1e-5  # of float32: a threshold whose neighbours are nearer than that decides nothing


class Words:
    """Stands for OpenAI's tokenizer, which only counts what is reported."""

    def encode(self, text: str) -> list[str]:
        return text.split()


tiktoken.encoding_for_model = lambda name: Words()

from llmlingua import PromptCompressor  # noqa: E402


def take_tuples(model: Any) -> None:
    """Have a model take and give caches as the package has them."""
    forward = model.forward

    def call(input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values or ()):
            cache.update(keys, values, layer)
        out = forward(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=use_cache)
        out.past_key_values = [(layer.keys, layer.values) for layer in cache.layers]
        return out

    model.forward = call


def watch_thresholds(compressor: Any) -> list[float]:
    """Distances of thresholds from the values next to them, as they are chosen."""
    gaps: list[float] = []
    estimate = compressor.get_estimate_threshold_base_distribution

    def call(values: Tensor, ratio: float, condition: bool = False) -> float:
        threshold: float = estimate(values, ratio, condition)
        others = (values - threshold).abs().sort().values[1:]
        gaps.append(float(others[0]) if len(others) else 1.0)
        return threshold

    compressor.get_estimate_threshold_base_distribution = call
    return gaps


def open_folder(place: Path) -> Path:
    if place.is_dir():
        return place
    folder = Path(tempfile.mkdtemp())
    how = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        place.parent, gguf_file=place.name, quantization_config=how, dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name).save_pretrained(folder)
    return folder


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TINY / "data" / f"{name}.jsonl").open()]


def main() -> None:
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else TINY / "model"
    compressor = PromptCompressor(str(open_folder(place)), device_map="cpu")
    take_tuples(compressor.model)
    gaps = watch_thresholds(compressor)
    tensors: dict[str, Tensor] = {}

    def keep(name: str, contexts: list[str], question: str, **how: Any) -> None:
        gaps.clear()
        text = compressor.compress_prompt(contexts, question=question, **how)["compressed_prompt"]
        if min(gaps) > NOISE:
            tensors[name] = torch.tensor([*text.encode()], dtype=torch.uint8)

    rows, needles = read("contexts"), read("needle_256")
    with torch.no_grad():
        for number in (0, 1):
            contexts, question = rows[number]["contexts"], rows[number]["question"]
            for name, method, condition in (("plain", "llmlingua", "none"), ("asked", "longllmlingua", "after")):
                found = dict(compressor.get_rank_results(contexts, question, method, condition, [0] * len(contexts)))
                tensors[f"rank/{name}/{number}"] = torch.tensor([float(found[i]) for i in range(len(contexts))])
        small = place.is_dir()  # of SmolLM2 a few will do
        for number, rate, size in CASES if small else [(0, 0.3, 50), (1, 0.4, 200)]:
            row, single = rows[number], needles[number]
            name = f"{number}/{rate}/{size}"
            how = {"rate": rate, "iterative_size": size}
            keep(f"one/{name}", [single["context"]], single["question"], **how)
            keep(f"many/{name}", row["contexts"], row["question"], rank_method="llmlingua", **how)
        for number, rate, size, spread in ASKED if small else [(0, 0.2, 50, 0.3), (1, 0.4, 200, 0.3)]:
            row = rows[number]
            for order in ("sort", "original"):
                asks = {"rank_method": "longllmlingua", "condition_in_question": "after_condition"}
                asks |= {
                    "condition_compare": True,
                    "dynamic_context_compression_ratio": spread,
                    "reorder_context": order,
                }
                keep(
                    f"asked/{order}/{number}/{rate}/{size}/{spread}",
                    row["contexts"],
                    row["question"],
                    rate=rate,
                    iterative_size=size,
                    **asks,
                )
    name = "llmlingua" if small else "llmlingua_smollm2"
    write(name, __file__, ["llmlingua", "transformers"], tensors, model=place.name)


if __name__ == "__main__":
    main()
