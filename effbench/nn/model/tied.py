"""Embeddings and head, which many models keep in one tensor: it stays one, or is two and the configuration says so."""

from __future__ import annotations

from typing import Any

from torch import nn


def untie(model: Any) -> None:
    """Give the head a tensor of its own, equal to that of the embeddings."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    note_untied(model)


def note_untied(model: Any) -> None:
    """Have the configuration say so where head and embeddings share no tensor any more: a loader would tie them."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is not getattr(embeddings, "weight", None):
        model.config.tie_word_embeddings = False
