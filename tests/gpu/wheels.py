"""Gather the wheels that a GPU machine lacks which has torch and transformers, and no network.

    python tests/gpu/wheels.py [to=.wheels] [have=FILE] [peers=gemlite]

Here, in the environment of the tests, every requirement is followed through the metadata of what is installed, down to
what the machine has (`have.txt` beside this script, or another list of names). There:

    python -m pip install --no-index --no-deps --target FOLDER .wheels/*.whl
    PYTHONPATH=FOLDER python tests/gpu/run.py out=DIR
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Collection, Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from effbench.core.errors import Usage
from effbench.core.usage import nearest, parse

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LARGEST = 60_000_000  # bytes of all wheels together
MACHINE = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "python_full_version": "3.12.3",
    "python_version": "3.12",
    "sys_platform": "linux",
}
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


@dataclasses.dataclass
class Options:
    """What the script can be told."""

    to: str = ".wheels"  # folder for the wheels; must not exist
    have: str | None = None  # file that names what the machine has, a package a line
    peers: str | None = "gemlite"  # packages of the extra `peers` to take along, separated by commas


def project() -> dict[str, list[str]]:
    """Requirements of the project by extra; those without an extra under ""."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"": table["dependencies"], **table["optional-dependencies"]}


def closure(
    requirements: Iterable[str], have: Collection[str] = (), environment: Mapping[str, str] | None = None
) -> dict[str, Requirement]:
    """Everything these requirements need, by canonical name, but for what is in `have` and needed only by that.

    Packages that are not installed here end the search: what they need is not known.
    """
    found: dict[str, Requirement] = {}
    followed: set[tuple[str, str]] = set()
    facts = {**default_environment(), **(environment or {})}
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in have or (requirement.marker and not requirement.marker.evaluate({**facts, "extra": extra})):
            continue
        found.setdefault(name, requirement)
        for wanted in {"", *requirement.extras} - {extra for key, extra in followed if key == name}:
            followed.add((name, wanted))
            if installed(name) is not None:
                waiting += [(Requirement(text), wanted) for text in metadata.requires(name) or ()]
    return found


def installed(name: str) -> str | None:
    """The version of a package that is installed here."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def names(path: Path) -> set[str]:
    """Canonical names in a file of a package a line, with or without versions."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(line.partition("=")[0].strip()) for line in lines if line}


def fetch(name: str, requirement: Requirement, folder: Path) -> Path:
    """The wheel of one package, downloaded, or built where there is none and it is pure Python."""
    version = pins().get(name) or installed(name)
    wanted = f"{name}=={version}" if version else f"{requirement.name}{requirement.specifier}"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", "-d", str(folder)]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    before = set(folder.iterdir())
    done = subprocess.run([*pip, "download", "--no-deps", *target, wanted], capture_output=True, text=True)
    if done.returncode:
        done = subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), wanted], capture_output=True, text=True)
    fresh = set(folder.iterdir()) - before
    if done.returncode or len(fresh) != 1:
        raise Usage(f"{wanted}: no wheel, and none could be built: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    (path,) = fresh
    if not path.stem.endswith(("any", "x86_64")) or (done.args[4] == "wheel" and not path.stem.endswith("none-any")):
        raise Usage(f"{wanted}: {path.name} is not for the machine")
    return path


def pins() -> dict[str, str]:
    """Versions in constraints.txt by canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def main(arguments: list[str]) -> None:
    """Raises `Usage`."""
    options = parse(Options, arguments)
    to = Path(options.to)
    if to.exists():
        raise Usage(f"to={to}: exists and is not overwritten; name another folder")
    have = Path(options.have) if options.have else HERE / "have.txt"
    if not have.is_file():
        raise Usage(f"have={have}: no such file; name a list of packages, a name a line")
    requirements = project()
    peers = {canonicalize_name(Requirement(text).name): text for text in requirements["peers"]}
    for peer in (options.peers or "none").split(","):
        if peer != "none" and peer not in peers:
            raise Usage(f"peers={options.peers}: unknown {peer!r}{nearest(peer, peers)}")
        requirements[""] += [peers[peer]] if peer != "none" else []
    with tempfile.TemporaryDirectory() as temporary:
        needed = sorted(closure(requirements[""], names(have), MACHINE).items())
        wheels = [fetch(name, requirement, Path(temporary)) for name, requirement in needed]
        for wheel in wheels:
            print(f"{wheel.stat().st_size:>12,}  {wheel.name}")
        total = sum(wheel.stat().st_size for wheel in wheels)
        print(f"{total:>12,}  bytes in {len(wheels)} wheels")
        if total > LARGEST:
            raise Usage(f"{total:,} bytes are more than {LARGEST:,}; leave out peers, or name more in have=")
        shutil.copytree(temporary, to)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Usage as error:
        print(f"wheels.py: {error}", file=sys.stderr)
        sys.exit(2)
