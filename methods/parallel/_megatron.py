"""Linears of blocks divided over ranks as Megatron divides them, by torch's DTensor (Shoeybi et al., 2019)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.nn.model.attention import NAME, SLOTS
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import Added, Around, find_inner, matrix_shape
from effbench.nn.model.structure import heads

SUMMAND = "_effbench_summand"  # of parameters whose gradient is a sum over ranks


def check_heads(view: Blocks, ranks: int) -> None:
    """Raise `Unsupported` where the heads of an attention do not come out even."""
    divisions = {heads(view, index) for index in range(len(view))}
    for what, numbers in (
        ("heads", {division.queries for division in divisions}),
        ("heads of keys", {division.groups for division in divisions}),
    ):
        for number in sorted(numbers):
            if ranks > number:
                raise Unsupported(f"{ranks} ranks are more than {number} {what}: each rank needs one of its own")
            if number % ranks:
                raise Unsupported(f"{number} {what} cannot be dealt out evenly to {ranks} ranks")


def check_linears(run: Run, ranks: int) -> None:
    """Raise `Unsupported` where blocks are not made of plain linears in rows that can be dealt out by head."""
    view = Blocks(run.model)
    view.check_dense()
    names, config = view.names, view.model.config
    for path, linear in view.linears():
        if type(linear) is not nn.Linear:
            raise Unsupported(
                f"{path} is a {type(linear).__name__}: only plain linears are divided by rows and columns"
            )
    for method in run.train.chain("context"):
        raise Unsupported(f"{method} changes how linears compute, and here they lie in parts")
    for path, module in view.model.named_modules():
        if isinstance(module, (Added, Around)):
            raise Unsupported(f"{path} is a {type(module).__name__}, which reads whole activations of a block")
    if len(names.qkv) == 1 and not names.interleaved:
        raise Unsupported(f"{names.qkv[0]} holds all q, all k and all v one after the other: no head lies in one part")
    if getattr(config, "do_layer_norm_before", True) is False:
        raise Unsupported("norms behind attention and MLP stand on the residual stream, which is not divided by heads")
    for index, block in enumerate(view.blocks):
        for name in (*names.qkv, *names.up):
            width = matrix_shape(block.get_submodule(name))[0]
            if width % ranks:
                raise Unsupported(f"block {index}: {width} rows of {name} cannot be dealt out evenly to {ranks} ranks")


def has_divided_tables(view: Blocks) -> bool:
    """Whether embeddings and head are divided by the vocabulary.

    A row for padding has no gradient, which a table in parts could not tell by its own numbers.
    """
    embedding = view.embedding
    return type(embedding) is nn.Embedding and embedding.padding_idx is None and type(view.head) is nn.Linear


def list_divided(model: Any) -> set[nn.Parameter]:
    """The parameters of which `divide_blocks` leaves each rank a part. Raises `Unsupported` for mixtures of experts."""
    view = Blocks(model)
    view.check_dense()
    names = view.names
    found: set[nn.Parameter] = set()
    for block in view.blocks:
        found |= {p for name in (*names.qkv, *names.up) for p in block.get_submodule(name).parameters()}
        found |= {block.get_submodule(name).get_parameter("weight") for name in (names.out, names.down)}
    if has_divided_tables(view):
        found |= {view.embedding.get_parameter("weight"), *view.head.parameters()}
    return found


@contextlib.contextmanager
def divide_blocks(run: Run, mesh: DeviceMesh, by_sequence: bool) -> Iterator[None]:
    """Linears in parts inside: of attention by head, of the MLP by unit, tables of the vocabulary by row.

    Norms and what is added to the residual stream are of all tokens, or of this rank's `by_sequence`: then a norm's
    output is gathered, and what leaves attention and MLP is reduced and scattered.
    """
    view = Blocks(run.model)
    names = view.names
    flat = not names.mlp  # the MLP sees [B * T, H]
    for block in view.blocks:
        plan: dict[str, Any] = {}
        for norm, inside, out, dim in zip(
            names.norms, (names.qkv, names.up), (names.out, names.down), (1, 0 if flat else 1), strict=True
        ):
            stream = Shard(dim) if by_sequence else Replicate()
            plan[norm] = PrepareModuleOutput(
                output_layouts=(stream,), desired_output_layouts=(Replicate(),), use_local_output=False
            )
            plan |= dict.fromkeys(inside, ColwiseParallel())
            plan[out] = RowwiseParallel(output_layouts=stream)
        parallelize_module(block, mesh, plan, src_data_rank=None)
    embedding, head = view.embedding, view.head
    tied = head.weight is embedding.weight
    if has_divided_tables(view):
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()), src_data_rank=None)
        if tied:
            head.weight = embedding.weight
    with contextlib.ExitStack() as stack:
        for block in view.blocks:
            attention: Any = find_inner(block.get_submodule(names.attention))
            for holder in (attention, block if by_sequence else attention):
                mark(holder)
            if hasattr(attention, "num_heads"):  # which some lay out their projections by
                stack.callback(setattr, attention, "num_heads", attention.num_heads)
                attention.num_heads //= mesh.size()
        run.model.register_forward_pre_hook(check_attention)
        yield


def mark(module: nn.Module) -> None:
    """Have the gradients of a module's whole parameters summed over ranks: each sees its own heads or tokens."""
    for parameter in module.parameters():
        setattr(parameter, SUMMAND, True)


def check_attention(model: Any, *_: Any) -> None:
    """Raise `Unsupported` where attention is watched or added to, which needs all heads."""
    if model.config._attn_implementation in (NAME, SLOTS):
        raise Unsupported("a method reads or adds to attention, of which each rank has some heads alone")
