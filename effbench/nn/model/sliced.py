"""Decoders whose residual stream has another basis, or fewer dimensions, at every norm.

A change of basis is one-sided: linears that read the stream take it on their inputs, those that write it on their
outputs, and each residual is carried from one basis to the next by a matrix of its own. That leaves the function
unchanged as long as norms have no weights of their own and subtract no mean, which `fuse_norms` brings about.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.opt.modeling_opt import OPTDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.pytorch_utils import Conv1D

from effbench.core.errors import Unsupported
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import put_matrix
from effbench.nn.model.tied import untie

POSITIONS = {"opt": "model.decoder.embed_positions", "gpt2": "transformer.wpe"}  # learned, by type of model


class RMS(nn.Module):
    """Divides by the root mean square over `width` channels, however many of them are left."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps

    def config(self) -> dict[str, Any]:
        """Arguments of `__init__`, for saving."""
        return {"width": self.width, "eps": self.eps}

    def extra_repr(self) -> str:
        return f"width={self.width}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square().sum(-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(square + self.eps)).to(x.dtype)


class Sliced(nn.Module):
    """A block in which both residuals change their basis. Mixed into the original class, of which it stays one:
    transformers finds blocks by their class when it records hidden states or recomputes activations."""

    shortcut_attention: nn.Parameter  # [width at the first norm, width at the second]
    shortcut_mlp: nn.Parameter  # [width at the second norm, width after the block]

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What attention adds to the stream, its norm included."""
        raise NotImplementedError

    def feed(self, hidden: Tensor) -> Tensor:
        """What the MLP adds to the stream, its norm included."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden = hidden_states @ self.shortcut_attention + self.attend(hidden_states, *args, **kwargs)
        return hidden @ self.shortcut_mlp + self.feed(hidden)


class _LlamaFamily(Sliced):
    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.self_attn(hidden_states=self.input_layernorm(hidden), **kwargs)[0])

    def feed(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(self.post_attention_layernorm(hidden)))


class SlicedLlama(_LlamaFamily, LlamaDecoderLayer):
    """A sliced block of Llama."""


class SlicedMistral(_LlamaFamily, MistralDecoderLayer):
    """A sliced block of Mistral."""


class SlicedQwen2(_LlamaFamily, Qwen2DecoderLayer):
    """A sliced block of Qwen2."""


class SlicedQwen3(_LlamaFamily, Qwen3DecoderLayer):
    """A sliced block of Qwen3."""


class SlicedOPT(Sliced, OPTDecoderLayer):
    """A sliced block of OPT, norms before attention and MLP."""

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._drop_out(self.self_attn(hidden_states=self.self_attn_layer_norm(hidden), **kwargs)[0])

    def feed(self, hidden: Tensor) -> Tensor:
        return self._drop_out(self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden)))))

    def _drop_out(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training)


class SlicedGPT2(Sliced, GPT2Block):  # type: ignore[misc]
    """A sliced block of GPT-2, without attention to an encoder."""

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        past, mask = args[:2]  # transformers passes these by position, and nothing of an encoder after them
        return cast(Tensor, self.attn(self.ln_1(hidden), past_key_values=past, attention_mask=mask, **kwargs)[0])

    def feed(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(self.ln_2(hidden)))


SLICED: dict[type[nn.Module], type[Sliced]] = {
    LlamaDecoderLayer: SlicedLlama,
    MistralDecoderLayer: SlicedMistral,
    Qwen2DecoderLayer: SlicedQwen2,
    Qwen3DecoderLayer: SlicedQwen3,
    OPTDecoderLayer: SlicedOPT,
    GPT2Block: SlicedGPT2,
}


def require_sliceable(view: Blocks) -> None:
    """Raise `Unsupported`, with the reason, unless the residual stream of this model can change its basis."""
    config, names = view.model.config, view.names
    for index, block in enumerate(view.blocks):
        path = view.path(index, "")[:-1]
        if isinstance(block, Sliced):
            raise Unsupported(f"{path}: is sliced already")
        if type(block) not in SLICED:
            raise Unsupported(f"{path}: {type(block).__name__} is not known to run its MLP after its attention")
        for name in (*names.qkv, names.out, *names.up, names.down):
            linear = block.get_submodule(name)
            if not isinstance(linear, (nn.Linear, Conv1D)):
                kind = type(linear).__name__
                raise Unsupported(f"{path}.{name}: a {kind} would become dense in another basis; put this step first")
    if not getattr(config, "do_layer_norm_before", True):
        raise Unsupported(f"{names.blocks}: norms after the sum cannot be fused into what follows")
    if getattr(config, "add_cross_attention", False):
        raise Unsupported(f"{names.blocks}: blocks that attend to an encoder cannot be sliced")
    if not isinstance(view.head, nn.Linear):
        raise Unsupported(f"the head is a {type(view.head).__name__} and cannot take a norm's weights; put this first")
    for parent, path in _norms(view):
        _shape_of_norm(parent, path)
    width, embedded = _shape_of_norm(view.model, names.norm)[0], view.embedding.get_parameter("weight").shape[1]
    if width != embedded:
        raise Unsupported(f"{names.embedding}: embeddings of width {embedded} in a stream of width {width}")


@torch.no_grad()
def fuse_norms(view: Blocks) -> None:
    """Leave every norm a division by the root mean square; the function of the model stays as it was.

    Weights and biases of norms go into the linears that read their output, the head among them, which is untied from
    the embeddings. The mean that a LayerNorm subtracts goes into everything that writes the residual stream. Raises
    `Unsupported` where this is not possible; then nothing has changed.
    """
    require_sliceable(view)
    names, head = view.names, view.head
    width, _ = _shape_of_norm(view.model, names.norm)
    centred = isinstance(view.model.get_submodule(names.norm), nn.LayerNorm)
    untie(view.model)
    for block in view.blocks:
        for norm, readers in zip(names.norms, (names.qkv, names.up), strict=True):
            _fuse_norm(block, norm, [block.get_submodule(name) for name in readers])
    _fuse_norm(view.model, names.norm, [head])
    if centred:
        centre = torch.eye(width, dtype=torch.float64, device=_matrix(head).device) - 1 / width
        turn_embeddings(view, centre)
        for block in view.blocks:
            for name in (names.out, names.down):
                turn_outputs(block.get_submodule(name), centre)


def _norms(view: Blocks) -> list[tuple[nn.Module, str]]:
    """Every norm of the residual stream: where its path starts, and its path."""
    return [(block, name) for block in view.blocks for name in view.names.norms] + [(view.model, view.names.norm)]


def _shape_of_norm(parent: nn.Module, path: str) -> tuple[int, float]:
    """Width and epsilon of a norm. Raises `Unsupported` for one that is neither LayerNorm nor RMSNorm."""
    try:
        norm = parent.get_submodule(path)
    except AttributeError:
        raise Unsupported(f"{path}: there is no norm to fuse") from None
    if isinstance(norm, nn.LayerNorm):
        return norm.normalized_shape[-1], norm.eps
    if type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon"):
        return len(norm.get_parameter("weight")), float(norm.variance_epsilon)  # type: ignore[arg-type]
    raise Unsupported(f"{path}: a {type(norm).__name__} is neither a LayerNorm nor an RMSNorm")


def _fuse_norm(parent: nn.Module, path: str, readers: list[nn.Module]) -> None:
    """Replace a norm by an `RMS`; the linears that read it multiply by its weight and add what its bias gives."""
    norm = parent.get_submodule(path)
    gain: Tensor | None = norm.weight  # type: ignore[assignment]
    shift: Tensor | None = getattr(norm, "bias", None)
    for linear in readers:
        weight, bias = _matrix(linear), cast("Tensor | None", linear.bias)
        if shift is not None:
            bias = weight @ shift.double() + (0 if bias is None else bias)
        put_matrix(linear, weight if gain is None else weight * gain.double(), bias)
    parent.set_submodule(path, RMS(*_shape_of_norm(parent, path)))


def slice_block(block: nn.Module) -> Sliced:
    """Make a block, in place, one whose residuals change their basis; its shortcuts are still to be set."""
    block.__class__ = SLICED[type(block)]
    vars(block).pop("forward", None)  # bound to the block by whoever caught its calls, it would hide the class's own
    return cast(Sliced, block)


def turn_inputs(linear: nn.Module, basis: Tensor) -> None:
    """Have a linear [out, in] read its input in `basis` (float64 [in, kept], orthonormal columns)."""
    put_matrix(linear, _matrix(linear) @ basis, None)


def turn_outputs(linear: nn.Module, basis: Tensor) -> None:
    """Have a linear [out, in] write its output in `basis` (float64 [out, kept], orthonormal columns)."""
    bias = cast("Tensor | None", linear.bias)
    put_matrix(linear, basis.T @ _matrix(linear), None if bias is None else bias.double() @ basis)


def turn_embeddings(view: Blocks, basis: Tensor) -> None:
    """Have embeddings of tokens and of positions write in `basis` (float64 [width, kept], orthonormal columns)."""
    positions = POSITIONS.get(view.model.config.model_type)  # type: ignore[union-attr, arg-type]
    for embedding in [view.embedding, *([view.model.get_submodule(positions)] if positions else [])]:
        old = embedding.get_parameter("weight")
        embedding.weight = nn.Parameter((old.detach().double() @ basis).to(old.dtype), old.requires_grad)
        embedding.embedding_dim = basis.shape[1]  # type: ignore[assignment]


def _matrix(linear: nn.Module) -> Tensor:
    """The dense weight, float64 [out, in]."""
    weight = linear.get_parameter("weight").detach().double()
    return weight.T if isinstance(linear, Conv1D) else weight
