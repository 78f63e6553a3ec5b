"""The questions that every linear answers, replaced or not.

`dense_weight(m)`   the matrix it multiplies by, [out, in]
`dense_bias(m)`     what it adds, [out], or None
`stored_bytes(m)`   what it occupies in a saved artifact, weights and metadata apart
`kept(m)`           which weights may differ from zero, bool [out, in], or None when all may
`rebuilt(m, w)`     the same container holding another matrix

A method that replaces a linear returns a `Replaced`; everything else (merging, training, saving, counting) goes
through these and never asks which method it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effbench.core.packages import shorten

if TYPE_CHECKING:
    from effbench.core.method import Method


class Bytes(NamedTuple):
    """Stored bytes: the weights themselves, and what is needed to read them (scales, zero-points, indices)."""

    weights: int
    metadata: int

    def __add__(self, other: object) -> Bytes:
        assert isinstance(other, Bytes)
        return Bytes(self.weights + other.weights, self.metadata + other.metadata)


class Storage(NamedTuple):
    """Dtypes of dense parameters in a saved artifact, where they are not one."""

    matrices: torch.dtype
    vectors: torch.dtype  # norms and biases

    def __str__(self) -> str:
        return f"{self.matrices}, vectors in {self.vectors}"


class Replaced(nn.Module):
    """A module that stands where a linear stood and computes y = x W^T + b.

    Subclasses keep their tensors as buffers or parameters; what `config()` returns must rebuild an empty instance
    (`cls(**config)`) whose state dict has the same names, shapes and dtypes.
    """

    metadata: ClassVar[frozenset[str]] = frozenset()  # names of tensors that only describe the weights
    simulated: ClassVar[bool] = False  # True: computes like the compressed form but is not stored as it

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias: nn.Parameter | None = None

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config().items())

    @property
    def decodes(self) -> bool:
        """Whether it computes nothing but x W^T + b, and decodes W in each call."""
        return False

    def dense_weight(self) -> Tensor:
        """The matrix this module multiplies by, float32 [out, in]."""
        raise NotImplementedError

    def dense_bias(self) -> Tensor | None:
        """What this module adds to x W^T, [out]; None: nothing."""
        return self.bias

    def kept(self) -> Tensor | None:
        """Bool [out, in], False where the weight is held at zero; None when no weight is."""
        return None

    def rebuilt(self, weight: Tensor) -> nn.Module:
        """The same container holding `weight` [out, in], rounded to what it can represent."""
        raise NotImplementedError

    def pack(self, storage: torch.dtype | Storage) -> nn.Module:
        """The form an artifact stores whose dense tensors are kept in `storage`, taken on at the end of a recipe; by
        default itself.
        """
        return self

    def config(self) -> dict[str, Any]:
        """Arguments of `__init__` as plain values, for saving."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
        }


class MaskedLinear(Replaced):
    """A dense linear some of whose weights are held at zero, through training and compression alike."""

    metadata = frozenset({"mask"})
    mask: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        words = -(-in_features // 8)
        self.register_buffer("mask", torch.zeros(out_features, words, dtype=torch.uint8))

    @classmethod
    def of(cls, weight: Tensor, keep: Tensor, bias: Tensor | None = None) -> Self:
        """Hold `weight` [out, in] where `keep` (bool [out, in]) is True and zero elsewhere."""
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, bias is not None).to(weight.device)
        module.weight.data = weight * keep
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())
        padded = nn.functional.pad(keep, (0, -in_features % 8)).view(out_features, -1, 8)
        place = torch.arange(8, device=keep.device)
        module.mask = (padded.to(torch.uint8) << place).sum(-1).to(torch.uint8)
        return module

    def kept(self) -> Tensor:
        bits = self.mask.unsqueeze(-1) >> torch.arange(8, device=self.mask.device) & 1
        return bits.flatten(1)[:, : self.in_features].bool()

    def dense_weight(self) -> Tensor:
        return self.weight.float()

    def rebuilt(self, weight: Tensor) -> MaskedLinear:
        return MaskedLinear.of(weight.to(self.weight.dtype), self.kept(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Added(nn.Module):
    """What a method has added and no configuration describes; linears in it are not the model's own.

    One that belongs to an adapter counts only while that is chosen, see `effbench.nn.model.adapters`.
    """

    adapter: str = ""
    active: bool = True

    def config(self) -> dict[str, Any]:
        """Arguments of `__init__` as plain values, for saving."""
        raise NotImplementedError


class Around(nn.Module):
    """Stands where a module of any kind stood and holds it as `inner`: an adapter behind an MLP, a gate on attention.

    What is inside keeps its paths: `mlp.up_proj` is found and replaced through whatever stands at `mlp`. `config()`
    gives plain values that build an instance anew, `cls(inner, **config)`. One that belongs to an adapter counts only
    while that is chosen, see `effbench.nn.model.adapters`.
    """

    adapter: str = ""
    active: bool = True

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def config(self) -> dict[str, Any]:
        """Arguments of `__init__` besides `inner`, as plain values, for saving."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner: Any = super().__getattr__("inner")
            return getattr(find_inner(inner), name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get("inner")
        target = None if inner is None else find_inner(inner)  # what others round it hold is their own
        if target is not None and name in dict(target.named_children()):
            setattr(target, name, value)
        else:
            super().__setattr__(name, value)


def find_inner(module: nn.Module) -> nn.Module:
    """The module itself, inside of what stands round it."""
    while isinstance(module, Around):
        module = module.inner
    return module


LINEARS = (nn.Linear, Conv1D, Replaced)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """[out, in] of the matrix that a linear multiplies by."""
    if isinstance(module, Replaced):
        return module.out_features, module.in_features
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_weight(module: nn.Module) -> Tensor:
    """The matrix that `module` multiplies by, float32 [out, in]."""
    if isinstance(module, Replaced):
        return module.dense_weight()
    weight: Tensor = module.get_parameter("weight").detach()
    return (weight.T if isinstance(module, Conv1D) else weight).float()


def dense_bias(module: nn.Module) -> Tensor | None:
    """What `module` adds to x W^T, [out]; None: nothing."""
    bias: Tensor | None = module.dense_bias() if isinstance(module, Replaced) else getattr(module, "bias", None)
    return bias


def stored_bytes(module: nn.Module, storage: torch.dtype | Storage) -> Bytes:
    """Bytes of `module` in a saved artifact whose dense tensors are kept in `storage`; what is shared counts once."""
    weights = described = 0
    for name, tensor in stored_tensors(module):
        size = tensor.numel() * stored_as(name, tensor, storage).itemsize
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(owner, Replaced) and last in owner.metadata:
            described += size
        else:
            weights += size
    return Bytes(weights, described)


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `module` that a saved artifact holds, with its name."""
    yield from module.named_parameters()
    for path, owner in module.named_modules():
        for name, tensor in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, tensor


def stored_as(name: str, tensor: Tensor, storage: torch.dtype | Storage) -> torch.dtype:
    """Dtype an artifact keeps a tensor in: dense parameters in `storage`, buffers (codes, scales) as they are."""
    if not isinstance(tensor, nn.Parameter) or tensor.dtype not in (torch.float32, torch.float64):
        return tensor.dtype
    if isinstance(storage, Storage) and is_vector(name, tensor.ndim):
        return storage.vectors
    return matrix_dtype(storage)


def matrix_dtype(storage: torch.dtype | Storage) -> torch.dtype:
    """Dtype that dense matrices are kept in."""
    return storage.matrices if isinstance(storage, Storage) else storage


def is_vector(name: str, dimensions: int) -> bool:
    """Whether a tensor is a norm's weight or a bias; values and scales of packed matrices lie in a row as well."""
    return dimensions == 1 and name.rpartition(".")[2] in ("weight", "bias")


def kept(module: nn.Module) -> Tensor | None:
    """Bool [out, in], False where a weight is held at zero; None when no weight is."""
    return module.kept() if isinstance(module, Replaced) else None


def rebuilt(module: nn.Module, weight: Tensor) -> nn.Module:
    """The same container holding `weight` [out, in]."""
    if isinstance(module, Replaced):
        return module.rebuilt(weight)
    return make_linear(weight.to(module.weight.dtype), module.bias)  # type: ignore[arg-type]


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A plain linear that holds `weight` [out, in] and a copy of `bias`."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def put_matrix(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a dense linear, in place, another weight [out, in], and another bias [out] unless that is None."""
    old = linear.get_parameter("weight")
    if isinstance(linear, Conv1D):
        weight = weight.T
        linear.nx, linear.nf = weight.shape
    else:
        linear.out_features, linear.in_features = weight.shape  # type: ignore[assignment]
    linear.weight = nn.Parameter(weight.to(old.dtype).contiguous(), old.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(old.dtype), old.requires_grad)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def top_linears(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linears under `root` with their paths; what lies inside a replaced linear is not visited."""
    for name, child in root.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, LINEARS):
            yield path, child
        elif isinstance(child, Around):
            yield from top_linears(find_inner(child), path)
        elif not isinstance(child, Added):
            yield from top_linears(child, path)


def check_module(module: Any, method: Method, verb: str, before: nn.Module) -> None:
    """Raise `TypeError` unless what `verb` of a method returned is a module that can take the place of `before`."""
    if not isinstance(before, LINEARS) and isinstance(module, nn.Module):
        return
    if not isinstance(module, LINEARS):
        raise wrong_return(method, verb, module, "a linear module")
    if matrix_shape(module) != matrix_shape(before):
        raise wrong_return(method, verb, module, f"one of shape {list(matrix_shape(before))}")


def wrong_return(method: Method, verb: str, value: Any, wanted: str) -> TypeError:
    """The error of a method whose `verb` returned a value that is not what is wanted; it names the place."""
    returned = "None" if value is None else f"a {type(value).__name__}"
    if isinstance(value, LINEARS):
        returned += f" of shape {list(matrix_shape(value))}"
    code = inspect.unwrap(getattr(type(method), verb)).__code__
    where = f"{shorten(Path(code.co_filename))}:{code.co_firstlineno}"
    return TypeError(f"{type(method).__name__}.{verb} returned {returned}; it must return {wanted} ({where})")
