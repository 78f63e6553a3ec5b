"""The contract: a method is a frozen dataclass whose fields are hyper-parameters, with one verb, `apply(run)`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import typing
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from effbench.core.errors import Unsupported, Usage
from effbench.core.packages import class_file, method_key, shorten
from effbench.core.usage import PLAIN, convert, is_plain, nearest

if TYPE_CHECKING:
    from effbench.core.run import Run
    from effbench.core.views import Example, Tensor

Need = Literal["norm", "hessian", "raw", "grad", "grad_abs", "grad2"]
HOOKS = ("batch", "loss", "param_groups", "context", "on_step")  # each a chain of the train plan
BUILDERS = ("optimizer", "sampler")  # hooks that write the slot of their name
Output = Literal["logits", "hidden", "attention", "scores"]
Part = Literal["cache", "attention", "prompt", "decoder"]  # of inference
TRAIN_SLOTS = ("precision", "activations", "parallel", "optimizer", "sampler", "forward", "loss")  # of the train plan
SLOTS: dict[str, Part] = {  # of the inference plan, and the part that each changes
    "encoder": "cache",
    "reach": "cache",
    "rope": "attention",
    "decoder": "decoder",
    "memory": "prompt",
}
Alternatives = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to make a language model cheaper.

    What stands in a recipe before `fit()` prepares, what stands after acts on the trained weights; the order of the
    steps is the meaning of the recipe. Hooks are optional on every method and wired where they are overridden.
    """

    paper: ClassVar[str] = ""  # where the method was published
    published: ClassVar[str] = ""  # recipe of the paper's own setting; empty: there is none here, `caveats` say why
    caveats: ClassVar[tuple[str, ...]] = ()  # what a reader of its numbers has to know, a phrase each, for footnotes
    identity: ClassVar[dict[str, Any] | None] = None  # settings at which the model must be unchanged
    trials: ClassVar[tuple[dict[str, Any], ...]] = ({},)  # settings to test: the first by every check of the contract,
    # all of them by those of packing and saving, which run code that the defaults do not reach
    claims: ClassVar[tuple[str, ...]] = ()  # slots this method writes, e.g. "train.precision"
    consumes: ClassVar[bool] = False  # True for methods that use up the train plan (fit)
    settles: ClassVar[bool] = False  # True: needs final linears, so pending adapters are merged before it
    provides: ClassVar[frozenset[str]] = frozenset()  # what later steps may ask for, in words
    follows: ClassVar[str] = ""  # what a step before it must provide, since the last fit
    trains: ClassVar[bool] = False  # True: acts through the fit that follows
    blind: ClassVar[bool] = False  # True: chooses by prompts alone, of which it buys answers
    merges: ClassVar[bool] = False  # True: what it trains is absorbed by what stood there, at no cost afterwards
    stacks: ClassVar[bool] = False  # True: two of them may stand on one model, and both count
    sparsifies: ClassVar[bool] = False  # True: its field `sparsity` is the fraction of the weights that it sets to zero
    type: ClassVar[str] = ""  # for comparison tables: what sort of method it is; empty: its kind
    weight_update: ClassVar[str] = ""  # for comparison tables: what happens to weights that stay; empty: not said
    tuned: ClassVar[dict[str, tuple[Any, ...]]] = {}  # values worth trying, by parameter: rows of suites tune over them
    exceptions: ClassVar[dict[str, str]] = {}  # contract checks that must fail here, each with its reason
    # What a method has to define itself, all names of at least one group. A class that sets this is a base of methods.
    must_define: ClassVar[Alternatives] = (("apply",), *((hook,) for hook in (*HOOKS, *BUILDERS)))

    def __new__(cls, *_: Any, **__: Any) -> Self:
        cls.check_definition()
        return super().__new__(cls)

    @classmethod
    def check_definition(cls) -> None:
        """Raise `Usage` for a class that is no complete method, before anything runs."""
        where = f"{cls.__name__} in {class_file(cls) or cls.__module__}"
        if "__dataclass_params__" not in cls.__dict__:
            raise Usage(f"{where}: write @dataclass(frozen=True) above the class")
        base = cast(type[Method], next(ancestor for ancestor in cls.__mro__ if "must_define" in ancestor.__dict__))
        missing = [[name for name in group if getattr(cls, name) is getattr(base, name)] for group in base.must_define]
        begun = [names for names, group in zip(missing, base.must_define, strict=True) if 0 < len(names) < len(group)]
        if begun or all(missing):
            lacking = begun or missing
            own = [name for name, value in cls.__dict__.items() if callable(value) and not hasattr(base, name)]
            slips = [(name, difflib.get_close_matches(name, own, 1)) for names in lacking for name in names]
            hint = next((f"; it has {close[0]!r}: did you mean {name!r}?" for name, close in slips if close), "")
            calls = " or ".join(" and ".join(_call(base, name) for name in names) for names in lacking)
            raise Usage(f"{where} does not define {calls}{hint}")
        known = {*(f"train.{slot}" for slot in TRAIN_SLOTS), *(f"infer.{slot}" for slot in SLOTS)}
        for claim in cls.claims:
            if claim not in known:
                raise Usage(f"{where} claims {claim!r}, which nothing reads{nearest(claim, known)}")
        try:
            hints = _hints(cls)  # type: ignore[arg-type]
        except Exception as error:  # whatever an annotation raises that is no type
            raise Usage(f"{where}: {type(error).__name__}: {error}") from None
        for field in dataclasses.fields(cls):
            if not is_plain(hints[field.name]):
                raise Usage(f"{where}: {field.name}: {_name(field.type)} is no type of a parameter; {PLAIN}")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, self._convert(field.name, getattr(self, field.name)))
        self.check()

    def _convert(self, name: str, value: Any) -> Any:
        """A value as the type of the parameter `name`. Raises `Usage`."""
        return convert(value, _hints(type(self))[name], f"{self.key}.{name}")  # type: ignore[arg-type]

    @property
    def key(self) -> str:
        """Name in recipes: the stem of the file that defines the method, FILE:CLASS where no registry has it."""
        return method_key(type(self))

    def __str__(self) -> str:
        """The step in canonical form: key and the fields that differ from their defaults."""
        return f"{self.key if self.key.isidentifier() else repr(self.key)}({self._arguments()})"

    @property
    def short_key(self) -> str:
        """The key as a person writes it: a file by its path from the working folder, or by its own folder and name."""
        if self.key.isidentifier():
            return self.key
        inside = self.key.startswith(os.path.join(os.getcwd(), ""))
        return f"./{os.path.relpath(self.key)}" if inside else shorten(Path(self.key))

    @property
    def label(self) -> str:
        """The step as a person writes it."""
        return f"{self.short_key}({self._arguments()})"

    def _arguments(self) -> str:
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for field in dataclasses.fields(self):
            if field.default_factory is not dataclasses.MISSING:
                default[field.name] = self._convert(field.name, field.default_factory())
        given = {name: getattr(self, name) for name in default}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value != default[name])

    def check(self) -> None:
        """Raise `Usage` for settings that no data can make right."""

    def require(self, condition: bool, message: str) -> None:
        """Raise `Usage` naming this step unless `condition` holds."""
        if not condition:
            raise Usage(f"{self}: {message}")

    def require_teacher(self, role: str) -> None:
        """Raise `Usage` naming this step if the role that teaches is that of the model that learns."""
        self.require(role != "model", "teacher='model' is the one that learns: it has nothing to teach itself")

    @property
    def parts(self) -> tuple[Method, ...]:
        """Methods that it calls itself, which are part of what it does and hence of a cell's identity."""
        return ()

    def files(self) -> tuple[Path, ...]:
        """Files this method reads; their digests are part of a cell's identity."""
        return ()

    def check_shape(self, out: int, width: int) -> None:
        """Raise `ValueError` for a linear [out, in] that this method cannot take because of its shape."""

    def check_shapes(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Ask `check_shape` about linears, [out, in] by path. Raises `Unsupported` with the first that cannot be taken.

        Runs ask before a step begins, `--dry-run` before anything does where it has the model's configuration.
        """
        for path, shape in shapes.items():
            try:
                self.check_shape(*shape)
            except ValueError as error:
                raise Unsupported(f"{path}: {error}; leave such linears out with the setting skip") from None

    @property
    def needs(self) -> Set[Need] | None:
        """Calibration statistics that it takes; None where calibrating is no question, as for training.

        A class attribute where they are the same for all settings.
        """
        return None

    @classmethod
    def swaps(cls) -> bool:
        """Whether what it trains may be kept by name, one of several that count in turn: it has a field `adapter`."""
        return any(field.name == "adapter" for field in dataclasses.fields(cls))

    @property
    def makes(self) -> str:
        """The role that it puts a model on the shelf for; empty if none."""
        return ""

    @property
    def fills(self) -> tuple[str, ...]:
        """What it puts into the model that can be there once, by name: a soft prompt, an adapter."""
        return ()

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        """What its loss reads of models with `run.outputs`, by role; `model` is the one that is trained."""
        return {}

    @property
    def ranks(self) -> int:
        """Processes that train one model together under this method."""
        return 1

    @property
    def rounds_activations(self) -> bool:
        """Whether its linears round their inputs too, and hence differ from what their weights alone compute."""
        return False

    @property
    def asked_sparsity(self) -> float | None:
        """Fraction of the weights that are to be zero after it; None where that is no question."""
        return getattr(self, "sparsity") if self.sparsifies else None  # noqa: B009  a field of subclasses

    def slots(self) -> tuple[str, ...]:
        """All slots this method writes: those it declares, and what it builds."""
        return self.claims + tuple(f"train.{hook}" for hook in BUILDERS if self.overrides(hook))

    @property
    def touches(self) -> frozenset[Part]:
        """The parts of inference that it changes."""
        return frozenset(SLOTS[slot.removeprefix("infer.")] for slot in self.slots() if slot.startswith("infer."))

    @property
    def is_identity(self) -> bool:
        """Whether its settings are those that change nothing."""
        return self.identity is not None and all(getattr(self, name) == value for name, value in self.identity.items())

    @property
    def acts_in_fit(self) -> bool:
        """Whether the next fit of the recipe is what it acts through."""
        hooked = any(map(self.overrides, HOOKS)) or any(slot.startswith("train.") for slot in self.slots())
        return not self.consumes and (self.trains or hooked)

    def slot_values(self) -> dict[str, Any]:
        """What to write in each slot named by `claims`, by the slot's name without its plan; by default itself."""
        return {}

    def overrides(self, hook: str) -> bool:
        """Whether the class of this method defines `hook` itself."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    def apply(self, run: Run) -> None:
        """Change the run: its model, its data or its plans. Kinds do this for their methods."""
        run.attach(self)

    # Hooks of the next fit; see `effbench.nn.train.loop` for the loop with every hook in its place. They know where the
    # fit is from `run.step`; what they keep from one step to the next lies in the model, the optimizer or
    # `run.state(self)`, which checkpoints hold.

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Transform a batch before the forward pass.

        What else `loss` needs of it may lie in it under other names. Numbers [K] that are put there as `tally` come to
        `loss` as their sums over the whole step.
        """
        raise NotImplementedError

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        """Named, weighted loss terms, means over the learned tokens of the batch.

        They are added to the cross-entropy, unless the method claims the slot `train.loss`. Means that are put into
        `run.watched` are logged beside them and not learned.
        """
        raise NotImplementedError

    def param_groups(self, groups: list[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
        """Rearrange optimizer parameter groups."""
        raise NotImplementedError

    def optimizer(self, groups: list[dict[str, Any]], run: Run) -> Any:
        """Build the optimizer (claims the slot `train.optimizer`)."""
        raise NotImplementedError

    def sampler(self, examples: Sequence[Example], run: Run) -> Any:
        """Build what draws the examples of each step, see `effbench.nn.train.samplers` (claims `train.sampler`)."""
        raise NotImplementedError

    def context(self, run: Run) -> AbstractContextManager[Any]:
        """A context that encloses the whole fit; not the place for precision, see `effbench.nn.train.slots`."""
        raise NotImplementedError

    def on_step(self, run: Run) -> None:
        """Called once per optimizer step: after it, before gradients are cleared, gradients unscaled."""
        raise NotImplementedError


def _call(base: type, name: str) -> str:
    """A name that a method has to define, with its arguments."""
    value = getattr(base, name)
    return f"{name}({', '.join(list(inspect.signature(value).parameters)[1:])})" if inspect.isfunction(value) else name


def _name(kind: Any) -> str:
    """A type as it is written."""
    return kind.__name__ if isinstance(kind, type) else str(kind)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)
