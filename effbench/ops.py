"""One kernel operation: everything about it is declared once, in the `OP` object of `kernels/<op>/cases.py`.

Dispatch, tests, benchmarks and cost formulas read that object. The PyTorch reference is the specification; a
backend is a faster way to the same numbers. Every op maps the last dimension of its first argument, x; it is
linear in x (but for a declared rounding of it) and differentiable in x alone.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from effbench.core.errors import Usage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Case = Mapping[str, Any]

# Largest error relative to the largest output. 16-bit types: the output and decoded weights are rounded.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}

_ran: dict[str, Counter[str]] = {}


class Declined(Exception):
    """Raised by a backend or peer, before it computes, for inputs it does not take; the next one is tried."""


class Peer(NamedTuple):
    """Somebody else's kernel for the same product, to be timed beside the backends; never dispatched to."""

    function: str  # "module:function", of an op's arguments: converts them and returns the call to be timed
    package: str  # the distribution it comes with; it need not be installed
    tolerance: Mapping[str, float] = TOLERANCE
    note: str = ""  # what its format rounds that ours does not


class Goal(NamedTuple):
    """What a backend is to reach on a class of devices, as least values of the figures of its timing.

    Figures: `dense_speedup`, how many times faster than torch's dense linear of 16 bits; `copy_percent`, bytes
    that must move a second over those that a copy moves.
    """

    device: str  # part of the device's name
    batch: int
    least_bytes: int  # that a case must move, for the goal to hold for it
    must: Mapping[str, float]
    target: Mapping[str, float]


def ran() -> dict[str, dict[str, int]]:
    """How often which backend of which op has run in this process since `reset_ran`."""
    return {name: dict(backends) for name, backends in _ran.items()}


def reset_ran() -> None:
    """Forget which backends have run."""
    _ran.clear()


def ops() -> list[str]:
    """Names of all ops: the folders under `kernels/` that declare one. Imports nothing."""
    import effbench.kernels

    folders = (folder for path in effbench.kernels.__path__ for folder in Path(path).iterdir())
    return sorted(folder.name for folder in folders if (folder / "cases.py").exists())


@cache
def load(name: str) -> Op:
    """The op called `name`; `Usage` when there is none."""
    if name not in ops():
        raise Usage(f"no op is called {name!r}; there are {', '.join(ops())}")
    return cast(Op, importlib.import_module(f"effbench.kernels.{name}.cases").OP)


def dense_flops(x: Sequence[int], out: Sequence[int]) -> int:
    """Floating point operations of the dense matrix product x [..., in] -> [..., out]."""
    return 2 * math.prod(x) * out[-1]


@dataclass(eq=False)
class Op:
    """A registered operation `torch.ops.effbench.<name>`; calling it runs the best backend for the device.

    reference     the specification; its annotated signature is the op's schema, its first argument is `x`
    adjoint       `(grad, in_features, <all other arguments>) -> gradient of x`
    out_features  `(x, <all other arguments>) -> size of the output's last dimension`
    inputs        `(case, device, dtype, generator) -> arguments`; reads no values (it also runs on fakes)
    backends      name -> "module:function", in the order they are tried on an accelerator
    timed         cases of real sizes, and small ones for a processor, to compare speeds at
    """

    name: str
    reference: Callable[..., Tensor]
    adjoint: Callable[..., Tensor]
    out_features: Callable[..., int]
    inputs: Callable[[Case, torch.device, torch.dtype, torch.Generator], dict[str, Any]]
    cases: Sequence[Case]
    backends: Mapping[str, str] = field(default_factory=dict)
    tolerance: Mapping[str, float] = field(default_factory=lambda: TOLERANCE)
    shape_flops: Callable[[Sequence[int], Sequence[int]], int] = dense_flops
    grads: tuple[str, ...] = ("x",)
    timed: Sequence[Case] = ()
    peers: Mapping[str, Peer] = field(default_factory=dict)
    goals: Sequence[Goal] = ()

    def __post_init__(self) -> None:
        first, *others = inspect.signature(self.reference).parameters.values()
        assert first.name == "x"
        self._others = {parameter.name: parameter.default for parameter in others}
        self._overload = self._register()

    def _register(self) -> Callable[..., Tensor]:
        import torch
        from torch.utils.flop_counter import register_flop_formula

        schema = torch.library.infer_schema(self.reference, mutates_args=())
        backward_schema = schema.replace("(Tensor x", "(Tensor grad, SymInt in_features", 1)
        name = f"effbench::{self.name}"
        forward = torch.library.custom_op(name, self._dispatch, mutates_args=(), schema=schema)
        backward = torch.library.custom_op(f"{name}_grad", self._backward, mutates_args=(), schema=backward_schema)

        @forward.register_fake
        def _(x: Tensor, *rest: Any) -> Tensor:
            return x.new_empty(*x.shape[:-1], self.out_features(x, *rest))

        @backward.register_fake
        def _(grad: Tensor, in_features: int, *rest: Any) -> Tensor:
            return grad.new_empty(*grad.shape[:-1], in_features)

        packet = getattr(torch.ops.effbench, self.name)
        backward_packet = getattr(torch.ops.effbench, f"{self.name}_grad")

        def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, *rest = inputs
            ctx.in_features = x.shape[-1]
            ctx.plain = [None if isinstance(value, torch.Tensor) else value for value in rest]
            ctx.save_for_backward(*[value if isinstance(value, torch.Tensor) else None for value in rest])

        def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            rest = [b if a is None else a for a, b in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            return backward_packet.default(grad, ctx.in_features, *rest), *(None for _ in rest)

        forward.register_autograd(differentiate, setup_context=remember)

        def flops(x_shape: Sequence[int], *rest: Any, out_shape: Sequence[int], **named: Any) -> int:
            return self.shape_flops(x_shape, out_shape)

        register_flop_formula(packet)(flops)
        register_flop_formula(backward_packet)(flops)
        return cast("Callable[..., Tensor]", packet.default)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._overload(*args, **kwargs)

    def _dispatch(self, x: Tensor, *rest: Any) -> Tensor:
        import torch

        # The dispatcher drops trailing arguments that equal their defaults.
        named = self._others | dict(zip(self._others, rest, strict=False))
        if x.is_cuda:  # the reference computes on any device, the backends on this one
            with torch.cuda.device(x.device):
                for backend in self.backends:
                    try:
                        return self.run(backend, x=x, **named)
                    except Declined:
                        continue
        return self.run("reference", x=x, **named)

    def _backward(self, grad: Tensor, in_features: int, *rest: Any) -> Tensor:
        defaults = list(self._others.values())[len(rest) :]
        return self.adjoint(grad, in_features, *rest, *defaults)

    def run(self, backend: str, **inputs: Any) -> Tensor:
        """Run one backend by name, "reference" included; `Declined` when it does not take these inputs."""
        function = self.reference if backend == "reference" else _imported(self.backends[backend])
        output: Tensor = function(**inputs)
        _ran.setdefault(self.name, Counter())[backend] += 1
        return output

    def prepared(self, name: str, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
        """The call of a backend, "reference" or a peer on `inputs`; a peer has converted them, or `Declined`."""
        if name in self.peers:
            return cast("Callable[[], Tensor]", _imported(self.peers[name].function)(**inputs))
        return lambda: self.run(name, **inputs)

    def arguments(self, case: Case, device: Any = "cpu", dtype: Any = None, seed: int = 0) -> dict[str, Any]:
        """Arguments for `case`, the same for the same seed."""
        import torch

        device = torch.device(device)
        generator = torch.Generator(device).manual_seed(seed)
        return self.inputs(case, device, dtype or torch.float32, generator)

    def described(self, case: Case, dtype: Any = None) -> dict[str, Any]:
        """Arguments for `case` without values or memory: its tensors are on torch's meta device."""
        import torch

        return {
            name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self._shapes(case, dtype)[0].items()
        }

    def check(
        self, case: Case, backend: str, device: Any = "cpu", dtype: Any = None, seed: int = 0
    ) -> tuple[float, bool]:
        """`verify` a backend or peer on fresh arguments for `case`."""
        inputs = self.arguments(case, device, dtype, seed)
        return self.verify(backend, inputs, self.exact(inputs))

    def exact(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the reference computes in float64."""
        return self.reference(**{**inputs, "x": inputs["x"].double()})

    def verify(self, name: str, inputs: Mapping[str, Any], exact: Tensor) -> tuple[float, bool]:
        """The `deviation` of a backend, "reference" or a peer on `inputs`, and whether it is tolerable."""
        dtype = inputs["x"].dtype
        error = deviation(self.prepared(name, inputs), exact, dtype)
        tolerance = self.peers[name].tolerance if name in self.peers else self.tolerance
        return error, error <= tolerance[str(dtype).removeprefix("torch.")]

    def flops(self, case: Case) -> int:
        """Floating point operations of the dense equivalent of `case`."""
        inputs, output = self._shapes(case, None)
        return self.shape_flops(inputs["x"].shape, output.shape)

    def bytes(self, case: Case, dtype: Any = None) -> int:
        """Bytes that `case` must move at least: every argument read once, the output written once."""
        import torch

        inputs, output = self._shapes(case, dtype)
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        return sum(tensor.nbytes for tensor in [*tensors, output])

    def _shapes(self, case: Case, dtype: Any) -> tuple[dict[str, Any], Tensor]:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            inputs = self.arguments(case, dtype=dtype)
            return inputs, self(**inputs)


def deviation(call: Callable[[], Tensor], exact: Tensor, dtype: torch.dtype) -> float:
    """Largest error of what `call` computes, relative to the largest number of `exact`.

    Memory handed out during the call is filled with NaN, so that the error is NaN where some was left unwritten; it
    is infinite for another shape or type.
    """
    with poisoned():
        found = call()
    if found.shape != exact.shape or found.dtype != dtype:
        return math.inf
    return float((found.double() - exact).abs().max() / exact.abs().max())


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN (integers: their maximum) inside this context."""
    import torch

    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch fills memory only in this mode. Warn, and say nothing: matrix products on CUDA would raise for want of a
    # setting of the environment.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _imported(path: str) -> Callable[..., Any]:
    """The function named "module:function"."""
    module, _, attribute = path.partition(":")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), attribute))
