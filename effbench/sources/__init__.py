"""What `model=`, `data=` and `tokenizer=` name: looked up and digested, not opened.

Names that cannot be right are `Usage`, and so is text that cannot be read. What is wrong with a model (a pickle, a
missing key) shows when it is opened, see `effbench.nn.files.load`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, TypeVar

from effbench.core.errors import Unavailable, Usage, first_line
from effbench.core.files import file_digest
from effbench.core.paths import PACKAGE, cache_folder
from effbench.core.usage import list_some, named_path, nearest
from effbench.sources import questions, smollm2
from effbench.sources.protocols import PROTOCOLS, Protocol
from effbench.sources.shapes import SHAPES
from effbench.sources.text import READERS, read_presidents, read_speeches

T = TypeVar("T")

TINY = PACKAGE / "tiny"
UPCYCLED = "tiny:moe"  # the embedded model as a mixture of experts
EXPERTS = 4  # copies of each of its MLPs
CHOSEN = 2  # of them, that a token is sent to
WORLD = ("tiny", "tiny:task", "tiny:questions", "tiny:planted")  # what the generated world has to learn from
QUESTIONS = "speeches:questions"
SPEECHES = {  # the addresses that ship, and what they have to learn from or to be asked
    "speeches": read_speeches,
    "speeches:presidents": read_presidents,
    QUESTIONS: questions.read_questions,
}
UNRESOLVED = "unresolved"  # digest of what is only known once the Hub has answered
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # org/name, and after @ a branch, tag or commit
COMMIT = re.compile(r"[0-9a-f]{40}")
OWN = re.compile(r"(gguf:|text:|jsonl:|(?!hub:|shape:))([^/]+)@[0-9a-f]{8}")  # how `_label` shows a folder or file
WITH_TOKENIZER = " with tokenizer "
CALIBRATED_ON = " calibrated on "
POSITIONS = ("max_position_embeddings", "n_positions")  # what configurations call the number of them
CONFIG = "config.json"
GGUF = ".gguf"  # suffix of the files
MODEL_FILES = {".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt", ".jinja"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A model: `tiny`, a local folder or GGUF file, a Hub id, or the shape of a public model with random weights."""

    name: str  # as shown: no two models have the same
    kind: Literal["tiny", "folder", "gguf", "hub", "shape"]
    path: Path | None = None  # of tiny, folders and files
    tokenizer: str | None = None  # tiny, a folder or a Hub id, where it is not the model's own
    digest: str = UNRESOLVED
    revision: str | None = None  # branch, tag or commit on the Hub
    experts: int = 0  # copies of each MLP that it is upcycled into; 0: it is opened as it lies there

    @property
    def location(self) -> Path | str:
        """The folder or file, or the name on the Hub."""
        if self.path is not None:
            return self.path
        hub = HUB_NAME.match(self.name)
        return hub[1] if hub is not None else self.name

    @property
    def files(self) -> tuple[Path, ...]:
        """The local files that it is read from."""
        if self.path is None:
            return ()
        return tuple(sorted(_model_files(self.path))) if self.path.is_dir() else (self.path,)

    @property
    def positions(self) -> int | None:
        """The most tokens that the model can see; None where that is only known once it is open."""
        if self.kind == "shape":
            config = SHAPES[self.name.removeprefix("shape:")]
        elif self.path is not None:
            try:
                config = json.loads((self.path / CONFIG).read_bytes())
            except (OSError, ValueError, RecursionError):
                return None
        else:
            return None
        counts = [config.get(name) for name in POSITIONS] if isinstance(config, dict) else []
        return next((count for count in counts if type(count) is int), None)


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Text to train on, calibrate on and measure on."""

    name: str
    kind: Literal["tiny", "speeches", "text", "jsonl", "hub"]
    path: Path | None = None  # of a text folder, or a file of JSON lines
    digest: str = UNRESOLVED
    columns: tuple[tuple[str, str], ...] = ()  # of data on the Hub: prompt, completion or text, and the column of each
    learned: DataSource | None = None  # what methods calibrate and train on, where it is another

    @property
    def shown(self) -> str:
        """The name, with that of what is learned from."""
        return self.name if self.learned is None else f"{self.name}{CALIBRATED_ON}{self.learned.name}"

    @property
    def protocol(self) -> Protocol | None:
        """How a paper measures on them, where their name is that of such a protocol."""
        return PROTOCOLS.get(self.name.removeprefix("hub:")) if self.kind == "hub" else None

    @property
    def task_folders(self) -> tuple[Path, ...]:
        """Folders of the lm-eval tasks that come with the data."""
        if self.name == QUESTIONS:
            return (questions.FOLDER,)
        return (TINY / "tasks",) if self.kind == "tiny" else ()


def model(name: str, tokenizer: str | None = None) -> Source:
    """The model that `model=` names. Raises `Usage`."""
    if not (
        tokenizer is None
        or tokenizer == "tiny"
        or HUB_NAME.fullmatch(tokenizer)
        or named_path("tokenizer", tokenizer).is_dir()
    ):
        hint = _hint_folder("tokenizer", Path(tokenizer))
        raise Usage(f"tokenizer={tokenizer}: {hint or 'no such folder; it is tiny, a folder, or org/name on the Hub'}")
    if name == "tiny":
        source = Source("tiny", "tiny", TINY / "model", tokenizer, _digest(_model_files(TINY / "model")))
    elif name == UPCYCLED:
        digest = _joined([_digest(_model_files(TINY / "model")), f"{CHOSEN} of {EXPERTS} experts"])
        source = Source(name, "tiny", TINY / "model", tokenizer, digest, experts=EXPERTS)
    elif name.startswith("shape:"):
        source = Source(name, "shape", None, tokenizer, _shape_digest(name.removeprefix("shape:")))
    elif name == smollm2.NAME:
        source = Source(name, "gguf", cache_folder() / smollm2.FILE, tokenizer, smollm2.DIGEST)
    elif name.startswith("gguf:"):
        file = named_path("model", name.removeprefix("gguf:")).resolve()
        if not file.is_file():
            raise Usage(f"model={name}: {_hint_gguf(file) or 'no such file'}")
        if lacking := _find_lacking_reader():
            raise Usage(f"model={name}: {lacking}")
        digest = file_digest(file)
        source = Source(f"gguf:{_label(file, digest)}", "gguf", file, tokenizer, digest)
    elif (folder := named_path("model", name)).is_dir():
        if not (folder / CONFIG).is_file():
            raise Usage(f"model={name}: {_hint_gguf(folder) or f'the folder has no {CONFIG}'}")
        folder, digest = folder.resolve(), _digest(_model_files(folder))
        source = Source(_label(folder, digest), "folder", folder, tokenizer, digest)
    elif folder.is_file() or folder.suffix == GGUF:
        raise Usage(f"model={name}: {_hint_file(folder)}")
    elif (match := HUB_NAME.fullmatch(name)) and not name.startswith("."):
        fixed = match[2] is not None and COMMIT.fullmatch(match[2])
        source = Source(name, "hub", None, tokenizer, name if fixed else UNRESOLVED, match[2])
    else:
        raise Usage(
            f"model={name}: no such folder; a model is tiny, tiny:moe, smollm2, a folder, gguf:FILE, shape:NAME, or "
            "org/name or org/name@REVISION on the Hub"
        )
    if tokenizer is None or source.kind == "shape":  # which has no use for text
        return source
    folder = TINY / "model" if tokenizer == "tiny" else named_path("tokenizer", tokenizer)
    digest = _digest(_model_files(folder)) if folder.is_dir() else tokenizer
    shown = _label(folder.resolve(), digest) if folder.is_dir() and tokenizer != "tiny" else tokenizer
    name = f"{source.name}{WITH_TOKENIZER}{shown}"
    return dataclasses.replace(source, name=name, digest=_joined([source.digest, digest]))


def fixed_model(name: str) -> Source:
    """The model of that name for a step that reads another than the run's: it is there, and stays what it is.

    Raises `Usage`.
    """
    source = model(name)
    if source.kind == "shape":
        raise Usage(f"model={name}: a shape has random weights: there is nothing in it")
    if source.kind == "hub" and source.digest == UNRESOLVED:
        raise Usage("what a name on the Hub stands for may change: write org/name@COMMIT, with all 40 digits")
    if source.kind == "gguf":
        try:
            open_file(source)
        except Unavailable as error:
            raise Usage(str(error)) from None
    return source


def find_model(shown: str) -> Source | None:
    """The model that was shown under this name; None where a folder or file of that name is not in the working folder.

    How a folder is shown does not say where it lies. Raises `Usage` for a name that no model can have.
    """
    return _find(model, shown, WITH_TOKENIZER)


def find_data(shown: str) -> DataSource | None:
    """The data that were shown under this name; None and errors as of `find_model`."""
    return _find(data, shown, CALIBRATED_ON)


def _find(look_up: Callable[..., T], shown: str, between: str) -> T | None:
    """What was shown under a name, or under two with a word between them."""
    parts = [(part, OWN.fullmatch(part)) for part in shown.split(between)]
    names = [part if own is None else f"{own[1]}{Path(own[2]).absolute()}" for part, own in parts]
    try:
        return look_up(*names)
    except Usage:
        if any(own for _, own in parts):
            return None
        raise


def check_reach(source: Source) -> None:
    """Raise `Unavailable` for a model that cannot be had, as far as that shows without loading it."""
    if source.kind == "gguf":
        open_file(source)
    elif source.kind == "hub":
        import huggingface_hub

        try:
            huggingface_hub.hf_hub_download(str(source.location), CONFIG, revision=source.revision)
        except Exception as error:  # of the network, of access, of the name, of the disk
            raise Unavailable(f"model={source.name} cannot be had: {first_line(error)}") from error


def open_file(source: Source) -> Path:
    """The GGUF file of a source. Raises `Unavailable` if it or what reads it is not there."""
    path = source.path
    assert path is not None
    if lacking := _find_lacking_reader():
        raise Unavailable(lacking)
    if is_fetched(source) and not smollm2.is_there(path.parent):
        raise Unavailable(f"{path} is not there or not whole: `effbench fetch smollm2` brings it")
    if not path.is_file():
        raise Unavailable(f"{path} is not there any more")
    return path


def is_fetched(source: Source) -> bool:
    """Whether a source is the file that `effbench fetch` brings, which is known by its digest."""
    return source.path == cache_folder() / smollm2.FILE


def _hint_file(path: Path) -> str:
    """What to write in place of a file that is given as a model."""
    return _hint_gguf(path) or _hint_folder("model", path) or "is a file; a model is a folder or gguf:FILE"


def _hint_gguf(path: Path) -> str:
    """What to write where GGUF files are meant: by their own name, or by that of their folder; empty if none are."""
    if path.is_dir():
        found = sorted(file.name for file in path.glob(f"*{GGUF}"))
        return f"is a folder with {list_some(found)}; write model=gguf:{path / found[0]}" if found else ""
    if path.suffix != GGUF:
        return ""
    return f"write model=gguf:{path}" if path.is_file() else "no such file; GGUF files are written gguf:FILE"


def _hint_folder(option: str, path: Path) -> str:
    """That the folder is to be named where a file of it is; empty for what is no file of a model."""
    of_model = path.is_file() and path.suffix in MODEL_FILES and (path.parent / CONFIG).is_file()
    return f"is a file; write {option}={path.parent}, the folder that holds it" if of_model else ""


def _find_lacking_reader() -> str:
    """Which package that reads GGUF files is not installed, with the mend; empty if none."""
    there = importlib.util.find_spec("gguf") is not None
    return "" if there else "GGUF files need the package gguf: pip install 'effbench[gguf]'"


def _label(path: Path, digest: str) -> str:
    """How a folder or file is shown: its own name, and what tells it from others of that name."""
    return f"{path.name}@{digest[:8]}"


def data(name: str | None, learned: str | None = None) -> DataSource:
    """The data that `data=` names; without it the generated world of the tiny model. Raises `Usage`.

    learned  what `calibration_data=` names: methods calibrate and train on that instead
    """
    source = _data("data", name or "tiny")
    if learned is None:
        return source
    other = _data("calibration_data", learned)
    digests = [source.digest, other.digest]
    return dataclasses.replace(
        source,
        digest=UNRESOLVED if UNRESOLVED in digests else _joined(digests),
        learned=other,
    )


def _data(option: str, name: str) -> DataSource:
    kind, _, rest = name.partition(":")
    if name in WORLD:
        own = ("planted.py",) if name == "tiny:planted" else ()
        return DataSource(name, "tiny", None, _digest(_files(TINY, ("__init__.py", "world.py", "data/*", *own))))
    if name in SPEECHES:
        return DataSource(name, "speeches", None, SPEECHES[name]().digest)
    if kind in READERS and rest:
        path = named_path(option, rest)
        if not (path.is_dir() if kind == "text" else path.is_file()):
            raise Usage(f"{option}={name}: no such {'folder' if kind == 'text' else 'file'}")
        try:
            digest = READERS[kind](path).digest
        except Usage as error:
            raise Usage(f"{option}={kind}:{error}") from None
        return DataSource(f"{kind}:{_label(path.resolve(), digest)}", kind, path.resolve(), digest)  # type: ignore[arg-type]
    if kind == "hub" and rest:
        place, columns = _read_columns(f"{option}={name}", rest)
        return DataSource(f"hub:{place}", "hub", columns=columns)
    raise Usage(f"{option}={name}: must be {', '.join((*WORLD, *SPEECHES))}, text:FOLDER, jsonl:FILE or hub:NAME")


def _read_columns(asked: str, rest: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The address of data on the Hub, and the columns that stand in brackets behind it. Raises `Usage`."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", rest)
    if match is None:
        raise Usage(f"{asked}: brackets do not match; write hub:NAME[prompt=COLUMN,completion=COLUMN]")
    if match[2] is None:
        return rest, ()
    columns = dict(part.strip().split("=", 1) for part in match[2].split(",") if "=" in part)
    if sorted(columns) not in (["completion", "prompt"], ["text"]) or match[2].count("=") != len(columns):
        raise Usage(f"{asked}: brackets name prompt and completion, or text alone: [prompt=COLUMN,completion=COLUMN]")
    return rest, tuple(sorted(columns.items()))


def task_digest() -> str:
    """Digest of the tasks: our own files, and the version of lm-eval that brings the others."""
    from importlib.metadata import version

    return _joined([_digest(_files(TINY, ("tasks/*", "data/*"))), version("lm-eval")])


def _digest(files: Iterable[Path]) -> str:
    """Digest of file names and contents, without the folders they are in."""
    return _joined(f"{path.name} {file_digest(path)}" for path in sorted(files))


def _joined(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    paths = [path for pattern in patterns for path in folder.glob(pattern)]
    return [path for path in paths if path.is_file() and not path.name.startswith(".")]


def _model_files(folder: Path) -> list[Path]:
    return [path for path in _files(folder, ("*",)) if path.suffix in MODEL_FILES]


def _shape_digest(name: str) -> str:
    if name not in SHAPES:
        raise Usage(f"unknown shape {name!r}{nearest(name, SHAPES)}")
    return _joined([json.dumps(SHAPES[name], sort_keys=True)])
