"""Hollow tensors: they have shapes, types and storages but no values, so that a model of any size can be gone through.

Inside of `hollow()` tensors of floating numbers are fake ones of torch, and all code runs as it is: recipes replace
linears, fits take steps, what autograd saves is there to be counted. Whole numbers and truth values that no floating
number has a part in are real as long as they are few: places, masks, tokens. Where code asks for a value that is not
there it gets a guess, with which a run that nothing goes wrong in goes on: numbers are finite, no factorisation fails,
some but not all of what could be so is so, every other number is 1, all places of a mask are taken, numbers that are
counted are spread evenly, and what other processes tell is what this one has. Bytes that depend on values, such as
those of weights that are stored only where they are not zero, are hence those of full tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
ALIKE = ("_to_copy", "permute", "select")  # ops of whose places as many are taken
FEW = 2**20  # numbers of a tensor of whole ones that is real


class _Guess(TorchDispatchMode):
    """Answers what only values could answer."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)  # in which it looks what an op would give

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back as what it does with local tensors
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and self._may_be_real(
            name, func, args, kwargs
        ):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            if all(_is_whole(one.dtype) for one in tree_leaves(out) if isinstance(one, Tensor)):
                return out
        if func is aten._local_scalar_dense.default:
            return _guess(args[0])
        if func.namespace == "c10d":
            return self._hear(func, args, kwargs, tensors)
        if func is aten.equal.default:
            return any(getattr(tensor, "told", False) for tensor in args)
        if func is aten.bincount.default:
            return self._spread(args[0].numel(), kwargs.get("minlength", 0) or args[-1])
        if func is aten.nonzero.default:
            places = round(args[0].numel() * getattr(args[0], "share", 1))
            return args[0].new_empty((places, args[0].ndim), dtype=torch.int64)
        if func is aten.masked_select.default:
            return torch.broadcast_tensors(*args[:2])[0].flatten().clone()
        if name in ("index", "index_put", "index_put_") and any(map(_is_mask, args[1])):
            args = (args[0], _take_places(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if name.endswith("_ex"):  # of a factorisation, which says last whether it has failed
            out[-1].guess = 0
        elif isinstance(out, FakeTensor) and not func._schema.is_mutable:
            guess = _follow_truth(name, args) if out.dtype is torch.bool else None
            if guess is None and not out.ndim and not kwargs:
                guess = _follow_number(func, args, tensors)
            if guess is not None:
                out.guess = guess  # type: ignore[attr-defined]
            if (share := _follow_share(name, args)) is not None:
                out.share = share  # type: ignore[attr-defined]
        return out

    def _spread(self, number: int, places: int) -> Tensor:
        """How many of so many whole numbers are counted at each place: they are spread evenly."""
        with unset_fake_temporarily():
            return number // places + (torch.arange(places) < number % places).long()

    def _hear(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """What processes tell each other: the others hold and say what this one does."""
        known = [(tensor, _guess(tensor)) for tensor in tensors if isinstance(tensor, FakeTensor) and not tensor.ndim]
        out = func(*args, **kwargs)
        for number, guess in known:
            number.guess = guess  # type: ignore[attr-defined]
        for tensor in tensors:
            tensor.told = True  # type: ignore[attr-defined]
        return out

    def _may_be_real(self, name: str, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an op, of whose arguments none is fake, is to be tried: what it makes anew has few whole numbers."""
        if name.startswith(("empty", "new_empty")):  # which is yet to be written to
            return False
        if not name.startswith("new_") and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return True
        if (dtype := kwargs.get("dtype")) is not None and not _is_whole(dtype):
            return False
        with self._shapes:
            made = func(*args, **kwargs)
        return all(_is_whole(one.dtype) and one.numel() <= FEW for one in tree_leaves(made) if isinstance(one, Tensor))


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _follow_truth(name: str, args: Any) -> bool | None:
    """What all truth values that an op makes are, as long as all numbers are finite; None: some are, some are not."""
    first, second = args[0], args[1] if len(args) > 1 else None
    infinite = isinstance(second, float) and math.isinf(second)
    if name in ("isinf", "isnan") or (name == "eq" and infinite) or (name == "ne" and second is first):
        return False
    if (name == "ne" and infinite) or (name == "eq" and second is first):
        return True
    known = [getattr(arg, "guess", None) if isinstance(arg, FakeTensor) else None for arg in (first, second)]
    if name in ("bitwise_not", "logical_not"):
        return None if known[0] is None else not known[0]
    if name in ("bitwise_and", "logical_and", "mul"):
        return False if False in known else None if None in known else True
    if name in ("bitwise_or", "logical_or"):
        return True if True in known else None if None in known else False
    if name in ("any", "all"):
        return name == "any" if known[0] is None else bool(known[0])
    return None


def _follow_share(name: str, args: Any) -> float | None:
    """The share of places that are not zero of classes that are told apart, as by `one_hot`: each has as many."""
    if name == "eq" and isinstance(args[1], Tensor) and args[1].ndim == 1 and args[0].shape[-1:] == (1,):
        return 1 / len(args[1])
    return getattr(args[0], "share", None) if name in ALIKE else None


def _follow_number(func: Any, args: Any, tensors: list[Tensor]) -> Any:
    """A number that is computed from numbers alone, by what these are guessed to be."""
    if (
        not tensors
        or any(tensor.ndim for tensor in tensors)
        or not all(isinstance(arg, (Tensor, bool, int, float)) for arg in args)
    ):
        return None
    guesses = [(_guess(arg), arg.dtype) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    with unset_fake_temporarily():
        real = [guess if dtype is None else torch.tensor(guess, dtype=dtype) for guess, dtype in guesses]
        return func(*real).item()


def _guess(tensor: Any) -> bool | int | float:
    """The value of a tensor of one number: its own where it is known, else a guess."""
    constant = getattr(tensor, "constant", None) if isinstance(tensor, FakeTensor) else tensor
    if constant is not None:
        with unset_fake_temporarily():
            value: bool | int | float = constant.item()
        return value
    default: bool | int | float = True if tensor.dtype is torch.bool else 1.0 if tensor.is_floating_point() else 1
    guess: bool | int | float = getattr(tensor, "guess", default)
    return guess


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _take_places(indices: Any) -> list[Any]:
    """Indices with every mask as the places that it takes: all where its values are not there."""
    taken: list[Any] = []
    for index in indices:
        if _is_mask(index) and isinstance(index, FakeTensor):
            taken += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.ndim)]
        elif _is_mask(index):
            with unset_fake_temporarily():
                taken += index.nonzero(as_tuple=True)
        else:
            taken.append(index)
    return taken


@contextlib.contextmanager
def hollow() -> Iterator[None]:
    """Have tensors that are made inside be hollow; real ones become so where they meet hollow ones."""
    whole, copy = nn.Module._apply, Tensor.__deepcopy__

    def copy_any(tensor: Tensor, memo: Any) -> Any:
        if not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():
                return copy(tensor, memo)  # type: ignore[no-untyped-call]
        if id(tensor) not in memo:  # torch would copy the mode as well
            made = tensor.detach().clone()
            memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        return memo[id(tensor)]

    nn.Module._apply = _convert  # type: ignore[method-assign]
    Tensor.__deepcopy__ = copy_any  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Guess():
            yield
    finally:
        nn.Module._apply, Tensor.__deepcopy__ = whole, copy  # type: ignore[method-assign]


@torch.no_grad()
def _convert(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """What `nn.Module._apply` does, which swaps fake tensors and cannot where they are held elsewhere as well."""
    for part in module.modules() if recurse else [module]:
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and (made := function(tensor)).dtype is not tensor.dtype:
                    parameter = held is part._parameters
                    held[name] = nn.Parameter(made, tensor.requires_grad) if parameter else made
    return module
