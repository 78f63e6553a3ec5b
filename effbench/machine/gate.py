"""The gate of a device: cells work side by side, and one that times something has the device to itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from effbench.machine.devices import Device


def idle(gate: Path) -> bool:
    """Whether no cell holds the file alone: of a device, that none is timing, so that a new process disturbs nobody."""
    file = _open(gate)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def gate_file(device: Device) -> Path:
    """The lock file of a device, the same for every program on this machine, whatever it sees and calls it."""
    name = device.uuid or (f"cuda-{device.visible}" if device.visible else device.name)
    path = Path(tempfile.gettempdir()) / f"effbench-{name}.lock"
    os.close(_open(path))
    return path


def _open(path: Path) -> int:
    """A handle of a lock file, which is made anew if somebody has removed it, or the folder it was in.

    Cells that hold a removed file then share the device with those that lock the new one, until they end.
    """
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)  # locking needs no right to write, and others' files give none
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o644)


Tell = Callable[..., None]  # news of a cell for the runner: phase=..., waiting=True, environment={...}


class Gate:
    """Cells work side by side; a probe that times something has the device to itself.

    A lock on one file per device: shared while working, exclusive while timing. Any number of programs on one
    machine may use it, and it opens when a process dies. Who waits to be alone holds a second file meanwhile, the
    turn, which others pass before they begin, and for which those at work give way.
    """

    def __init__(self, path: Path, tell: Tell) -> None:
        self._path = path
        self._turn_path = path.with_suffix(".turn")
        self._tell = tell
        self._alone = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Work beside other cells, once none of them is timing or waits to."""
        self._file = _open(self._path)
        try:
            self._come_in(fcntl.LOCK_SH)
            yield
        finally:
            os.close(self._file)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside `shared`: wait until no other cell works, and keep them all waiting."""
        self._come_in(fcntl.LOCK_EX)
        self._alone = True
        try:
            yield
        finally:
            self._alone = False
            _lock(self._file, fcntl.LOCK_SH, self._tell)

    @property
    def wanted(self) -> bool:
        """Whether somebody waits to be alone while this cell works beside others."""
        return not self._alone and not idle(self._turn_path)

    def give_way(self) -> None:
        """Inside `shared`, between two pieces of work: let those pass who wait to be alone."""
        self._come_in(fcntl.LOCK_SH)

    def _come_in(self, mode: int) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)  # else two that wait for their turn keep each other waiting
        with self._turn(mode):
            _lock(self._file, mode, self._tell)

    @contextlib.contextmanager
    def _turn(self, mode: int) -> Iterator[None]:
        file = _open(self._turn_path)
        try:
            _lock(file, mode, self._tell)
            yield
        finally:
            os.close(file)


def _lock(file: int, mode: int, tell: Tell) -> None:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        tell(waiting=True)
        fcntl.flock(file, mode)
        tell(waiting=False)
