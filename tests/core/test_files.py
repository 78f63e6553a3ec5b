"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from effbench.core.files import create_file


def test_a_file_is_created_with_its_folders_for_everyone_to_read(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    create_file(path, "grün\r\n")
    assert path.read_bytes() == "grün\r\n".encode() and stat.S_IMODE(path.stat().st_mode) == 0o644
    create_file(tmp_path / "d", b"\x00\xff")
    assert (tmp_path / "d").read_bytes() == b"\x00\xff"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c.json", "d"]  # no temporary file is left


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("first")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(NotADirectoryError):
        create_file(tmp_path / "a" / "b", "third")


def test_of_many_writers_one_succeeds(tmp_path: Path) -> None:
    def write(number: int) -> int | None:
        try:
            create_file(tmp_path / "a", str(number) * 100_000)
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        (winner,) = [number for number in pool.map(write, range(8)) if number is not None]
    assert (tmp_path / "a").read_text() == str(winner) * 100_000 and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        create_file(tmp_path / "a", "text")
    assert list(tmp_path.iterdir()) == []
