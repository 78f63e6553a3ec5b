"""Published numbers: `suites/papers/*.yaml`, a file for each source, checked when it is read.

A number stands with the paper, its table and the protocol it was measured by. Numbers that effbench has no means to
measure stand there too, and say what is lacking. `suites/papers/without.yaml` names the methods of which no published
number is known, each with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from effbench.cells.suite import BASELINE, Settings, resolve
from effbench.core import plain_yaml, registry
from effbench.core.errors import Usage
from effbench.core.paths import SUITES
from effbench.core.recipe import Recipe, parse
from effbench.core.usage import Count, Positive, named_path, nearest, one_of, typed
from effbench.records.definitions import Undefined, describe

PAPERS = SUITES / "papers"
WITHOUT = "without"  # the file of methods without a number
OWN = "own"  # the model's own tokenizer
WINDOWED = "token_ppl"  # the metric that is of windows of a text


@dataclasses.dataclass
class Protocol:
    """How numbers were measured, as a paper file writes it."""

    metric: str  # the name of a metric, such as token_ppl; in words where effbench has none
    dataset: str  # what is measured, by its name on the Hub, its configuration behind it
    split: str  # of the data set
    data: str | None = None  # as in data=, what reads this data set so; None where nothing does
    join: str | None = None  # what stands between two documents
    tokens: Count | None = None  # of the text that is measured; by default all of it
    window: Count | None = None  # tokens of a window
    stride: Count | None = None  # tokens from one window to the next
    tokenizer: str = OWN  # own: the model's; else as in tokenizer=
    calibration: str | None = None  # data set, configuration and split that methods calibrate on
    says: list[str] = dataclasses.field(default_factory=list)  # words that the protocol of the record has to hold


@dataclasses.dataclass
class Number:
    """One published number as a paper file writes it."""

    name: str  # of the entry, one of its kind in the file
    method: str  # that it is a number of; baseline for the unchanged model
    model: str  # as in model=; in words where effbench cannot open it
    protocol: str  # its name in the file
    table: str  # where in the source the number stands
    value: float  # in the unit that effbench records the metric in
    tolerance: Positive | None = None  # of the value, relative; what the paper's and our run of one thing may differ by
    steps: str | None = None  # the recipe; empty for the unchanged model
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of a suite, such as calibration_sequences
    unchanged: float | None = None  # the number of the unchanged model in the same table, which is measured first
    lacks: str = ""  # what effbench lacks to measure it, with the model at hand


@dataclasses.dataclass
class PaperFile:
    """A paper file as written."""

    source: str  # arXiv:ID, or the repository that prints the numbers
    paper: str  # who, and when
    evidence: Literal["transcription", "authors"]  # a third party's copy of the table, or the authors' own page
    protocols: dict[str, Protocol]  # by name
    numbers: list[Number]
    models: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # model: what its config.json says


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published number with what its file says around it."""

    paper: str  # name of the file
    source: str
    cited: str
    number: Number
    protocol: Protocol
    config: dict[str, Any]  # what tells the model from others, by the keys of its config.json

    @property
    def name(self) -> str:
        return f"{self.paper}/{self.number.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the cell that measures it."""
        stated = {"window": self.protocol.window, "stride": self.protocol.stride, "text_tokens": self.protocol.tokens}
        given = {name: value for name, value in stated.items() if value is not None}
        return {"probes": ["perplexity"]} | given | self.number.settings


def names(folder: Path = PAPERS) -> list[str]:
    """The paper files that ship with effbench."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem != WITHOUT)


def load(name: str | None = None) -> list[Entry]:
    """The entries of a paper by its name or of a YAML file; without a name those of all papers. Raises `Usage`."""
    if name is None:
        return [entry for each in names() for entry in load(each)]
    if name.endswith((".yaml", ".yml")):
        path = named_path("paper", name)
        if not path.is_file():
            raise Usage(f"paper={name}: no such file")
    else:
        if name not in names():
            raise Usage(f"unknown paper {name!r}{nearest(name, names())}; one of your own is given as paper=FILE.yaml")
        path = PAPERS / f"{name}.yaml"
    try:
        return _check(typed(PaperFile, _read(path)), path.stem)
    except Usage as error:
        raise Usage(f"{path}: {' '.join(str(error).split())}") from None


def read_without(folder: Path = PAPERS) -> dict[str, str]:
    """Methods of which no published number is known, and why. Raises `Usage`."""
    body = _read(folder / f"{WITHOUT}.yaml")
    reasons = {str(method): reason for method, reason in body.items()}
    for method, reason in reasons.items():
        if not isinstance(reason, str) or not reason.strip():
            raise Usage(f"{folder / WITHOUT}.yaml: {method}: give the reason in words")
    return reasons


def calibrates(recipe: Recipe) -> bool:
    """Whether a step of the recipe takes statistics of calibration text."""
    return any(step.needs for step in recipe.steps)


def _read(path: Path) -> dict[str, Any]:
    try:
        body = plain_yaml.read(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise Usage(f"cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(body, dict):
        raise Usage("must hold keys such as source, paper, protocols, numbers")
    return body


def _check(file: PaperFile, stem: str) -> list[Entry]:
    """The entries of a file, each of which can be measured, or says what is lacking. Raises `Usage`."""
    if not file.numbers:
        raise Usage("numbers: is empty")
    seen: set[str] = set()
    entries = []
    for number in file.numbers:
        try:
            if number.name in seen:
                raise Usage("two numbers have this name")
            seen.add(number.name)
            one_of("protocol", number.protocol, file.protocols)
            one_of("method", number.method, (BASELINE, *registry.catalog(), *registry.presets()))
            entry = Entry(
                stem,
                file.source,
                file.paper,
                number,
                file.protocols[number.protocol],
                file.models.get(number.model, {}),
            )
            if not math.isfinite(number.value):
                raise Usage(f"value={number.value}: must be a finite number")
            if not number.lacks:
                _check_measurable(entry)
        except Usage as error:
            raise Usage(f"numbers.{number.name}: {error}") from None
        entries.append(entry)
    return entries


def _check_measurable(entry: Entry) -> None:
    """Raise `Usage` for a number that says of nothing that it lacks, and could not be measured all the same."""
    number, protocol = entry.number, entry.protocol
    for name, value in (("steps", number.steps), ("tolerance", number.tolerance), ("data", protocol.data)):
        if value is None:
            where = "protocols." + number.protocol + "." if name == "data" else ""
            raise Usage(f"{where}{name}: is missing; or say with lacks: what effbench has not to measure it")
    try:
        describe(protocol.metric)
    except Undefined as error:
        raise Usage(f"protocols.{number.protocol}.metric: {error.args[0]}") from None
    assert number.steps is not None
    if protocol.metric == WINDOWED:
        needed = ("join", "window", "stride", *(["calibration"] if calibrates(parse(number.steps)) else []))
        if missing := [name for name in needed if getattr(protocol, name) is None]:
            raise Usage(f"protocols.{number.protocol}.{missing[0]}: is missing")
    recipe = parse(number.steps).check_fits()
    used = {step.key for step in recipe.steps} or {BASELINE}
    if number.method not in used and number.method not in registry.presets():
        raise Usage(f"steps={number.steps}: is a recipe of {', '.join(sorted(used))}, and no number of {number.method}")
    typed(Settings, number.settings)
    resolve(entry.settings)
