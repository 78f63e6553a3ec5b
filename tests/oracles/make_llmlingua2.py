"""What the llmlingua package keeps of prompts by a classifier of tokens: the embedded model, read in both directions.

Its two logits come from a head that is drawn here. The package takes BERT and XLM-RoBERTa by their names alone: it is
told the latter, tokens are spelt as those are, and no special tokens stand around a text, as there are none to stand.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tiktoken
import torch
from golden import write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[2] / "effbench" / "tiny"
RATES = (0.2, 1 / 3, 0.5, 0.7)
NOISE = 1e-5  # of float32: a threshold whose neighbours are nearer than that decides nothing
SHORT = 66  # tokens of a chunk, the two around it included
tokenizer = AutoTokenizer.from_pretrained(TINY / "model")


class Counter:
    """Stands for OpenAI's tokenizer: counts tokens of the embedded model's."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = tokenizer(text.replace("▁", " "), add_special_tokens=False)["input_ids"]
        return ids


tiktoken.encoding_for_model = lambda name: Counter()

from llmlingua import PromptCompressor, prompt_compressor  # noqa: E402


class Spelled:
    """The embedded model's tokenizer with the spaces of XLM-RoBERTa's."""

    def tokenize(self, text: str) -> list[str]:
        return [token.replace("Ġ", "▁") for token in tokenizer.tokenize(text)]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [token.replace("Ġ", "▁") for token in tokenizer.convert_ids_to_tokens(ids)]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ")


class Bare:
    """Texts as the package's data set has them, without special tokens and padding."""

    def __init__(self, texts: list[str], tokenizer: Spelled, max_len: int) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.tensor(tokenizer(self.texts[i], add_special_tokens=False)["input_ids"])
        return {"ids": ids, "mask": torch.ones_like(ids)}


class Classifier:
    """Two logits a token, each of which sees the whole text."""

    def __init__(self, head: Tensor) -> None:
        self.body = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32).eval().model
        self.head = head

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        width = input_ids.shape[1]
        seen = torch.zeros(len(input_ids), 1, width, width)  # added to scores: all are seen
        states = self.body(input_ids=input_ids, attention_mask=seen).last_hidden_state
        return SimpleNamespace(loss=None, logits=nn.functional.linear(states, self.head))


def watch_thresholds() -> list[float]:
    """Distances of thresholds from the values next to them, as they are chosen."""
    gaps: list[float] = []
    percentile = np.percentile

    def call(values: Any, share: float) -> Any:
        threshold = percentile(values, share)
        others = sorted(abs(value - threshold) for value in {*map(float, values)})
        gaps.append(next((gap for gap in others if gap > 1e-12), 1.0))
        return threshold

    prompt_compressor.np.percentile = call
    return gaps


def main() -> None:
    head = torch.randn(2, 128, generator=torch.Generator().manual_seed(0)) / 4
    compressor = PromptCompressor(str(TINY / "model"), device_map="cpu", use_llmlingua2=True)
    compressor.model_name, compressor.max_batch_size = "xlm-roberta-large", 1
    compressor.model, compressor.tokenizer = Classifier(head), Spelled()
    prompt_compressor.TokenClfDataset = Bare
    gaps = watch_thresholds()
    tensors = {"head": head}
    rows = {name: [*map(json.loads, (TINY / "data" / f"{name}.jsonl").open())] for name in ("needle_256", "contexts")}
    for length in (compressor.max_seq_len, SHORT):
        compressor.max_seq_len = length
        for name in rows:
            for number in range(4):
                row = rows[name][number]
                contexts = [f" {text}" for text in row.get("contexts", [row.get("context")])]
                for rate in RATES:
                    gaps.clear()
                    found = compressor.compress_prompt_llmlingua2(contexts, rate=rate)
                    if min(gaps) > NOISE:
                        text = "\n\n".join(found["compressed_prompt_list"])
                        tensors[f"{name}/{number}/{rate:.4f}/{length - 1}"] = torch.tensor([*text.encode()]).byte()
    write("llmlingua2", __file__, ["llmlingua", "transformers"], tensors)


if __name__ == "__main__":
    main()
