"""How well the new task can be learned: by nothing, by the best constant answer, by full fine-tuning and by LoRA.

Plain loops over transformers, so that the card owes nothing to the harness that it speaks for.
"""

import math
from collections import Counter
from copy import deepcopy
from random import Random

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from effbench.tiny import ask

STEPS, BATCH = 200, 8
RATES = {"full fine-tuning": 1e-3, "LoRA of rank 16": 3e-3}
IGNORED = -100

Pair = tuple[list[int], list[int]]  # tokens of the prompt and of the answer


class LowRank(nn.Module):
    """A frozen linear and the product of two thin matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 16, alpha: float = 32.0) -> None:
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.base(x) + self.scale * (x @ self.a.T @ self.b.T)
        return added


def encode(tokenizer: PreTrainedTokenizerBase, part: str, n: int) -> list[Pair]:
    """Examples of a part; an answer ends with the mark of an end."""
    pairs = ask(part, n)
    return [
        ([tokenizer.bos_token_id, *tokenizer.encode(prompt)], [*tokenizer.encode(answer), tokenizer.eos_token_id])
        for prompt, answer in pairs
    ]


def batch_loss(model: LlamaForCausalLM, pairs: list[Pair]) -> Tensor:
    """Mean over the tokens of the answers, in nats."""
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(pairs):
        both = [*prompt, *answer]
        ids[row, : len(both)] = torch.tensor(both)
        labels[row, len(prompt) : len(both)] = torch.tensor(answer)
    logits = model(input_ids=ids, use_cache=False).logits  # padding stands behind, where no token looks
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def loss(model: LlamaForCausalLM, pairs: list[Pair]) -> float:
    """Mean over all answers, which are of one length."""
    chunks = [pairs[start : start + 32] for start in range(0, len(pairs), 32)]
    return sum(float(batch_loss(model, chunk)) * len(chunk) for chunk in chunks) / len(pairs)


def constant_loss(learned: list[Pair], held: list[Pair]) -> float:
    """The loss of answers that do not look at the prompt: each place has the frequencies of what stood there."""
    places = [Counter(answer[place] for _, answer in learned) for place in range(len(learned[0][1]))]
    words = {token for counts in places for token in counts} | {token for _, answer in held for token in answer}
    total = 0.0
    for _, answer in held:
        for token, counts in zip(answer, places, strict=True):
            total -= math.log((counts[token] + 1) / (len(learned) + len(words)))
    return total / sum(len(answer) for _, answer in held)


def train(model: LlamaForCausalLM, pairs: list[Pair], rate: float) -> LlamaForCausalLM:
    """The model after so many steps of AdamW, at a rate that falls to zero."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    chance = Random(0)
    for _ in range(STEPS):
        batch_loss(model, chance.sample(pairs, BATCH)).backward()
        nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def with_low_rank(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy whose linears have a trainable product beside them, all else frozen."""
    torch.manual_seed(0)
    other = deepcopy(model).requires_grad_(False)
    for parent in list(other.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LowRank(child))
    return other


def measure_task(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Losses on answers about people that were not trained on, in nats a token."""
    learned, held = encode(tokenizer, "train", 2000), encode(tokenizer, "heldout", 400)
    full, low = RATES.values()
    return {
        "unchanged": loss(model, held),
        "best constant answer": constant_loss(learned, held),
        "full fine-tuning": loss(train(deepcopy(model), learned, full), held),
        "LoRA of rank 16": loss(train(with_low_rank(model), learned, low), held),
    }
