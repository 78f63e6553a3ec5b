"""Sequence parallel: each rank holds some tokens of every row (Korthikanti et al., 2022; Jacobs et al., 2023)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.nn.functional import all_to_all_single
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.methods.parallel._megatron import (
    SUMMAND,
    check_attention,
    check_heads,
    check_linears,
    divide_blocks,
    list_divided,
    mark,
)
from effbench.methods.parallel._ranks import Ranks
from effbench.nn.model.attention import route_attention
from effbench.nn.model.blocks import Blocks
from effbench.nn.train.shards import settle_gradients, sum_plain
from effbench.nn.train.slots import Shares, find_shares

ULYSSES = "effbench-ulysses"  # attention of that name


@dataclass(frozen=True)
class SP(Ranks):
    """Blocks see a part of the tokens, in order; attention sees all of them for some of the heads.

    `megatron` stands beside tensor parallel: norms and the residual stream are divided by tokens; what enters attention
    and MLP is gathered, and what leaves them is reduced and scattered. `ulysses` keeps whole weights: queries, keys and
    values go from some tokens of all heads to all tokens of some heads, and the outputs back, by all-to-all.
    """

    paper = "arXiv:2205.05198"
    caveats = (
        "ulysses is arXiv:2309.14509",
        "dropout draws alike on all ranks, so that tokens at the same place of each part lose the same units",
    )
    type = "parallel training"
    weight_update = "training"
    claims = ("train.parallel",)
    trials = ({"ranks": 1}, {"ranks": 1, "kind": "ulysses"})

    kind: Literal["megatron", "ulysses"] = "megatron"  # how attention comes to see all tokens

    @contextlib.contextmanager
    def wrap(self, run: Run) -> Iterator[Any]:
        with self.holding_parts(run):
            yield

    def check_whole(self, run: Run) -> None:
        view = Blocks(run.model)
        check_heads(view, self.ranks)
        if self.kind == "megatron":
            super().check_whole(run)
            check_linears(run, self.ranks)
        if any("hidden" in method.reads.get("model", ()) for method in run.train.chain("loss")):
            raise Unsupported(f"{self}: a method reads what blocks give, and here each rank has some tokens of it")

    @contextlib.contextmanager
    def divide(self, run: Run) -> Iterator[None]:
        mesh = init_device_mesh(run.device.type, (self.ranks,))
        view = Blocks(run.model)
        with contextlib.ExitStack() as stack:
            if self.kind == "megatron":
                stack.enter_context(divide_blocks(run, mesh, by_sequence=True))
            else:
                stack.enter_context(route_attention(run.model, ULYSSES))
                run.model.register_forward_pre_hook(check_attention)
            tokens = Tokens(mesh, self.rank, cut_rotary=self.kind == "ulysses")
            tokens.divide(run.model, view)
            yield

    def own_tokens(self, values: Tensor) -> Tensor:
        return values if self.ranks == 1 or self.kind == "megatron" else values.chunk(self.ranks, 1)[self.rank]

    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.ranks > 1:
            settle_gradients(parameters)
            sum_plain([parameter for parameter in parameters if hasattr(parameter, SUMMAND)])

    def shares(self, model: nn.Module) -> Shares:
        if self.kind == "ulysses":
            return Shares()
        parts = list_divided(model) if self.ranks > 1 else set()
        return find_shares(model, lambda p: 1 / self.ranks if p in parts else 1.0)


class Tokens:
    """Hooks that give each rank its part of the tokens between the first block and the last norm."""

    def __init__(self, mesh: DeviceMesh, rank: int, cut_rotary: bool) -> None:
        self.mesh, self.rank, self.ranks = mesh, rank, mesh.size()
        self.cut_rotary = cut_rotary  # attention projects its own tokens alone
        self.length = 0  # of rows, before they were filled up to a multiple of ranks

    def divide(self, model: Any, view: Blocks) -> None:
        """Have them in place."""
        model.register_forward_pre_hook(self.fill, with_kwargs=True)
        model.register_forward_hook(self.cut)
        view.blocks[0].register_forward_pre_hook(self.scatter)
        for block in view.blocks:
            mark(block)
            if self.cut_rotary:
                block.register_forward_pre_hook(self.turn, with_kwargs=True)
        last = view.blocks[-1]
        if view.names.norm in dict(model.named_modules()):
            last = model.get_submodule(view.names.norm)
            mark(last)
        last.register_forward_hook(self.gather)

    def fill(self, model: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Rows filled up with tokens that nothing looks at, so that parts are of one length."""
        if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
            raise Unsupported("sp: a method writes texts with the model, token by token: they cannot be divided")
        given: Tensor = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        self.length = given.shape[1]
        more = -self.length % self.ranks
        if not more:
            return args, inputs
        inputs = dict(inputs)
        for name in ("input_ids", "position_ids"):
            if inputs.get(name) is not None:
                inputs[name] = nn.functional.pad(inputs[name], (0, more))
        if inputs.get("inputs_embeds") is not None:
            inputs["inputs_embeds"] = nn.functional.pad(inputs["inputs_embeds"], (0, 0, 0, more))
        mask = inputs.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            inputs["attention_mask"] = nn.functional.pad(mask, (0, more))
        elif mask is not None:  # padding looks at itself
            alone = torch.eye(self.length + more, dtype=torch.bool, device=mask.device)
            inputs["attention_mask"] = nn.functional.pad(mask, (0, more, 0, more)) | alone
        return args, inputs

    def cut(self, model: Any, args: Any, out: Any) -> Any:
        """Logits of the tokens that were given."""
        out["logits"] = out["logits"][:, : self.length]
        return out

    def scatter(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """This rank's tokens of hidden states [B, T, H]; gradients are gathered."""
        whole = DTensor.from_local(args[0], self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(1)]).to_local(), *args[1:]

    def gather(self, norm: nn.Module, args: Any, out: Any) -> Any:
        """Hidden states of all tokens; gradients are cut."""
        states = out if isinstance(out, Tensor) else out[0]
        parts = DTensor.from_local(states, self.mesh, [Shard(1)], run_check=False)
        whole = parts.redistribute(placements=[Replicate()]).to_local()
        return whole if isinstance(out, Tensor) else (whole, *out[1:])

    def turn(self, block: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Rotary tables of this rank's tokens."""
        tables = inputs.get("position_embeddings")
        if tables is None:
            return args, inputs
        return args, inputs | {"position_embeddings": tuple(t.chunk(self.ranks, 1)[self.rank] for t in tables)}


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of queries, keys and values [B, H, T / N, D] of this rank's tokens; returns [B, T / N, H, D]."""
    ranks = distributed.get_world_size()
    query, key, value = (exchange(part, 1, 2, ranks) for part in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return exchange(out, 1, 2, ranks), None


def exchange(x: Tensor, give: int, take: int, ranks: int) -> Tensor:
    """Dimension `give` divided over ranks, of which dimension `take` is put together in their order."""
    pieces = torch.stack(x.chunk(ranks, give))  # [N, ...], one for each rank
    found = all_to_all_single(torch.empty_like(pieces), pieces.contiguous())
    return torch.cat([*found], take)


AttentionInterface.register(ULYSSES, attend)
AttentionMaskInterface.register(ULYSSES, sdpa_mask)
