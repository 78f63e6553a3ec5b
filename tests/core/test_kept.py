"""What is kept between processes is there as long as nothing that it follows from has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from effbench.core import registry
from effbench.core.kept import keep, recall

VALUE = [{"key": "a", "numbers": (1, 2.5, None), "names": {"x", "y"}}]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    for file in files:
        file.write_text("1")
    keep("value", files[:1], files, VALUE)
    assert recall("value", files[:1]) == VALUE
    return files


def test_a_change_of_any_file_is_seen(sources: list[Path]) -> None:
    state = sources[1].stat()
    os.utime(sources[1], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert recall("value", sources[:1]) is None
    os.utime(sources[1], ns=(state.st_atime_ns, state.st_mtime_ns))
    assert recall("value", sources[:1]) == VALUE
    sources[1].unlink()
    assert recall("value", sources[:1]) is None


def test_a_source_more_or_less_is_seen(sources: list[Path]) -> None:
    assert recall("value", sources) is None and recall("value", []) is None and recall("other", sources[:1]) is None


@pytest.mark.parametrize("size", [0, 10, 32, 60, -1])
def test_what_is_cut_off_or_changed_is_nothing(sources: list[Path], tmp_path: Path, size: int) -> None:
    file = tmp_path / "cache" / "value"
    file.write_bytes(file.read_bytes()[:size])
    assert recall("value", sources[:1]) is None


def test_where_nothing_can_be_written_nothing_is_kept(sources: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(sources[0] / "cache"))
    keep("value", sources[:1], sources, VALUE)
    assert recall("value", sources[:1]) is None


BODY = """
from dataclasses import dataclass

from effbench.core.kinds import Weights


@dataclass(frozen=True)
class {name}(Weights):
    paper = "arXiv:1"
    rate: float = {rate}

    def compress(self, layer):
        return layer.module
"""


def test_the_catalog_is_the_same_from_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And follows a change of a file and a new file."""
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EFFBENCH_METHODS", str(tmp_path / "mine"))
    family = tmp_path / "mine" / "prune"
    family.mkdir(parents=True)

    def write(name: str, rate: float) -> None:
        (family / f"{name.lower()}.py").write_text(BODY.format(name=name, rate=rate))

    def listed() -> dict[str, registry.Entry]:
        registry._catalog.cache_clear()
        return registry.catalog()

    write("Gone", 0.1)
    assert "gone" in listed()
    (family / "gone.py").unlink()
    write("Sparser", 0.1)
    first = listed()
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_family_entry", None)  # nothing is read
        assert listed() == first
        assert registry.load("sparser")().rate == 0.1
    assert first["sparser"].parameters["rate"].default == "0.1" and first["wanda"].facts["needs"] == {"norm"}
    write("Sparser", 0.25)
    assert listed()["sparser"].parameters["rate"].default == "0.25"
    write("Other", 0.5)
    assert set(listed()) == {*first, "other"}
    registry._catalog.cache_clear()
