"""Plain values: whatever a method or a probe leaves behind, in the types that JSON has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

DEEPEST = 50  # levels of nesting that are kept; a structure that holds itself ends here
LARGEST = 2**63  # JSON readers keep whole numbers of 64 bits


def plain(value: Any, depth: int = 0) -> Any:
    """A copy in dict, list, str, int, float, bool and None. Never raises.

    Keys become text; numbers that are not finite become None; arrays become lists; what is none of these becomes
    its text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # lone surrogates have no encoding
    if type(value) is int:
        return value if abs(value) < LARGEST else str(value)
    if type(value) is float:
        return value if math.isfinite(value) else None
    if depth >= DEEPEST:
        return "..."
    try:
        if isinstance(value, Mapping):
            return _mapping(value, depth)
        if isinstance(value, (list, tuple, set, frozenset)):
            return [plain(item, depth + 1) for item in value]
        if hasattr(value, "tolist"):  # arrays, tensors and their scalars
            return plain(value.tolist(), depth + 1)
        if isinstance(value, (int, float)):  # subclasses, such as members of an enumeration
            return plain(int(value) if isinstance(value, int) else float(value), depth + 1)
        return plain(str(value), depth + 1)
    except Exception:  # foreign code: its text may fail as well
        return f"<{type(value).__name__}>"


def _mapping(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    """Text keys first: another key whose text is the same is told apart by its type."""
    result = {plain(key): plain(item, depth + 1) for key, item in value.items() if isinstance(key, str)}
    for key, item in value.items():
        if not isinstance(key, str):
            name = str(plain(str(key)))
            result[f"{name} ({type(key).__name__})" if name in result else name] = plain(item, depth + 1)
    return result
