"""Things as they are, to be put back in place: a model, and objects that change beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class ModelMemento:
    """What a model is now: its tree, its tensors and what else its modules hold.

    Modules and parameters stay the objects they are, so that whoever holds one (a step, a hook, an adapter that has yet
    to settle) still holds it after `restore`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes = {module: dict(vars(module)) for module in model.modules()}
        values = [value for attributes in self._attributes.values() for value in attributes.values()]
        self._containers = [(value, copy.copy(value)) for value in values if isinstance(value, (dict, list, set))]
        values += [inner for value, _ in self._containers if isinstance(value, dict) for inner in value.values()]
        held = {id(value): value for value in values if isinstance(value, Tensor)}
        self._tensors = [(tensor, tensor.detach().clone(), tensor.requires_grad) for tensor in held.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Make the model what it was."""
        for module, attributes in self._attributes.items():
            vars(module).clear()
            vars(module).update(attributes)
        for container, contents in self._containers:  # in place: handles of hooks know the dictionary they are in
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(contents)
        for tensor, value, requires_grad in self._tensors:
            tensor.data = value.clone()
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
                tensor.requires_grad_(requires_grad)

    def objects(self) -> list[Any]:
        """The modules and tensors that are restored in place."""
        return [*self._attributes, *(tensor for tensor, _, _ in self._tensors)]


class ObjectMemento:
    """What the attributes of plain objects are now, or the items of dictionaries; `shared` objects are not copied.

    Raises `TypeError` for what cannot be copied, such as a generator.
    """

    def __init__(self, objects: Iterable[Any], shared: Iterable[Any]) -> None:
        self._shared = list(shared)
        self._states = [(thing, self._copy(_contents(thing))) for thing in objects]

    def restore(self) -> None:
        """Make the objects what they were."""
        for thing, state in self._states:
            contents = _contents(thing)
            contents.clear()
            contents.update(self._copy(state))

    def _copy(self, state: dict[Any, Any]) -> dict[Any, Any]:
        return copy.deepcopy(state, {id(thing): thing for thing in self._shared})


def _contents(thing: Any) -> dict[Any, Any]:
    return thing if isinstance(thing, dict) else vars(thing)
