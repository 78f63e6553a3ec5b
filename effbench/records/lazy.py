"""Content that is read when it is first looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


class Lazy(Mapping[str, Value]):
    """A mapping that calls `load` once, at its first use. Equal to a dict of the same content."""

    def __init__(self, load: Callable[[], Mapping[str, Value]]) -> None:
        self._load: Callable[[], Mapping[str, Value]] | None = load
        self._content: Mapping[str, Value] = {}

    @property
    def content(self) -> Mapping[str, Value]:
        """What was loaded."""
        if self._load is not None:
            self._content, self._load = self._load(), None
        return self._content

    def __getitem__(self, key: str) -> Value:
        return self.content[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The value, without the exception that makes `Mapping.get` slow where there is none."""
        return self.content.get(key, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self}

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[type[dict[str, Value]], tuple[dict[str, Value]]]:
        return dict, (dict(self),)  # a copy in another process has the content, not the way to it
