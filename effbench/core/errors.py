"""What can go wrong, sorted by who has to act.

`Usage` is the user's to mend and ends the program with exit code 2 before anything runs.
An `Outcome` is a finding about one cell: it is recorded, with its reason, and the other cells go on.
"""

from __future__ import annotations

from typing import ClassVar


class Usage(Exception):
    """Wrong usage: one clear line that says what, where and the mend."""


class Conflict(Usage):
    """Two methods of one recipe claim the same slot of a plan."""


class Outcome(Exception):
    """A cell that did not end `ok`; `name` is the outcome, the message is the reason."""

    name: ClassVar[str] = "crashed"


class Unsupported(Outcome):
    """This architecture, device or input cannot be handled."""

    name = "unsupported"


class Unavailable(Outcome):
    """Something from outside could not be had: the network, access to a model, a package, a task's data."""

    name = "unavailable"


class Refused(Outcome):
    """The number would not mean what it says."""

    name = "refused"


class Diverged(Outcome):
    """Training or scoring left the finite numbers."""

    name = "diverged"


class OutOfMemory(Outcome):
    """The device, or a limit set by the user, had no room."""

    name = "oom"

    def __init__(self, message: str, **shortfall: int) -> None:
        super().__init__(message)
        self.shortfall = shortfall  # asked_bytes, free_bytes, total_bytes, as far as they are known


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
