"""Attention pruning: tokens of the contexts that receive little attention go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import (
    Judge,
    Judged,
    chunk,
    count_tokens,
    join,
    list_ids,
    measure_room,
    note_chunks,
    open_judge,
    round_down,
)
from effbench.nn.infer.cache import SlotCache, SlotLayer
from effbench.nn.infer.engine import State
from effbench.nn.model.blocks import Blocks


@dataclass(frozen=True)
class AttentionPruning(Judged):
    """What a token receives is the mean over layers, heads and queries of the weights A[:, t], read in one pass.

    Contexts that are longer than the window are read in chunks, each between what stands before them and the question.
    What stays is in the order of the prompt.
    """

    paper = "unpublished"
    caveats = (
        "scored as in SnapKV (arXiv:2404.14469), which evicts from the cache by head; here all heads go by one mean",
        "where all queries count, tokens in front are looked at by more of them",
        "tokens of one character stay together",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    asks = True
    tuned = {"queries": ("question", "all")}

    queries: Literal["question", "all"] = "question"  # whose attention counts

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        if self.keep >= 1 or not "".join(segments.contexts).strip():
            return segments
        judge = open_judge(run, self.compressor)
        pieces, forced = self.read(segments, judge)
        last = len(segments.contexts) + 2
        front, question = ([piece for piece in pieces if piece.part in parts] for parts in ((0, 1), (last,)))
        contexts = [i for i, piece in enumerate(pieces) if 2 <= piece.part < last]
        before, behind = [judge.first, *list_ids(front)], list_ids(question)
        room = judge.window - len(before) - len(behind)
        if room < 1:
            raise Unsupported(f"{self}: question and instruction leave no room in {judge.window} positions")
        chunks = [*chunk([pieces[i] for i in contexts], room)]
        note_chunks(run, self, len(chunks))
        received: list[float] = []
        for part in chunks:
            found = iter(self.observe(judge, before, list_ids(part), behind).tolist())
            received += [max(next(found) for _ in piece.ids) for piece in part]
        worth = dict(zip(contexts, received, strict=True))
        kept = {i for i in contexts if pieces[i].stays or pieces[i] in forced}
        left = round_down(measure_room(self, segments, pieces)[0])
        left -= count_tokens(pieces[i] for i in kept)
        for i in sorted(set(contexts) - kept, key=lambda i: (-worth[i], i)):
            left -= len(pieces[i].ids)
            if left < 0:
                break
            kept.add(i)
        stay = [piece for i, piece in enumerate(pieces) if i in kept or i not in worth]
        return join(segments, stay, apart=self.force)

    def observe(self, judge: Judge, before: list[int], ids: list[int], behind: list[int]) -> Tensor:
        """[n] attention that tokens receive between those before and behind them."""
        engine = judge.engine
        engine.plan.chain("cache_keep")[:] = [Watch()]
        cache = SlotCache(len(Blocks(engine.model)), engine.plan)
        layers = [layer for layer in cache.slot_layers if isinstance(layer, SlotLayer)]
        state = State(cache)
        parts = [before + ids, behind] if self.queries == "question" else [before + ids + behind]
        for part in parts:
            for layer in layers:  # of the last part alone
                layer.mass = None if layer.mass is None else layer.mass.zero_()
            engine.extend(state, torch.tensor([part], device=engine.device))
        masses = [layer.mass for layer in layers if layer.mass is not None]  # [Hkv, S], summed over groups and queries
        heads = int(engine.model.config.num_attention_heads)
        mean: Tensor = torch.stack([mass.sum(0) / (heads * len(parts[-1])) for mass in masses]).mean(0)
        return mean[len(before) : len(before) + len(ids)]


class Watch:
    """Has caches take note of the attention that is received, some queries at a time, and evicts nothing."""

    observes = True
    observed = 0
