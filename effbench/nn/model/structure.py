"""Surgery on decoder models: fewer heads, fewer neurons or fewer blocks, in tensors that really shrink."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Unsupported
from effbench.nn.model.attention import AttentionExtra
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import find_inner
from effbench.nn.model.sliced import Sliced

if TYPE_CHECKING:
    from effbench.core.run import Run


@dataclasses.dataclass(frozen=True)
class Heads:
    """How one block's attention is divided at present."""

    queries: int  # query heads
    groups: int  # key-value heads; each serves `share` consecutive query heads
    size: int  # channels of a head

    @property
    def share(self) -> int:
        """Query heads per key-value head."""
        return self.queries // self.groups


def shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear, replaced or not."""
    if isinstance(linear, Conv1D):
        return linear.weight.shape[1], linear.weight.shape[0]
    return int(linear.out_features), int(linear.in_features)  # type: ignore[arg-type]


def require_dense(view: Blocks, index: int, names: Iterable[str]) -> None:
    """Raise `Unsupported` unless the linears called `names` in block `index` are plain ones that can be cut."""
    for name in names:
        module = view.blocks[index].get_submodule(name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            kind = type(module).__name__
            raise Unsupported(f"{view.path(index, name)}: a {kind} cannot be made smaller; put this step first")


def require_no_prefix(view: Blocks, index: int) -> None:
    """Raise `Unsupported` where keys and values of its own stand in front of those of block `index`."""
    attention = find_inner(view.blocks[index].get_submodule(view.names.attention))
    for child in attention.children():
        if isinstance(child, AttentionExtra) and type(child).before is not AttentionExtra.before:
            path, kind = view.path(index, view.names.attention), type(child).__name__
            raise Unsupported(f"{path}: a {kind} holds keys and values of the heads there are; put this step first")


def find_cuttable(run: Run, view: Blocks, names: Sequence[str]) -> list[int]:
    """Blocks of whose linears called `names` none is to be left alone; raises `Unsupported` if one cannot be cut."""
    if not all(names):
        view.check_dense()
    chosen = [i for i in range(len(view)) if all(run.targeted(view.path(i, name)) for name in names)]
    if not chosen:
        raise Unsupported(f"{view.names.blocks}: every block has a linear that is to be left alone")
    for index in chosen:
        require_dense(view, index, names)
    return chosen


def keep_outputs(linear: nn.Module, index: Tensor) -> None:
    """Leave a dense linear, in place, the outputs at `index` and their biases."""
    _cut(linear, "weight", index, 1 if isinstance(linear, Conv1D) else 0)
    if linear.bias is not None:
        _cut(linear, "bias", index, 0)
    setattr(linear, "nf" if isinstance(linear, Conv1D) else "out_features", len(index))


def keep_inputs(linear: nn.Module, index: Tensor) -> None:
    """Leave a dense linear, in place, the inputs at `index`."""
    _cut(linear, "weight", index, 0 if isinstance(linear, Conv1D) else 1)
    setattr(linear, "nx" if isinstance(linear, Conv1D) else "in_features", len(index))


def _cut(linear: nn.Module, name: str, index: Tensor, dim: int) -> None:
    old = linear.get_parameter(name)
    kept = old.detach().index_select(dim, index.to(old.device))
    setattr(linear, name, nn.Parameter(kept, requires_grad=old.requires_grad))


# Heads


def heads(view: Blocks, index: int) -> Heads:
    """Heads of block `index`, from the shapes of its weights: the configuration has one number for all blocks."""
    block, names = view.blocks[index], view.names
    attention = block.get_submodule(names.attention)
    size = int(getattr(attention, "head_dim", None) or attention.head_size)  # type: ignore[arg-type]
    queries = shape(block.get_submodule(names.out))[1] // size
    if len(names.qkv) == 1:
        groups = (shape(block.get_submodule(names.qkv[0]))[0] // size - queries) // 2
    else:
        groups = shape(block.get_submodule(names.qkv[1]))[0] // size
    return Heads(queries, groups, size)


def fused_rows(view: Blocks, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the outputs of a fused projection that are queries, keys and values, each in the order of heads."""
    division = heads(view, index)
    queries, groups = division.queries * division.size, division.groups * division.size
    places = torch.arange(queries + 2 * groups)
    if not view.names.interleaved:
        found, keys, values = places.split([queries, groups, groups])
        return found, keys, values
    by_head = places.view(division.groups, division.share + 2, division.size)
    return by_head[:, :-2].flatten(), by_head[:, -2].flatten(), by_head[:, -1].flatten()


def keep_groups(view: Blocks, index: int, keep: Tensor) -> None:
    """Leave block `index` the key-value heads at `keep`, in ascending order, with the query heads they serve.

    Keys and values of all others are gone from projections and caches alike. Raises `Unsupported` where a
    projection is not dense, or where a prefix stands before the heads.
    """
    block, names = view.blocks[index], view.names
    require_dense(view, index, (*names.qkv, names.out))
    require_no_prefix(view, index)
    division = heads(view, index)
    attention = block.get_submodule(names.attention)
    served, key_value = channels(keep, division.share * division.size), channels(keep, division.size)
    outputs: tuple[Tensor, ...] = (served, key_value, key_value)
    if len(names.qkv) == 1:
        parts = zip(fused_rows(view, index), outputs, strict=True)
        outputs = (torch.cat([rows[kept] for rows, kept in parts]).sort().values,)
    for name, rows in zip(names.qkv, outputs, strict=True):
        keep_outputs(block.get_submodule(name), rows)
    keep_inputs(block.get_submodule(names.out), served)
    _set_if_there(attention, num_heads=len(keep) * division.share, split_size=len(served))


def channels(heads: Tensor, size: int) -> Tensor:
    """Indices of the channels of `heads`, each of `size` consecutive channels."""
    return (heads[:, None] * size + torch.arange(size, device=heads.device)).flatten()


# Neurons


def neurons(view: Blocks, index: int) -> int:
    """Inner width of the MLP of block `index`. Raises `Unsupported` for a mixture of experts."""
    view.check_dense()
    return shape(view.blocks[index].get_submodule(view.names.down))[1]


def keep_neurons(view: Blocks, index: int, keep: Tensor) -> None:
    """Leave the MLP of block `index` the inner channels at `keep`: rows of gate and up, columns of down.

    Raises `Unsupported` where a linear is not dense.
    """
    block, names = view.blocks[index], view.names
    require_dense(view, index, (*names.up, names.down))
    for name in names.up:
        keep_outputs(block.get_submodule(name), keep)
    keep_inputs(block.get_submodule(names.down), keep)
    _set_if_there(block.get_submodule(names.mlp), intermediate_size=len(keep))


def settle_width(view: Blocks) -> None:
    """Have the configuration say what width the MLPs have, if it is the same in every block."""
    widths = {neurons(view, index) for index in range(len(view))}
    if len(widths) == 1:
        setattr(view.model.config, view.names.width, widths.pop())


# Blocks


def keep_blocks(view: Blocks, keep: Sequence[int]) -> None:
    """Leave the model the blocks at `keep`, in ascending order, and have its configuration say so.

    Raises `Unsupported` where a block computes with its own number.
    """
    config = view.model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise Unsupported(f"{view.names.blocks}: attention is scaled by the number of its block, which would change")
    if any(isinstance(block, Sliced) for block in view.blocks):
        raise Unsupported(
            f"{view.names.blocks}: sliced blocks fit only their neighbours; put this step before slicegpt"
        )
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [types[index] for index in keep]  # type: ignore[union-attr]
    for index in sorted(set(range(len(view))) - set(keep), reverse=True):
        del view.blocks[index]
    view.renumber()


def _set_if_there(module: nn.Module, **values: int) -> None:
    for name, value in values.items():
        if hasattr(module, name):
            setattr(module, name, value)
