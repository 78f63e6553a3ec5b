"""Writing of golden tensors: results of other implementations, with where they come from."""

from __future__ import annotations

import datetime
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "golden"


def write(name: str, script: str, packages: list[str], tensors: dict[str, Tensor], **facts: object) -> None:
    """Store `tensors` as `tests/golden/<name>.safetensors` with the versions of `packages`, all facts as text."""
    metadata = {package: version(package) for package in ["torch", *packages]}
    metadata |= {"script": Path(script).name, "date": datetime.date.today().isoformat()}
    metadata |= {key: str(value) for key, value in facts.items()}
    path = FOLDER / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    print(path, path.stat().st_size, metadata)
