"""What many records have in common, written once: environments and protocols, by digests of their content.

records/environments/<digest>.json         machine, versions of packages, commit
records/<suite>/v<version>/protocols.json  texts by digest, and the sets of them that records refer to
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec

from effbench.core.files import replace_file
from effbench.records import files
from effbench.records.record import Unreadable

ENVIRONMENTS = "environments"  # a folder that is no suite's
PROTOCOLS = "protocols.json"
SHORT = 8  # digits that tell apart the texts of one suite


class Protocols(msgspec.Struct, forbid_unknown_fields=True):
    """The protocols of one version of a suite."""

    texts: dict[str, str] = {}  # digest: how a metric was measured
    sets: dict[str, dict[str, str]] = {}  # digest: metric: digest of its text; a record refers to one set

    def add(self, protocols: dict[str, str]) -> str:
        """Take in the protocols of a record; returns the digest of their set."""
        texts = {files.digest(text.encode(), SHORT): text for text in protocols.values()}
        chosen = {metric: files.digest(text.encode(), SHORT) for metric, text in sorted(protocols.items())}
        name = files.digest(files.canonical(chosen), SHORT)
        self.texts |= texts
        self.sets[name] = chosen
        return name

    def find(self, name: str) -> dict[str, str]:
        """Metric: protocol. Raises `Unreadable` where the set or a text is missing."""
        try:
            return {metric: self.texts[text] for metric, text in self.sets[name].items()}
        except KeyError as error:
            raise Unreadable(f"no protocol {error.args[0]} in {PROTOCOLS}") from None

    def encode(self) -> bytes:
        """JSON with a line for each text and each set."""
        parts = [
            f'"{part}":{{\n'
            + ",\n".join(f'"{name}":{files.canonical(entry).decode()}' for name, entry in sorted(entries.items()))
            + "\n}"
            for part, entries in (("texts", self.texts), ("sets", self.sets))
        ]
        return ("{" + ",\n".join(parts) + "}\n").encode()


def read_protocols(folder: Path) -> Protocols:
    """The protocols of a suite's folder; none where there is no such file. Raises `Unreadable`."""
    try:
        protocols = msgspec.json.decode((folder / PROTOCOLS).read_bytes(), type=Protocols)
    except FileNotFoundError:
        return Protocols()
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Unreadable(f"not a file of protocols ({error})") from None
    wrong = [name for name, text in protocols.texts.items() if files.digest(_bytes(text), SHORT) != name]
    wrong += [name for name, chosen in protocols.sets.items() if files.digest(files.canonical(chosen), SHORT) != name]
    if wrong:
        raise Unreadable(f"the content of {wrong[0]} is not what its digest says")
    return protocols


def add_protocols(folder: Path, protocols: dict[str, str]) -> str:
    """Write the protocols of a record to a suite's folder; returns the digest of their set. Raises `OSError`."""
    name = Protocols().add(protocols)
    with contextlib.suppress(Unreadable):
        read_protocols(folder).find(name)
        return name
    with files.locked(folder):
        path = folder / PROTOCOLS
        try:
            known = read_protocols(folder)
        except Unreadable:
            os.replace(path, path.with_suffix(".damaged"))  # kept for whoever can mend it
            known = Protocols()
        known.add(protocols)
        replace_file(path, known.encode())
    return name


def add_environment(records: Path, environment: dict[str, Any]) -> str:
    """Write an environment beside the suites; returns its digest. Raises `OSError`."""
    content = files.canonical(environment)
    name = files.digest(content)
    path = records / ENVIRONMENTS / f"{name}.json"
    if not path.exists():
        files.add(path, content + b"\n")
    return name


def read_environment(records: Path, name: str) -> dict[str, Any]:
    """An environment by its digest. Raises `Unreadable`."""
    path = records / ENVIRONMENTS / f"{name}.json"
    try:
        environment = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        if files.digest(files.canonical(environment)) != name:
            raise Unreadable("its content is not what its name says")
    except FileNotFoundError:
        raise Unreadable("missing") from None
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise Unreadable(f"not an environment ({error})") from None
    return environment


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")
