"""The loss of a batch, token by token: what is learned, how much each token counts, and means over that.

Tokens count by the weights of their examples, all alike where a batch holds none (`weight` [B, T]).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effbench.nn.precision import widen
from effbench.nn.train.batches import IGNORED, Batch


def learned(batch: Batch) -> Tensor:
    """Bool [B, T - 1]: where logits predict a token that is learned."""
    return batch["labels"][:, 1:] != IGNORED


def learned_logits(logits: Tensor, batch: Batch) -> Tensor:
    """[N, V]: of logits [B, T, V] those that predict the N learned tokens, in float32 at least."""
    return widen(logits[:, :-1][learned(batch)])


def token_losses(logits: Tensor, batch: Batch) -> Tensor:
    """[N]: cross-entropy of the learned tokens, in nats, from logits [B, T, V]."""
    return nn.functional.cross_entropy(
        learned_logits(logits, batch), batch["labels"][:, 1:][learned(batch)], reduction="none"
    )


def token_weights(batch: Batch) -> Tensor | None:
    """[N]: how much each learned token counts; None where all count alike."""
    return batch["weight"][:, 1:][learned(batch)] if "weight" in batch else None


def count_tokens(batch: Batch) -> Tensor:
    """Bool [B, T]: tokens of examples of which something is learned. Padding and other examples, which a step leaves
    out where they are alone in a part of it, have no share in what is counted of the step."""
    weights, owners = token_weights(batch), batch["example"][:, 1:][learned(batch)]
    return torch.isin(batch["example"], owners if weights is None else owners[weights > 0])


def sum_weights(batch: Batch) -> float:
    """What all learned tokens count together: their number, where all count alike."""
    weights = token_weights(batch)
    return float(learned(batch).sum() if weights is None else weights.sum())


def mean_learned(values: Tensor, batch: Batch) -> Tensor:
    """The mean of values [N] over the learned tokens, by their weights."""
    weights = token_weights(batch)
    return values.mean() if weights is None else (values * weights.to(values)).sum() / weights.to(values).sum()


def mean_cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of the learned tokens by their weights, in nats, from logits [B, T, V]."""
    if "weight" in batch:
        return mean_learned(token_losses(logits, batch), batch)
    return cross_entropy(logits, batch["labels"])  # in one kernel, and the bits of a plain loop


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Of the learned tokens, from logits [B, T, V] and labels [B, T], in nats; in float32 at least."""
    predicted = widen(logits[:, :-1].flatten(0, 1))
    return nn.functional.cross_entropy(predicted, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction)


@torch.no_grad()
def sum_by_example(logits: Tensor, batch: Batch, number: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy and number of the learned tokens of each of so many examples, float64 [number] both."""
    losses = token_losses(logits, batch).double()
    owner = batch["example"][:, 1:][learned(batch)]
    sums = torch.zeros(2, number, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, owner, losses)
    sums[1].index_add_(0, owner, torch.ones_like(losses))
    return sums[0], sums[1]
