"""What models give in a step, once for all methods: logits, the outputs of blocks, attention.

Blocks are those of our own view. What transformers calls `output_hidden_states` misses blocks that were put in place of
others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Set
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.core.run import InferPlan
from effbench.nn.model.attention import own_attention
from effbench.nn.model.blocks import Blocks, count_positions
from effbench.nn.model.feed import count_front, count_soft, feed
from effbench.nn.train.batches import Batch

if TYPE_CHECKING:
    from effbench.core.method import Method, Output
    from effbench.core.run import Run


class Outputs(NamedTuple):
    """Of one forward pass over tokens [B, T]; what was not asked for is empty."""

    logits: Tensor  # [B, T, V]
    hidden: tuple[Tensor, ...]  # [B, T, H] after each block
    attention: tuple[Tensor, ...]  # [B, Hq, T, T] of each block
    scores: tuple[Tensor, ...]  # [B, Hq, T, T] that attention is the softmax of, -inf where a query does not look


class Taps:
    """Keeps what blocks and attention of a model give while `recording`; the rest of the time it is not there."""

    def __init__(self, model: Any, wanted: Set[Output], plan: InferPlan) -> None:
        self._model = model
        self._wanted = wanted
        self._plan = plan
        self._recording = False
        self._hidden: list[Tensor] = []
        self._attention: list[Tensor] = []
        self._scores: list[Tensor] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Be in place, for forward passes and for what is computed again in backward passes alike."""
        with contextlib.ExitStack() as stack:
            if "hidden" in self._wanted:
                for block in Blocks(self._model).blocks:
                    stack.callback(block.register_forward_hook(self._keep_hidden).remove)
            chains = {
                "attention": ("attend_observe", self._keep_attention),
                "scores": ("attend_scores", self._keep_scores),
            }
            for name, keep in (chains[output] for output in sorted(self._wanted & chains.keys())):
                self._plan.chain(name).append(keep)
                stack.callback(self._plan.chain(name).remove, keep)
            if self._wanted & chains.keys():
                stack.enter_context(own_attention(self._model, self._plan))
            yield

    def check(self, role: str, batch: Batch) -> None:
        """Raise `Unsupported` for rows that the model of a role has no positions for, or would see in part only."""
        width, positions = count_front(self._model) + batch["input_ids"].shape[1], count_positions(self._model)
        if width > positions:
            raise Unsupported(
                f"{role} has {positions} positions, a row takes {width}: give a smaller max_length, or fewer "
                "new_tokens where texts are written"
            )
        window = getattr(self._model.config, "sliding_window", None)
        if batch["attention_mask"].ndim == 4 and window is not None and window < width:
            raise Unsupported(f"{role} attends {window} tokens back, packed rows have {width}: give layout='padded'")

    def record(self, batch: Batch) -> Outputs:
        """One forward pass, and what it gave."""
        self._hidden, self._attention, self._scores, self._recording = [], [], [], True
        try:
            logits = feed(self._model, batch).logits
        finally:
            self._recording = False
        return Outputs(logits, tuple(self._hidden), tuple(self._attention), tuple(self._scores))

    def _keep_hidden(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if self._recording:
            states: Tensor = output if isinstance(output, Tensor) else output[0]
            self._hidden.append(states[:, count_soft(self._model) :])

    def _keep_attention(self, module: nn.Module, weights: Tensor) -> None:
        if self._recording:
            self._attention.append(self._cut(weights))

    def _keep_scores(self, module: nn.Module, scores: Tensor) -> None:
        if self._recording:
            self._scores.append(self._cut(scores))

    def _cut(self, pairs: Tensor) -> Tensor:
        """Of [B, Hq, T, S] those of tokens with tokens."""
        front = count_soft(self._model)
        return pairs[:, :, front:, -(pairs.shape[2] - front) :]


class Roles:
    """The outputs of all roles that the methods of a fit read, each computed once for a batch."""

    def __init__(self, run: Run, methods: Iterable[Method]) -> None:
        self._wanted: dict[str, set[Output]] = {"model": set()}
        for method in methods:
            for role, outputs in method.reads.items():
                self._wanted.setdefault(role, set()).update(outputs)
        self._taps = {
            role: Taps(run.role(role), wanted, run.infer if role == "model" else InferPlan())
            for role, wanted in self._wanted.items()
        }
        self._batch: Batch = {}
        self._found: dict[str, Outputs] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Have all models tapped."""
        with contextlib.ExitStack() as stack:
            for taps in self._taps.values():
                stack.enter_context(taps.open())
            yield

    def feed(self, batch: Batch) -> Outputs:
        """What the model that is trained gives for a batch; the others are asked when a method reads them."""
        out = self._taps["model"].record(batch)
        self.turn_to(batch, out)
        return out

    def turn_to(self, batch: Batch, out: Outputs) -> None:
        """Have the others asked about a batch of which the model has given this."""
        self._batch, self._found = batch, {"model": out}

    def read(self, role: str) -> Outputs:
        """The outputs of a role for the batch that was fed last, without gradients.

        Raises `KeyError` for one that no method declared, `Unsupported` for a model that cannot be fed it.
        """
        if role not in self._found:
            with torch.no_grad():
                self._taps[role].check(role, self._batch)
                self._found[role] = self._taps[role].record(self._batch)
        return self._found[role]
