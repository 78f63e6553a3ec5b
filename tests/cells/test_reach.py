"""A model that cannot be had is one line before any cell runs, and nothing that a record keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

from effbench import sources
from effbench.cells import local
from effbench.cli.main import main
from effbench.core.errors import Unavailable


def run(*options: str) -> int:
    return main(["run", "recipe=rtn()", "device=cpu", "results=runs", *options])


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(local.Local, "run", None)


def test_a_real_tier_without_its_model_names_the_mend(capsys: Any) -> None:
    assert run("tier=real") == 1
    out, err = capsys.readouterr()
    assert "`effbench fetch smollm2` brings it" in err or "pip install 'effbench[gguf]'" in err
    assert len(err.splitlines()) == 1 and not out and not Path("runs").exists()
    assert run("tier=real", "--dry-run") == 0


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("Name or service not known"),
        LocalEntryNotFoundError("not in the cache, and offline"),
        GatedRepoError("401", response=httpx.Response(401, request=httpx.Request("GET", "https://x"))),
        OSError("no space"),
    ],
)
def test_a_model_of_the_hub_out_of_reach(error: Exception, monkeypatch: Any, capsys: Any) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert run("model=meta-llama/Llama-3.1-8B") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("effbench: unavailable: model=meta-llama/Llama-3.1-8B cannot be had: ")
    assert not Path("runs").exists()


def test_the_revision_is_asked_for(monkeypatch: Any) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, **options: asked.append((names, options)))
    sources.check_reach(sources.model("org/name@main"))
    assert asked == [(("org/name", "config.json"), {"revision": "main"})]


def test_local_models_are_opened_by_their_cells() -> None:
    sources.check_reach(sources.model("tiny"))
    sources.check_reach(sources.model("shape:gpt2"))
    with pytest.raises(Unavailable):
        sources.check_reach(sources.model("smollm2"))
