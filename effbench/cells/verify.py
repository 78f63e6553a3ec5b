"""Published numbers against what is measured here: reproduced, off by so much, refused, or cannot run and why.

Two numbers of two protocols are never compared: what the paper states (data set, split, joining, window, stride,
tokenizer, model, recipe) is held against what would be run, and against what the record says was run.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from effbench import sources
from effbench.cells.papers import OWN, Entry, calibrates
from effbench.cells.replay import CannotRun
from effbench.core.errors import Unavailable
from effbench.core.recipe import parse
from effbench.records.record import Record
from effbench.sources import CONFIG, DataSource, Source
from effbench.sources.protocols import TEXT_TOKENS, Rows

Verdict = Literal["reproduced", "off", "refused", "cannot run", "not run yet"]
CUT = re.compile(r"\.window(?P<window>\d+)\.stride(?P<stride>\d+)\.")  # in the protocol of a perplexity


@dataclasses.dataclass(frozen=True)
class State:
    """What is known of a published number here."""

    entry: Entry
    verdict: Verdict
    why: str = ""
    measured: float | None = None
    off: float | None = None  # measured less published
    unchanged_off: float | None = None  # the same of the unchanged model, where the paper prints it
    record: str = ""  # name of the record it was measured in

    def __str__(self) -> str:
        value = self.entry.number.value
        if self.measured is None or self.off is None:
            return f"{self.verdict}{f': {self.why}' if self.why else ''}"
        share = f" ({100 * self.off / value:+.2g} %)" if value else ""
        unchanged = ""
        if self.unchanged_off is not None:
            unchanged = f"; the unchanged model is off by {self.unchanged_off:+.4g}"
        if self.verdict == "reproduced":
            return (
                f"reproduced: {self.measured:.5g}, off by {self.off:+.4g}{share}, within {self._tolerance}{unchanged}"
            )
        return f"off by {self.off:+.4g}{share}: {self.measured:.5g} here, more than {self._tolerance}{unchanged}"

    @property
    def _tolerance(self) -> str:
        return f"{100 * (self.entry.number.tolerance or 0):g} %"


class Text(NamedTuple):
    """What data are measured as, in the words of a paper file."""

    dataset: str
    split: str
    join: str
    tokens: int | None  # None: all
    calibration: str


# ---- before anything runs ----------------------------------------------------------------------------


def find_obstacle(entry: Entry, model: str | None = None) -> State | None:
    """Why a number cannot be measured here now; None where it can. `model` is where the model lies, if not at its name.

    Raises `Usage` for a `model` that names nothing.
    """
    if entry.number.lacks:
        return State(entry, "cannot run", f"effbench lacks {entry.number.lacks}")
    if wrong := list(list_mismatches(entry)):
        return State(entry, "refused", f"another protocol: {'; '.join(wrong)}")
    try:
        source = find_model(entry, model)
    except CannotRun as error:
        return State(entry, "cannot run", str(error))
    if wrong := list(list_other_config(entry, source)):
        return State(entry, "refused", f"another model: {'; '.join(wrong)}")
    return None


def list_mismatches(entry: Entry) -> Iterator[str]:
    """In what the data that the entry names are not what its protocol states."""
    protocol, data = entry.protocol, entry.protocol.data
    text = describe_text(sources.data(data))
    stated = {"dataset": protocol.dataset, "split": protocol.split, "join": protocol.join}
    if calibrates(parse(entry.number.steps or "")):
        stated["calibration"] = protocol.calibration
    for name, value in stated.items():
        if value is not None and value != (here := getattr(text, name)):
            yield f"{name} {value!r} of the paper, {here!r} of {data}"
    if protocol.window is not None and protocol.tokens is None and text.tokens is not None:
        yield f"all of the text in the paper, {text.tokens} tokens of {data}"


def describe_text(data: DataSource) -> Text:
    """How held-out text of some data is measured where settings do not say, and what methods calibrate on."""
    if (protocol := data.protocol) is None:
        return Text(data.name, "heldout", "\n\n", TEXT_TOKENS, f"{(data.learned or data).name} calibration")
    rows = protocol.heldout
    learned = f"{_name_rows(protocol.learned)} {protocol.learned.split}"
    return Text(_name_rows(rows), rows.split, rows.separator, protocol.tokens, learned)


def _name_rows(rows: Rows) -> str:
    return " ".join(filter(None, (rows.path, rows.configuration or rows.file)))


def find_model(entry: Entry, given: str | None = None) -> Source:
    """The model of an entry where it is at hand: given, a name that needs no network, or in the Hub's cache.

    Raises `CannotRun`, and `Usage` for one that is given and is not there.
    """
    tokenizer = None if entry.protocol.tokenizer == OWN else entry.protocol.tokenizer
    source = sources.model(name_model(entry, given), tokenizer)
    try:
        sources.check_reach(source)
    except Unavailable as error:
        raise CannotRun(f"needs {entry.number.model}: {error}") from None
    return source


def name_model(entry: Entry, given: str | None = None) -> str:
    """The model of an entry as `model=` names it: one of the Hub by the folder in its cache, which needs no network.

    Raises as `find_model`.
    """
    name = entry.number.model if given is None else given
    source = sources.model(name)
    return str(_find_cached(source)) if source.kind == "hub" else name


def _find_cached(source: Source) -> Path:
    """The folder of a model in the Hub's cache. Raises `CannotRun`."""
    import huggingface_hub

    config = huggingface_hub.try_to_load_from_cache(str(source.location), CONFIG, revision=source.revision)
    if not isinstance(config, str):
        raise CannotRun(f"needs {source.location}, in the Hub's cache or at model=PATH")
    folder = Path(config).parent
    if not any(folder.glob("*.safetensors")):
        raise CannotRun(f"needs {source.location}: the Hub's cache has its {CONFIG}, and no safetensors")
    return folder


def list_other_config(entry: Entry, source: Source) -> Iterator[str]:
    """In what the configuration of a model is not that of the paper's; nothing where there is none to read."""
    try:
        config = json.loads((source.path / CONFIG).read_bytes()) if source.path is not None else {}
    except (OSError, ValueError, RecursionError):
        return  # a GGUF file; and what is wrong with a folder is told when it is opened
    for name, value in entry.config.items():
        if isinstance(config, dict) and config.get(name) != value:
            yield f"{name} {config.get(name)} of {source.name}, {value} of {entry.number.model}"


# ---- with a record --------------------------------------------------------------------------------------


def judge(entry: Entry, record: Record, unchanged: Record | None, model: str | None = None) -> State:
    """The verdict on a number by the record of its cell, and by that of the unchanged model beside it."""
    if wrong := list(list_deviations(entry, record, model)):
        return State(entry, "refused", f"another protocol: {'; '.join(wrong)}", record=record.name)
    metric = record.metrics.get(entry.protocol.metric)
    if metric is None:
        why = f"{record.outcome}: {record.reason}" if record.reason else f"{entry.protocol.metric} was not measured"
        return State(entry, "cannot run", why, record=record.name)
    number = entry.number
    assert number.tolerance is not None
    off = metric.value - number.value
    unchanged_off = None
    if number.unchanged is not None and unchanged is not None and entry.protocol.metric in unchanged.metrics:
        unchanged_off = unchanged.metrics[entry.protocol.metric].value - number.unchanged
    verdict: Verdict = "reproduced" if abs(off) <= number.tolerance * abs(number.value) else "off"
    return State(entry, verdict, "", metric.value, off, unchanged_off, record.name)


def list_deviations(entry: Entry, record: Record, model: str | None = None) -> Iterator[str]:
    """In what a record was measured otherwise than the paper states; `model` is where its model lies."""
    cell, protocol = record.cell, entry.protocol
    if cell.resolved != tuple(parse(entry.number.steps or "").resolved()):
        yield f"recipe {cell.steps or 'baseline'!r}, {entry.number.steps or 'baseline'!r} of the paper"
    yield from _compare_model(entry, record, model)
    if cell.data != (shown := sources.data(protocol.data).shown):
        yield f"data {cell.data}, {shown} of the paper"
    spelled = record.protocols.get(protocol.metric, "")
    cut = CUT.search(spelled)
    stated = {name: value for name, value in entry.settings.items() if name != "probes"}
    for name in sorted(stated.keys() | ({"limit", "text_tokens"} & cell.settings.keys())):
        here = int(cut[name]) if cut and name in cut.groupdict() else cell.settings.get(name)
        if here != stated.get(name):
            yield f"{name} {_name_setting(here)}, {_name_setting(stated.get(name))} of the paper"
    for words in protocol.says if spelled else ():
        if words not in spelled:
            yield f"measured as {spelled!r}, which does not say {words!r}"


def _name_setting(value: Any) -> str:
    return "by default" if value is None else str(value)


def _compare_model(entry: Entry, record: Record, model: str | None) -> Iterator[str]:
    """In what the model of a record is not the paper's."""
    cell = record.cell
    try:
        source = find_model(entry, model)
    except CannotRun:
        source = None
    if source is not None and source.digest == cell.digests.get("model"):
        yield from list_other_config(entry, source)
    elif model is not None or cell.model.partition("@")[0] != entry.number.model:
        yield f"model {cell.model}, {model or entry.number.model} of the paper"
