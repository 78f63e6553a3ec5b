"""A run on a transformers model: its state, and how replaced modules settle.

What kinds promise is done by their services in `effbench.nn.kinds`, found by name: nothing here depends on how methods
calibrate or train.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.kinds import kind_of, service
from effbench.core.run import FitReport, InferPlan, Run
from effbench.core.usage import matches_any
from effbench.nn.data import LONGEST, SEQUENCES, Data
from effbench.nn.model.adapters import choose_adapter
from effbench.nn.model.attention import adopt, own_attention
from effbench.nn.model.beside import Beside, Merged, measure_merge
from effbench.nn.model.blocks import Blocks, count_positions
from effbench.nn.model.linear import (
    Replaced,
    Storage,
    check_module,
    kept,
    matrix_shape,
    replace,
    stored_as,
    stored_bytes,
    stored_tensors,
)
from effbench.nn.model.memento import ModelMemento, ObjectMemento
from effbench.nn.model.tied import note_untied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from effbench.core.kinds import Swap
    from effbench.core.method import Method
    from effbench.core.views import Segments
    from effbench.nn.train.outputs import Roles
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
        storage: torch.dtype | Storage,
        seed: int = 0,
        sequences: int = SEQUENCES,
        length: int | None = None,
        skip: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.source = source
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.data = data
        self.device = device
        self.storage = storage
        self.seed = seed
        self._reference = reference
        self._shelf: dict[str, tuple[Any, Any]] = {}  # models with their tokenizers
        self._roles: Roles | None = None  # of the fit that goes on
        self._swapped: list[Swapped] = []
        self._calibration = (sequences, length or min(LONGEST, count_positions(self.model)))
        self.skip = skip
        self.steps: list[Method] = []  # that were applied
        narrow(self.model, storage)
        self.original = Original(sum(stored_bytes(model, storage)), sum(p.numel() for p in model.parameters()))
        self._before = take_fingerprint(model)
        adopt(self.infer, self.model)

    @functools.cached_property
    def reference(self) -> Any:
        model = self._reference().eval().requires_grad_(False)
        narrow(model, self.storage)
        return model

    @property
    def pad(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    def targeted(self, path: str) -> bool:
        return not matches_any(path, self.skip)

    def linears(self) -> dict[str, nn.Module]:
        Blocks(self.model).check_dense()
        return self._list_targeted()

    def _list_targeted(self) -> dict[str, nn.Module]:
        """The linears that methods may replace, beside mixtures of experts too."""
        return {path: module for path, module in Blocks(self.model).linears() if self.targeted(path)}

    def calibration(self) -> Tensor:
        sequences, length = self._calibration
        ids = self.data.calibration(sequences, length, self.seed)
        self.log.calibration_sequences, self.log.calibration_tokens = len(ids), ids.numel()
        return ids

    # What kinds and fits ask for.

    def serve(self, method: Method) -> None:
        importlib.import_module(service(kind_of(type(method)))).apply(self, method)

    def note_swap(self, module: nn.Module, method: Swap, held: bool) -> None:
        self._swapped.append(Swapped(module, method, held))

    def note_fit(self, report: FitReport) -> None:
        self.log.fits.append(report)
        for entry in self._swapped:
            entry.trained = True
        self.waiting.clear()

    def remember(self) -> Callable[[], None]:
        model = ModelMemento(self.model)
        methods = [method for method, _ in self._states.values()]
        plans = (self.train, self.infer)
        lists = [(chain, list(chain)) for plan in plans for chain in (plan.chain(name) for name in plan.chains)]
        lists.append((self._swapped, list(self._swapped)))
        methods += [entry for chain, _ in lists for entry in chain]
        slots = [value for plan in plans for value in map(plan.slot, plan.slots) if hasattr(value, "__dict__")]
        beside = [*(state for _, state in self._states.values()), *slots, self.log]
        try:
            objects = ObjectMemento(beside, [self, self.data, self.tokenizer, *methods, *model.objects()])
        except TypeError as error:
            raise Unsupported(f"a step of the recipe holds what cannot be copied: {error}") from None
        states = dict(self._states)
        chance = torch.get_rng_state()
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

        def restore() -> None:
            model.restore()
            objects.restore()
            self._states = dict(states)
            for entries, before in lists:
                entries[:] = before
            torch.set_rng_state(chance)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self.device)

        return restore

    @contextlib.contextmanager
    def aside(self, name: str, seed: int | None = None) -> Iterator[None]:
        restore = self.remember()
        outer = {key: getattr(self, key) for key in ("model", "seed", "folder", "teacher", "watched", "step")}
        waiting, trained = set(self.waiting), [(entry, entry.trained) for entry in self._swapped]
        self.seed = self.seed if seed is None else seed
        self.folder = None if self.folder is None else self.folder / f"{name}-{len(self.log.steps)}"
        try:
            with self.own_fits():
                yield
        finally:
            vars(self).update(outer)
            restore()
            self.waiting.clear()
            self.waiting.update(waiting)
            for entry, was in trained:
                entry.trained = was
            self._shared.clear()

    def settle(self) -> None:
        trained = [entry for entry in self._swapped if entry.trained]
        lost: dict[str, list[Merged]] = {}
        if trained:
            paths = {module: path for path, module in self.model.named_modules()}
        for entry in trained:
            if entry.module in paths:  # its block may be gone
                path, final = paths[entry.module], entry.method.settle(entry.module)
                check_module(final, entry.method, "settle", entry.module)
                if entry.held and final is not entry.module and kept(final) is None:
                    self.log.densified.append(path)
                dtype: torch.dtype = self.model.dtype
                final = final.to(dtype)
                if isinstance(entry.module, Beside) and final is not entry.module:
                    narrow(stored := copy.deepcopy(final), self.storage)
                    lost.setdefault(entry.method.label, []).append(measure_merge(entry.module, stored))
                replace(self.model, path, final)
            self._swapped.remove(entry)
        for label, parts in lost.items():
            product = sum(part.product for part in parts)
            self.log.merge_lost[label] = (sum(part.lost for part in parts) / product) ** 0.5 if product else 0.0
        if trained:
            note_untied(self.model)

    def adapter(self, name: str | None) -> None:
        choose_adapter(self.model, name)
        self._shared.clear()

    def rewrite(self, segments: Segments) -> Segments:
        for method in self.infer.chain("prompt"):
            short = importlib.import_module(service(kind_of(type(method)))).rewrite(self, method, segments)
            if short != segments:
                self.infer.act(method)
            segments = short
        return segments

    def snapshot(self, name: str) -> None:
        self.shelve(name, copy.deepcopy(self.model), self.tokenizer)

    def shelve(self, name: str, model: Any, tokenizer: Any) -> None:
        if name in ("reference", "model"):
            raise Usage(f"a snapshot cannot be called {name!r}: that role is taken")
        self._shelf[name] = model.eval().requires_grad_(False), tokenizer

    @contextlib.contextmanager
    def reading(self, roles: Roles) -> Iterator[None]:
        outer, self._roles = self._roles, roles
        try:
            yield
        finally:
            self._roles = outer

    def outputs(self, role: str) -> Any:
        assert self._roles is not None, "outputs are those of a batch that a fit has fed"
        return self._roles.read(role)

    def role(self, name: str) -> Any:
        return getattr(self, name) if name in ("reference", "model") else self._find(name)[0]

    def tokenizer_of(self, name: str) -> Any:
        return self.tokenizer if name in ("reference", "model") else self._find(name)[1]

    def _find(self, name: str) -> tuple[Any, Any]:
        if name not in self._shelf:
            raise Usage(f"no model is called {name!r}: there is {', '.join(['reference', 'model', *self._shelf])}")
        return self._shelf[name]

    # The life of a run.

    def apply(self, method: Method) -> None:
        """One step of the recipe; a step that needs final linears has pending ones settled first."""
        self._shared.clear()
        if method.settles:
            self.settle()
        method.check_shapes({path: matrix_shape(module) for path, module in self._list_targeted().items()})
        self.teacher = next((role for role in method.reads if role != "model"), method.makes or self.teacher)
        waiting = set(self.waiting)
        with own_attention(self.model, InferPlan()):  # what was trained in attention takes part in calibration, too
            method.apply(self)
        self._check_waiting(method, waiting)
        self.steps.append(method)
        if method.asked_sparsity is not None:
            self.log.sparsity_asked = max(self.log.sparsity_asked or 0.0, method.asked_sparsity)

    def _check_waiting(self, method: Method, waiting: set[nn.Parameter]) -> None:
        """Raise `Refused` where a step has taken away all that one before it had put in place for a fit to come."""
        modules = set(self.model.modules())
        there: dict[str, bool] = {}
        for entry in self._swapped:
            if not entry.trained:
                label = entry.method.label
                there[label] = there.get(label, False) or entry.module in modules
        gone = [label for label, is_there in there.items() if not is_there]
        if not gone and self.waiting and waiting and not waiting.intersection(self.model.parameters()):
            gone = ["a step before it"]
        if gone:
            raise Refused(
                f"{method.label} takes away what {gone[0]} has put in place, before a fit has trained it: put fit() "
                "between them, or leave one out"
            )

    def finish(self, recipe_is_empty: bool = False) -> None:
        """Settle what is pending, bring everything to its stored form, and refuse a recipe without effect."""
        self.settle()
        self.train.close()
        self.model.eval()
        for path, module in list(self.model.named_modules()):
            if isinstance(module, Replaced):
                replace(self.model, path, module.pack(self.storage))
        narrow(self.model, self.storage)
        planned = not all(method.is_identity for method in self.infer.methods)
        changed = planned or self.log.selected or take_fingerprint(self.model) != self._before
        if not (changed or recipe_is_empty):
            raise Refused("the recipe changed nothing: the model is bit for bit what it was")

    def close(self) -> None:
        """Undo what plans changed in the process, and let go of what steps kept."""
        self.train.close()
        self.infer.close()
        self._states.clear()
        self._shared.clear()


@torch.no_grad()
def narrow(model: nn.Module, storage: torch.dtype | Storage) -> None:
    """Round floating tensors to `storage` and back, so that what is measured is what would be saved.

    Raises `Refused` for a finite number that is beyond the range of its type there.
    """
    for name, tensor in stored_tensors(model):
        dtype = stored_as(name, tensor, storage)
        if dtype is not tensor.dtype:
            tensor.copy_(round_to(dtype, name, tensor))


def round_to(dtype: torch.dtype, name: str, tensor: Tensor) -> Tensor:
    """The tensor in `dtype`. Raises `Refused` where rounding would make a finite number of it infinite."""
    rounded = tensor.to(dtype)
    if bool((torch.isinf(rounded) & torch.isfinite(tensor)).any()):
        most = float(tensor.detach()[torch.isfinite(tensor)].abs().max())
        kind = str(dtype).removeprefix("torch.")
        raise Refused(
            f"{name} holds {most:.4g}, which is finite but beyond {kind} (up to {torch.finfo(dtype).max:.4g}): "
            "rounding it would make infinity"
        )
    return rounded


@torch.no_grad()
def take_fingerprint(model: nn.Module) -> list[tuple[str, ...]]:
    """Names, kinds, shapes and a hash of the content of everything in a module tree."""
    entries: list[tuple[str, ...]] = [(path, type(module).__name__) for path, module in model.named_modules()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        content = str(int(torch.hash_tensor(value).view(torch.int64))) if value.numel() else ""
        entries.append((name, str(tuple(tensor.shape)), content))
    return entries
