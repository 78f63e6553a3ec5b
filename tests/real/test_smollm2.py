"""The real model as effbench opens it, beside its authors' rules and plain transformers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from effbench.nn.files.gguf import Gguf
from effbench.nn.infer.engine import open_engine
from effbench.probes import perplexity, quality

pytestmark = pytest.mark.real
HARD = "In 1961 it's 12,345 men.  DON'T you?\n\n\n  Äé 日本 ▁x\tA1b22 'Sir' e\u0301 \u0663\u0664 ½ x² /\r\n   end  "


def test_text_is_cut_as_its_authors_cut_it(file: Path, run: Any, texts: Path) -> None:
    """`tokenizer.json` of HuggingFaceTB/SmolLM2-135M-Instruct: digits apart, then the byte level of GPT-2."""
    metadata = Gguf(file)
    tokens, merges = metadata.find("tokenizer.ggml.tokens"), metadata.find("tokenizer.ggml.merges")
    authors = Tokenizer(
        models.BPE({token: number for number, token in enumerate(tokens)}, [tuple(pair.split(" ")) for pair in merges])
    )
    authors.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    authors.decoder = decoders.ByteLevel()
    for text in [HARD, *(path.read_text(encoding="utf-8") for path in sorted(texts.parent.glob("**/*.md")))]:
        ids = run.tokenizer.encode(text, verbose=False)
        assert ids == authors.encode(text).ids and run.tokenizer.decode(ids) == text


def test_special_tokens_and_turns(run: Any) -> None:
    tokenizer = run.tokenizer
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert named == (1, 2, 0, 2) and run.model.generation_config.eos_token_id == 2
    turns = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert turns.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert turns.endswith("<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n")
    assert tokenizer.encode(turns)[:2] == [1, 9690] and tokenizer.encode(turns)[-2:] == [2, 198]
    told = "Q4_1 linears, Q8_0 embedding and head, F32 norms; matrices are measured in float16"
    assert run.log.model_types == told


def test_greedy_text(run: Any, plain: Any) -> None:
    ids = run.tokenizer.encode("The capital of France is")
    (made,) = open_engine(run).generate([ids], 16, {2})
    assert run.tokenizer.decode(made).startswith(" Paris.")
    assert made == plain.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()


def test_an_answer_ends_at_its_stop_token(run: Any) -> None:
    lm = quality.EngineLM(open_engine(run), run.tokenizer, None, "oneblock")
    prompt = lm.apply_chat_template([{"role": "user", "content": "Say only the word: yes"}])
    ids = lm.tok_encode(prompt)
    (made,) = open_engine(run).generate([ids], 40, lm._stop_ids(()))
    assert len(made) < 40


def test_perplexity_is_that_of_plain_transformers(run: Any, plain: Any) -> None:
    settings = {"window": 512, "text_tokens": 3072}
    found = perplexity.take(run, settings).metrics["token_ppl"].value
    ids = run.data.heldout_ids(3072).view(6, 512)

    def compute(model: Any) -> float:
        with torch.no_grad():
            losses = [torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:]) for row in ids]
        return math.exp(float(torch.stack(losses).mean()))

    kept = copy.deepcopy(plain)  # matrices in 16 bits, as they are kept and counted
    for parameter in kept.parameters():
        parameter.data = parameter.data.half().float() if parameter.ndim > 1 else parameter.data
    assert found == pytest.approx(compute(kept), rel=1e-5)
    assert found == pytest.approx(compute(plain), rel=1e-4)
