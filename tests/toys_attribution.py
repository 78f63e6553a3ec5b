"""The tiny language model and the examples that attributions were made on elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from toys_texts import golden
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.checks import toy_run
from effbench.core.views import Example
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import collate

GOLDEN = golden("attribution")
TRAIN = 90  # of the examples; the others are the target
SHAPE = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def attributed(dtype: torch.dtype = torch.float64) -> ModelRun:
    """A run on that model, with those examples."""
    run = toy_run()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, bos_token_id=0, eos_token_id=0))
    weights = {name.removeprefix("model."): value for name, value in GOLDEN.items() if name.startswith("model.")}
    model.load_state_dict(weights)
    run.model = model.to(dtype).eval()
    pairs = zip(GOLDEN["ids"].tolist(), GOLDEN["prompt"].tolist(), strict=True)
    examples = [Example(str(place), tuple(ids), prompt) for place, (ids, prompt) in enumerate(pairs)]
    run.data.pool, run.data.target = examples[:TRAIN], examples[TRAIN:]
    return run


def losses(model: Any, examples: Sequence[Example]) -> list[Tensor]:
    """The mean cross-entropy of each example's learned tokens, example by example, by transformers' own loss."""
    found = []
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[0, : max(1, example.prompt)] = -100
        found.append(model(ids, labels=labels, use_cache=False).loss)
    return found


def gradient(loss: Tensor, *weights: Tensor) -> Tensor:
    """[P]: of a loss in weights, flat."""
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, weights)])


def target_loss(run: ModelRun) -> float:
    """Mean over the target's examples."""
    with torch.no_grad():
        return float(torch.stack(losses(run.model, run.data.target)).mean())


def together(run: ModelRun, examples: Sequence[Example]) -> dict[str, Tensor]:
    """One batch of examples."""
    return collate(examples, run.pad, run.device)
