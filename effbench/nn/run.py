"""A run on a transformers model: what the kinds ask of it, done with torch."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.method import HOOKS, Method
from effbench.core.run import InferPlan, Run, TrainPlan
from effbench.nn import calibration
from effbench.nn.data import LONGEST, SEQUENCES, Data, Segments
from effbench.nn.infer.engine import Engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import Replaced, kept, stored_as, stored_bytes, stored_tensors
from effbench.nn.train import fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from effbench.core.kinds import Select, Swap, Weights
    from effbench.sources import Source


@dataclasses.dataclass
class Swapped:
    """A module that a `Swap` put in place and that has not settled yet."""

    module: nn.Module  # not its path: blocks may be dropped before it settles
    method: Swap
    held: bool  # whether zeros of the linear that stood there were held
    trained: bool = False


class Original(NamedTuple):
    """What the model was before the recipe; known without loading it again."""

    stored_bytes: int
    parameters: int


class ModelRun(Run):
    """One recipe on one model."""

    def __init__(
        self,
        source: Source,
        model: Any,
        reference: Callable[[], Any],
        tokenizer: Any,
        data: Data,
        *,
        device: torch.device,
        storage: torch.dtype,
        seed: int = 0,
        sequences: int = SEQUENCES,
        length: int | None = None,
        skip: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.data = data
        self.device = device
        self.storage = storage  # dtype in which an artifact keeps dense tensors
        self.seed = seed
        self.train = TrainPlan()
        self.infer = InferPlan()
        self.log: dict[str, Any] = {"steps": []}
        self.noted: dict[Any, Any] = {}  # what one probe found on its way to its own numbers and another needs
        self._reference = reference
        self._shelf: dict[str, Any] = {}
        self._swapped: list[Swapped] = []
        self._calibration = (sequences, length or min(LONGEST, self.engine().max_length))
        self._skip = skip
        narrow(self.model, storage)
        self.original = Original(sum(stored_bytes(model, storage)), sum(p.numel() for p in model.parameters()))
        self._before = _fingerprint(model)
        self._changed_otherwise = False

    @functools.cached_property
    def reference(self) -> Any:  # type: ignore[override]
        """The unchanged original as it is stored, frozen, loaded when first asked for."""
        model = self._reference().eval().requires_grad_(False)
        narrow(model, self.storage)
        return model

    @property
    def pad(self) -> int:
        """Token id for padding."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    def engine(self, model: Any = None) -> Engine:
        """Scores and generates with the model, or another, through the inference plan."""
        return Engine(self.model, self.infer, self.pad) if model is None else Engine(model, InferPlan(), self.pad)

    def targeted(self, path: str) -> bool:
        """Whether methods may replace the linear at `path` (not skipped by a pattern)."""
        return not any(fnmatch.fnmatch(path, pattern) for pattern in self._skip)

    def calibration(self) -> Tensor:
        """[sequences, length] calibration tokens of this run's seed."""
        sequences, length = self._calibration
        ids = self.data.calibration(sequences, length, self.seed)
        self.log["calibration_sequences"], self.log["calibration_tokens"] = len(ids), ids.numel()
        return ids

    def rewrite(self, segments: Segments) -> Segments:
        """A prompt after the plan's prompt methods, in their order."""
        for method in self.infer.chain("prompt"):
            segments = method.rewrite(segments, self)
        return segments

    # What the kinds ask for.

    def stream(self, method: Weights) -> None:
        self.settle()
        calibration.stream(self, method, method.prepare(self))

    def swap(self, method: Swap) -> None:
        self.settle()
        self.model.requires_grad_(False)
        linears = {path: module for path, module in Blocks(self.model).linears() if self.targeted(path)}
        chosen = [path for path in linears if method.wants(path)]
        if not chosen:
            names = sorted({path.rpartition(".")[2] for path in linears})
            raise Unsupported(f"none of the linears is a target; they are called {', '.join(names)}")
        with torch.random.fork_rng(devices=[]):  # new parameters depend on the seed alone, not on what was drawn before
            torch.manual_seed(self.seed)
            for path in chosen:
                held = kept(linears[path]) is not None
                new = method.replace(linears[path])
                calibration.check_module(new, method, "replace")
                new = new.to(self.device)
                calibration.replace(self.model, path, new)
                self._swapped.append(Swapped(new, method, held))

    def settle(self) -> None:
        trained = [entry for entry in self._swapped if entry.trained]
        if trained:
            paths = {module: path for path, module in self.model.named_modules()}
        for entry in trained:
            if entry.module in paths:  # its block may be gone
                path, final = paths[entry.module], entry.method.settle(entry.module)
                calibration.check_module(final, entry.method, "settle")
                if entry.held and final is not entry.module and kept(final) is None:
                    self.log.setdefault("densified", []).append(path)
                dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
                calibration.replace(self.model, path, final.to(dtype))
            self._swapped.remove(entry)

    def select(self, method: Select) -> None:
        examples = self.data.train
        order = list(method.order(examples, self))
        if not order:
            raise Unsupported(f"{method}: nothing was selected")
        self.data.train = [examples[i] for i in order]
        self.log.setdefault("selected", {})[str(method)] = len(order)
        self._changed_otherwise = True

    def attach(self, method: Method) -> None:
        for slot in method.claims:
            plan = self.train if slot.startswith("train.") else self.infer
            name = slot.partition(".")[2]
            values: dict[str, Any] = getattr(method, "slot_values", dict)()
            plan.claim(name, values.get(name, method), method)
        if method.overrides("optimizer"):
            self.train.claim("optimizer", method, method)
        for hook in HOOKS:
            if hook != "optimizer" and method.overrides(hook):
                self.train.chain(hook).append(method)

    def fit(self, **settings: Any) -> dict[str, Any]:
        try:
            report = fit.fit(self, **settings)
        finally:
            self.train.close()
        for entry in self._swapped:
            entry.trained = True
        self.log.setdefault("fits", []).append(report)
        return report

    def snapshot(self, name: str) -> None:
        if name in ("reference", "model"):
            raise Usage(f"a snapshot cannot be called {name!r}: that role is taken")
        self._shelf[name] = copy.deepcopy(self.model).eval().requires_grad_(False)

    def role(self, name: str) -> Any:
        if name in ("reference", "model"):
            return getattr(self, name)
        if name not in self._shelf:
            raise Usage(f"no model is called {name!r}: there is {', '.join(['reference', 'model', *self._shelf])}")
        return self._shelf[name]

    # The life of a run.

    def apply(self, method: Method) -> None:
        """One step of the recipe; a step that needs final linears has pending ones settled first."""
        if method.settles:
            self.settle()
        method.apply(self)

    def finish(self, recipe_is_empty: bool = False) -> None:
        """Settle what is pending, bring everything to its stored form, and refuse a recipe without effect."""
        self.settle()
        self.train.close()
        self.model.eval()
        for path, module in list(self.model.named_modules()):
            if isinstance(module, Replaced):
                calibration.replace(self.model, path, module.packed())
        narrow(self.model, self.storage)
        plans = self._changed_otherwise or self.infer.streams or any(self.infer._chains.values())
        if not (recipe_is_empty or plans or self.infer._slots) and _fingerprint(self.model) == self._before:
            raise Refused("the recipe changed nothing: the model is bit for bit what it was")

    def close(self) -> None:
        """Undo what plans changed in the process."""
        self.train.close()
        self.infer.close()


@torch.no_grad()
def narrow(model: nn.Module, storage: torch.dtype) -> None:
    """Round floating tensors to `storage` and back, so that what is measured is what would be saved."""
    for _, tensor in stored_tensors(model):
        if stored_as(tensor, storage) is not tensor.dtype:
            tensor.copy_(tensor.to(storage))


@torch.no_grad()
def _fingerprint(model: nn.Module) -> list[tuple[str, ...]]:
    """Names, kinds, shapes and a hash of the content of everything in a module tree."""
    found: list[tuple[str, ...]] = [(path, type(module).__name__) for path, module in model.named_modules()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        content = str(int(torch.hash_tensor(value).view(torch.int64))) if value.numel() else ""
        found.append((name, str(tuple(tensor.shape)), content))
    return found
