"""Writing of golden tensors: results of other implementations, with where they come from.

Some implementations are packages, others are only found in their authors' repositories. Scripts import nothing of
effbench: what they compute shares no helper, and no mistake, with what it is compared with.
"""

from __future__ import annotations

import atexit
import datetime
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import Tensor

CLONES = Path(os.environ.get("EFFBENCH_ORACLES", Path(tempfile.gettempdir()) / "effbench-oracles"))
FOLDER = Path(__file__).resolve().parent.parent / "golden"


def write(name: str, script: str, packages: list[str], tensors: dict[str, Tensor], **facts: object) -> None:
    """Store `tensors` as `tests/golden/<name>.safetensors` with the versions of `packages`, all facts as text."""
    metadata = {package: version(package) for package in ["torch", *packages]}
    metadata |= {"script": Path(script).name, "date": datetime.date.today().isoformat()}
    metadata |= {key: str(value) for key, value in facts.items()}
    path = FOLDER / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    print(path, path.stat().st_size, metadata)


def clone(repository: str, commit: str, *paths: str, absent: tuple[str, ...] = ()) -> Path:
    """Make `paths` of a GitHub repository at `commit` importable; returns their folder.

    The repository is `EFFBENCH_ORACLES/<name>`, fetched if absent. A checkout there stays as it is.
    Modules named in `absent`, compiled for CUDA or not needed here, are stood in for; so are moves to a GPU.
    """
    source = CLONES / repository.partition("/")[2]
    if not source.is_dir():
        subprocess.run(["git", "clone", "--bare", f"https://github.com/{repository}", source], check=True)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    packed = subprocess.run(["git", "-C", source, "archive", commit, *paths], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(folder, filter="data")
    sys.path.insert(0, str(folder))
    sys.modules.update({name: MagicMock() for name in absent})
    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self: self
    torch.cuda.synchronize = lambda: None
    return folder
