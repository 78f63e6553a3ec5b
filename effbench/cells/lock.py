"""What each version of a suite means: its rows with all their parameters, its models, data, seeds and settings by tier.

`suites/lock.json` holds that for the present version of every suite. A row may be added; one that changes or goes, and
any other change, is another meaning and needs another version, so that tables of one version are of one meaning.

A parameter that a method has gained since stands at its default in every row that does not name it, which is what the
row did before: the lock keeps which parameters there were.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from effbench.cells import suite
from effbench.cells.suite import Suite
from effbench.core.errors import Usage
from effbench.core.paths import SUITES
from effbench.core.recipe import Recipe

FILE = "lock.json"
MEND = "raise `version:` in its file, or undo the change"

Locked = dict[str, Any]  # version, parameters by method; by tier: rows (name: digest), models, data, seeds, settings


def check_lock(folder: Path = SUITES) -> list[str]:
    """A line for every suite that is not what the lock says, with the mend. Raises `Usage`."""
    lock = read_lock(folder)
    complaints = []
    for name in names(folder):
        present = describe(load(folder, name), lock.get(name))
        changes = find_changes(lock.get(name), present)
        if changes:
            complaints.append(f"suite {name} v{present['version']}: {', '.join(changes)}; {MEND}")
        elif lock.get(name) != present:
            complaints.append(f"suite {name} v{present['version']}: new rows or a new version; run `effbench lock`")
    complaints += [f"suite {name}: is no more; run `effbench lock`" for name in sorted(set(lock) - set(names(folder)))]
    return complaints


def write_lock(folder: Path = SUITES) -> bool:
    """Lock new suites, versions and rows; whether the file changed.

    Raises `Usage`, and writes nothing, where a version has changed its meaning.
    """
    lock = read_lock(folder)
    suites = {name: describe(load(folder, name), lock.get(name)) for name in names(folder)}
    for name, present in suites.items():
        if changes := find_changes(lock.get(name), present):
            raise Usage(f"suite {name} v{present['version']}: {', '.join(changes)}; {MEND}")
    if suites == lock:
        return False
    (folder / FILE).write_text(json.dumps(suites, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return True


def check_locked(chosen: Suite, folder: Path = SUITES) -> None:
    """Raise `Usage` unless the lock has the suite as it is."""
    locked = read_lock(folder).get(chosen.name)
    present = describe(chosen, locked)
    if changes := find_changes(locked, present):
        raise Usage(f"suite {chosen.name} v{chosen.version}: {', '.join(changes)}; {MEND}")
    if locked != present:
        raise Usage(f"suite {chosen.name} v{chosen.version}: has new rows or a new version; run `effbench lock` first")


def find_changes(locked: Locked | None, present: Locked) -> list[str]:
    """What of a locked version is not what it was: empty for a new suite, a higher version and added rows."""
    if locked is None or present["version"] > locked["version"]:
        return []
    if present["version"] < locked["version"]:
        return [f"version {locked['version']} was there before"]
    changes = []
    for tier, before in locked["tiers"].items():
        after = present["tiers"].get(tier)
        if after is None:
            changes.append(f"the {tier} tier is gone")
            continue
        for row, digest in before["rows"].items():
            if row not in after["rows"]:
                changes.append(f"row {row} of the {tier} tier is gone")
            elif after["rows"][row] != digest:
                changes.append(f"row {row} of the {tier} tier has changed")
        kept = ("models", "data", "seeds")
        changes += [f"{key} of the {tier} tier changed" for key in kept if before.get(key) != after.get(key)]
        settings = sorted(before["settings"].keys() | after["settings"].keys())
        changes += [
            f"{name} of the {tier} tier changed"
            for name in settings
            if before["settings"].get(name) != after["settings"].get(name)
        ]
    return changes


def describe(chosen: Suite, locked: Locked | None = None) -> Locked:
    """What a suite means, as plain values; of methods that were `locked` at the same version by the parameters that
    they had then."""
    known: dict[str, list[str]] = dict(locked["parameters"]) if locked and locked["version"] == chosen.version else {}
    for recipe in (recipe for tier in chosen.tiers.values() for recipe in tier.recipes):
        for step in recipe.resolved():
            known.setdefault(step["method"], sorted(step.keys() - {"method"}))
    tiers = {
        name: {
            "rows": {recipe.name: _digest_row(recipe, known) for recipe in tier.recipes},
            "models": list(tier.models),
            "data": tier.data,
            "seeds": list(tier.seeds),
            "settings": json.loads(json.dumps(tier.settings)),
        }
        for name, tier in chosen.tiers.items()
    }
    return {"version": chosen.version, "parameters": known, "tiers": tiers}


def read_lock(folder: Path = SUITES) -> dict[str, Locked]:
    """What is locked, by suite; empty without a file. Raises `Usage` for a file that cannot be read."""
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        for locked in lock.values():
            find_changes(locked, locked)  # has all keys
            dict(locked["parameters"])
        return dict(lock)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Usage(f"{path}: is not what `effbench lock` writes ({type(error).__name__}: {error})") from None


def names(folder: Path) -> list[str]:
    """Suites in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem != "presets")


def load(folder: Path, name: str) -> Suite:
    """A suite of a folder. Raises `Usage`."""
    return suite.load(str(folder / f"{name}.yaml"))


def _digest_row(recipe: Recipe, known: dict[str, list[str]]) -> str:
    """The steps as written, and all of these parameters as they stand."""
    steps = [
        {name: value for name, value in step.items() if name in ("method", *known[step["method"]])}
        for step in recipe.resolved()
    ]
    return hashlib.sha256(json.dumps([str(recipe), steps], sort_keys=True, default=str).encode()).hexdigest()[:16]
