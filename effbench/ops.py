"""One kernel operation: everything about it is declared once, in the `OP` object of `kernels/<op>/cases.py`.

Dispatch, tests, benchmarks and cost formulas read that object. The PyTorch reference is the specification; a backend
is a faster way to the same numbers. `Op` is any operation on tensors: several inputs, one or several outputs, or
arguments changed in place. `LinearOp` is an `Op` that multiplies x by a matrix in a stored form.
"""

from __future__ import annotations

import importlib
import inspect
import math
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from effbench.core.errors import Usage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Case = Mapping[str, Any]

# Largest tolerable error, see `Op.measure_error`. 16-bit types: outputs and decoded weights are rounded.
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}

_calls: dict[str, Counter[str]] = {}


class Declined(Exception):
    """Raised by a backend or peer, before it computes, for inputs it does not take; the next one is tried."""


class Peer(NamedTuple):
    """Somebody else's kernel for the same operation, to be timed beside the backends; never dispatched to."""

    function: str  # "module:function", called like a backend: converts its arguments and returns the call to be timed
    package: str  # the distribution it comes with; it need not be installed
    tolerance: Mapping[str, float] = TOLERANCE
    note: str = ""  # what its format rounds that ours does not


class Goal(NamedTuple):
    """What a backend is to reach on a class of devices, as least values of the figures of its timing.

    Figures: `speedup`, how many times faster than the yardstick of its op; `copy_percent`, bytes that must move a
    second over those that a copy moves.
    """

    device: str  # part of the device's name
    batch: int
    least_bytes: int  # that a case must move, for the goal to hold for it
    must: Mapping[str, float]
    target: Mapping[str, float]


def backend_calls() -> dict[str, dict[str, int]]:
    """How often which backend of which op has run in this process since `reset_backend_calls`."""
    return {name: dict(backends) for name, backends in _calls.items()}


def reset_backend_calls() -> None:
    """Forget which backends have run."""
    _calls.clear()


def list_ops() -> list[str]:
    """Names of all ops: the folders under `kernels/` that declare one. Imports nothing."""
    import effbench.kernels

    folders = (folder for path in effbench.kernels.__path__ for folder in Path(path).iterdir())
    return sorted(folder.name for folder in folders if (folder / "cases.py").exists())


@cache
def load(name: str) -> Op:
    """The op called `name`; `Usage` when there is none."""
    if name not in list_ops():
        raise Usage(f"no op is called {name!r}; there are {', '.join(list_ops())}")
    return cast(Op, importlib.import_module(f"effbench.kernels.{name}.cases").OP)


# ---- any operation ----


@dataclass(eq=False, kw_only=True)
class Op:
    """A registered operation `torch.ops.effbench.<name>`; calling it runs the best backend for the device.

    reference       the specification; its annotated signature is the op's schema: tensors, lists of them and plain
                    values in; a tensor, a tuple of tensors or None out
    inputs          `(case, device, dtype, generator) -> arguments`; reads no values (it also runs on fakes)
    backends        name -> "module:function" of the reference's arguments, in the order they are tried on an
                    accelerator
    fake            the reference's arguments -> outputs of the right shapes and types, without reading values;
                    left out: the reference computes on fakes itself
    mutates         arguments that are changed in place; such an op has no gradient
    outputs         names of the outputs, in order, for `gradient`
    differentiable  arguments, tensors always, that have a gradient
    gradient        computes the gradients of `differentiable`, in that order, from what its parameters name:
                    `grad_<output>`, arguments and outputs, which are kept for it, and `<argument>_shape`, for which
                    the argument is not kept. It takes one gradient at least, and every differentiable argument or
                    its shape. Outputs whose gradient it does not take are constants for autograd. A gradient with
                    backends of its own calls another op.
    unrounded       arguments that switch off a rounding which the gradient takes for the identity
    flop_formula    `(<arguments>, out_shape=) -> floating point operations`; a tensor is given as its shape
    gradient_flop_formula  the same for `gradient`
    warm            arguments that are in the cache where the op is used; the others are read from memory
    timed           cases of real sizes, and small ones for a processor, to compare speeds at
    """

    name: str
    reference: Callable[..., Any]
    inputs: Callable[[Case, torch.device, torch.dtype, torch.Generator], dict[str, Any]]
    cases: Sequence[Case]
    backends: Mapping[str, str] = field(default_factory=dict)
    tolerance: Mapping[str, float] = field(default_factory=lambda: TOLERANCE)
    fake: Callable[..., Any] | None = None
    mutates: Sequence[str] = ()
    outputs: Sequence[str] = ("out",)
    differentiable: Sequence[str] = ()
    gradient: Callable[..., Any] | None = None
    unrounded: Mapping[str, Any] = field(default_factory=dict)
    flop_formula: Callable[..., int] | None = None
    gradient_flop_formula: Callable[..., int] | None = None
    warm: Sequence[str] = ()
    timed: Sequence[Case] = ()
    peers: Mapping[str, Peer] = field(default_factory=dict)
    goals: Sequence[Goal] = ()

    def __post_init__(self) -> None:
        self._defaults = _read_defaults(self.reference)
        self._check_declaration()
        self._overload = self._register()

    def _check_declaration(self) -> None:
        """Raise `TypeError`, naming the op, for a declaration that contradicts itself."""
        named = {"mutates": self.mutates, "differentiable": self.differentiable, "warm": self.warm}
        for what, names in (named | {"unrounded": tuple(self.unrounded)}).items():
            for name in names:
                if name not in self._defaults:
                    raise TypeError(f"op {self.name}: {what} names {name!r}, which the reference does not take")
        if bool(self.differentiable) != bool(self.gradient):
            raise TypeError(f"op {self.name}: `differentiable` and `gradient` are declared together or not at all")
        if self.mutates and self.gradient:
            raise TypeError(f"op {self.name}: an op that changes its arguments in place has no gradient")

    def _register(self) -> Callable[..., Any]:
        import torch
        from torch.utils.flop_counter import register_flop_formula

        definition = _define(self.name, self._dispatch, self.reference, self.mutates)
        definition.register_fake(self.fake or self.reference)
        packet = getattr(torch.ops.effbench, self.name)
        if self.flop_formula:
            register_flop_formula(packet)(self.flop_formula)
        if self.gradient:
            self._check_gradient_declaration(self.gradient, len(packet.default._schema.returns))
            self._register_gradient(definition, self.gradient)
        return cast("Callable[..., Any]", packet.default)

    def _check_gradient_declaration(self, gradient: Callable[..., Any], outputs: int) -> None:
        """Raise `TypeError`, naming the op, for a gradient that cannot be given what it takes."""
        parameters = _read_defaults(gradient)
        gradients = [f"grad_{output}" for output in self.outputs]
        shapes = [f"{name}_shape" for name in self._defaults]
        if outputs != len(self.outputs):
            raise TypeError(f"op {self.name}: {outputs} outputs, and names of {len(self.outputs)} in `outputs`")
        for name in parameters:
            if name not in (*self._defaults, *self.outputs, *gradients, *shapes):
                raise TypeError(
                    f"op {self.name}: its gradient takes {name!r}, which is no argument, output, <argument>_shape "
                    "or grad_<output>"
                )
        if not any(name in parameters for name in gradients):
            raise TypeError(f"op {self.name}: its gradient takes none of {', '.join(gradients)}")
        for name in self.differentiable:
            if name not in parameters and f"{name}_shape" not in parameters:
                raise TypeError(f"op {self.name}: its gradient takes neither {name} nor {name}_shape")

    def _register_gradient(self, definition: Any, gradient: Callable[..., Any]) -> None:
        import torch
        from torch.utils.flop_counter import register_flop_formula

        parameters = _read_defaults(gradient)
        gradients = [f"grad_{output}" for output in self.outputs]
        shapes = {f"{name}_shape": name for name in self._defaults}

        def run(*arguments: Any) -> Any:
            return gradient(**_name_arguments(parameters, arguments))

        def fake(*arguments: Any) -> Any:
            values = _name_arguments(parameters, arguments)
            first = next(values[name] for name in gradients if name in values)
            empty = [
                torch.empty_like(values[name]) if name in values else first.new_empty(values[f"{name}_shape"])
                for name in self.differentiable
            ]
            return empty[0] if len(empty) == 1 else tuple(empty)

        _define(f"{self.name}_grad", run, gradient, ()).register_fake(fake)
        packet = getattr(torch.ops.effbench, f"{self.name}_grad")
        if self.gradient_flop_formula:
            register_flop_formula(packet)(self.gradient_flop_formula)

        def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            results = dict(zip(self.outputs, flatten(output), strict=True))
            values = dict(zip(self._defaults, inputs, strict=True)) | results
            values |= {shape: values[name].shape for shape, name in shapes.items() if shape in parameters}
            kept = {name: values[name] for name in parameters if name in values}
            ctx.plain = {name: value for name, value in kept.items() if not isinstance(value, torch.Tensor)}
            ctx.tensors = [name for name in kept if name not in ctx.plain]
            ctx.save_for_backward(*(kept[name] for name in ctx.tensors))
            ctx.mark_non_differentiable(*(results[name] for name in self.outputs if f"grad_{name}" not in parameters))

        def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            values = ctx.plain | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
            values |= dict(zip(gradients, grads, strict=True))
            results = flatten(packet.default(*(values[name] for name in parameters)))
            named = dict(zip(self.differentiable, results, strict=True))
            return tuple(named.get(name) for name in self._defaults)

        definition.register_autograd(differentiate, setup_context=keep)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._overload(*args, **kwargs)

    def _dispatch(self, *arguments: Any) -> Any:
        import torch

        named = _name_arguments(self._defaults, arguments)
        # The reference computes on any device, the backends on an accelerator.
        device = next((tensor.device for tensor in flatten(arguments) if tensor.is_cuda), None)
        if device is not None:
            with torch.cuda.device(device):
                for backend in self.backends:
                    try:
                        return self.run(backend, **named)
                    except Declined:
                        continue
        return self.run("reference", **named)

    def run(self, backend: str, **inputs: Any) -> Any:
        """Run one backend by name, "reference" included; `Declined` when it does not take these inputs."""
        output = self._find(backend)(**inputs)
        _calls.setdefault(self.name, Counter())[backend] += 1
        return output

    def _find(self, name: str) -> Callable[..., Any]:
        """The function of a backend, of a peer or of "reference", by its arguments' names."""
        if name == "reference":
            return self.reference
        return _import(self.peers[name].function if name in self.peers else self.backends[name])

    def prepare(self, name: str, inputs: Mapping[str, Any]) -> Callable[[], Any]:
        """The call of a backend, "reference" or a peer on `inputs`; a peer has converted them, or `Declined`."""
        if name in self.peers:
            return cast("Callable[[], Any]", self._find(name)(**inputs))
        return lambda: self.run(name, **inputs)

    # ---- arguments and costs of a case ----

    def arguments(self, case: Case, device: Any = "cpu", dtype: Any = None, seed: int = 0) -> dict[str, Any]:
        """Arguments for `case`, the same for the same seed."""
        import torch

        device = torch.device(device)
        generator = torch.Generator(device).manual_seed(seed)
        return self.inputs(case, device, dtype or torch.float32, generator)

    def describe_arguments(self, case: Case, dtype: Any = None) -> dict[str, Any]:
        """Arguments for `case` without values or memory: its tensors are on torch's meta device."""
        import torch

        inputs, _ = self._fake_case(case, dtype)
        return dict(
            convert_tensors(inputs, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
        )

    def flops(self, case: Case) -> int:
        """Floating point operations of `case` by the op's formula; 0 without one."""
        if self.flop_formula is None:
            return 0
        inputs, outputs = self._fake_case(case, None)
        shapes = [tensor.shape for tensor in flatten(outputs)]
        return self.flop_formula(
            **convert_tensors(inputs, lambda tensor: tensor.shape), out_shape=shapes[0] if len(shapes) == 1 else shapes
        )

    def bytes(self, case: Case, dtype: Any = None) -> int:
        """Bytes that `case` must move at least: arguments read once, outputs and changed arguments written once."""
        inputs, outputs = self._fake_case(case, dtype)
        changed = [inputs[name] for name in self.mutates]
        return sum(tensor.nbytes for tensor in flatten([*inputs.values(), outputs, *changed]))

    def numbers(self, case: Case) -> int:
        """How many numbers the arguments of `case` hold: says whether it suits a processor or a GPU."""
        return sum(tensor.numel() for tensor in flatten([*self._fake_case(case, None)[0].values()]))

    def _fake_case(self, case: Case, dtype: Any) -> tuple[dict[str, Any], Any]:
        """Arguments and outputs of `case` that have shapes and types and no memory."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            inputs = self.arguments(case, dtype=dtype)
            return inputs, self(**inputs)

    # ---- correctness ----

    def check(
        self, case: Case, backend: str, device: Any = "cpu", dtype: Any = None, seed: int = 0
    ) -> tuple[float, bool]:
        """`verify` a backend or peer on fresh arguments for `case`."""
        inputs = self.arguments(case, device, dtype, seed)
        return self.verify(backend, inputs, self.compute_exact(inputs))

    def compute_exact(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """What the reference computes in float64: its outputs, then the arguments it changes."""
        wide = self.widen(inputs)
        return self._collect(self.reference, self._copy_mutated(wide))

    def _copy_mutated(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, with copies of those that are changed in place."""
        copies = {name: inputs[name] for name in self.mutates}
        return {**inputs, **convert_tensors(copies, lambda tensor: tensor.clone())}

    def _collect(self, function: Callable[..., Any], inputs: Mapping[str, Any]) -> list[Tensor]:
        """What the function makes of `inputs`: its outputs, then the arguments that it changes."""
        outputs = function(**inputs)
        return flatten([outputs, *(inputs[name] for name in self.mutates)])

    def widen(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments in float64, but for numbers of 8 bits and less: those are codes."""
        return dict(
            convert_tensors(
                inputs, lambda tensor: tensor.double() if tensor.is_floating_point() and tensor.itemsize > 1 else tensor
            )
        )

    def verify(self, name: str, inputs: Mapping[str, Any], exact: Sequence[Tensor]) -> tuple[float, bool]:
        """The error of a backend, "reference" or a peer against `compute_exact`, and whether it is tolerable.

        The largest `measure_error` of all outputs and changed arguments; infinite where one has another shape or type
        than it should, NaN where memory was left unwritten.
        """
        own = self._copy_mutated(inputs)
        tolerance = self.peers[name].tolerance if name in self.peers else self.tolerance
        return self.verify_call(self.prepare(name, own), own, exact, tolerance)

    def verify_call(
        self,
        call: Callable[[], Any],
        inputs: Mapping[str, Any],
        exact: Sequence[Tensor],
        tolerance: Mapping[str, float],
    ) -> tuple[float, bool]:
        """`verify` a call that was prepared for `inputs`, and may change them."""
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode() as mode:
            kinds = self._collect(self, convert_tensors(inputs, mode.from_tensor))
        with poison_memory():
            results = self._collect(lambda **_: call(), inputs)
        error = self._compare(results, exact, kinds)
        return error, error <= tolerance[self._working_type(inputs)]

    def check_gradient(self, case: Case, device: Any = "cpu", dtype: Any = None, seed: int = 0) -> tuple[float, bool]:
        """The error of the op's gradients for `case` against autograd through the reference in float64.

        Raises `TypeError` for an op without gradients.
        """
        import torch

        if self.gradient is None:
            raise TypeError(f"op {self.name} has no gradient")
        inputs = self.arguments(case, device, dtype, seed)
        kinds = dict(zip(self.outputs, flatten(self._fake_case(case, dtype)[1]), strict=True))
        chosen = [name for name in self.outputs if f"grad_{name}" in inspect.signature(self.gradient).parameters]
        generator = torch.Generator(device).manual_seed(seed)
        directions = [
            torch.randn(kinds[name].shape, device=device, generator=generator).to(kinds[name].dtype) for name in chosen
        ]

        def differentiate(function: Callable[..., Any], values: dict[str, Any]) -> list[Tensor]:
            leaves = {name: values[name].detach().requires_grad_() for name in self.differentiable}
            outputs = dict(zip(self.outputs, flatten(function(**values | leaves)), strict=True))
            taken = [outputs[name] for name in chosen]
            grads = [grad.to(output.dtype) for grad, output in zip(directions, taken, strict=True)]
            return list(torch.autograd.grad(taken, list(leaves.values()), grads))

        exact = differentiate(self.reference, self.widen(inputs) | dict(self.unrounded))
        error = self._compare(differentiate(self, inputs), exact, [inputs[name] for name in self.differentiable])
        return error, error <= self.tolerance[self._working_type(inputs)]

    def _compare(self, results: Sequence[Tensor], exact: Sequence[Tensor], kinds: Sequence[Tensor]) -> float:
        """The largest error of these; infinite for another number, shape or type of tensors."""
        import torch

        if [(one.shape, one.dtype) for one in results] != [(one.shape, one.dtype) for one in kinds]:
            return math.inf
        errors = [self.measure_error(one, other) for one, other in zip(results, exact, strict=True)]
        return float(torch.tensor(errors, dtype=torch.float64).max())  # Python's max would lose a NaN

    def measure_error(self, output: Tensor, exact: Tensor) -> float:
        """Largest error of a number, relative to its size or the root mean square of all, whichever is larger.

        So a few large numbers do not hide errors of the others. Equal infinities are right; integers must all be equal.
        """
        import torch

        same = output == exact
        if bool(same.all()):
            return 0.0
        if not exact.is_floating_point():
            return math.inf
        finite = exact[exact.isfinite()]
        typical = finite.square().mean().sqrt() if finite.numel() else exact.new_zeros(())
        error = (output.double() - exact).abs() / torch.maximum(exact.abs(), typical)
        return float(torch.where(same, 0.0, error).max())

    def _working_type(self, inputs: Mapping[str, Any]) -> str:
        """Name of the type whose tolerance counts: that of the first floating tensor."""
        first = next(tensor for tensor in flatten([*inputs.values()]) if tensor.is_floating_point())
        return str(first.dtype).removeprefix("torch.")


# ---- products with a matrix ----


class Matrix(Protocol):
    """A matrix W [out, in] in a stored form: a NamedTuple of what its op takes after x."""

    def dense(self, in_features: int) -> Tensor:
        """W decoded, at least float32 [out, in]."""

    def out_features(self, in_features: int) -> int:
        """Rows of W, from the shapes of what is stored alone."""


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, accumulated in float32 (float64 for float64 x); weight [out, in] float32."""
    import torch

    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ weight.to(wide).T).to(x.dtype)


def multiply_decoded(x: Tensor, matrix: Matrix) -> Tensor:
    """x [..., in] times the decoded matrix: y = x W^T [..., out]."""
    return multiply(x, matrix.dense(x.shape[-1]))


def multiply_transposed(grad: Tensor, in_features: int, matrix: Matrix) -> Tensor:
    """grad [..., out] times the transpose of the decoded matrix: the gradient of x [..., in]."""
    return multiply(grad, matrix.dense(in_features).T)


def random_activations(case: Case, dtype: torch.dtype, on: Mapping[str, Any]) -> Tensor:
    """Normal x [*batch, in_features]; `batch` is a number or a list of leading dimensions."""
    import torch

    batch = case["batch"]
    lead = [batch] if isinstance(batch, int) else batch
    return torch.randn(*lead, case["in_features"], **on).to(dtype)


def linear_case(batch: int | list[int], in_features: int, out_features: int, **more: Any) -> Case:
    """A case of a linear op; `more` are the fields that its `random` reads."""
    return dict(batch=batch, in_features=in_features, out_features=out_features, **more)


def count_product_flops(x: Sequence[int], out: Sequence[int]) -> int:
    """Floating point operations of the dense matrix product x [..., in] -> [..., out]."""
    return 2 * math.prod(x) * out[-1]


class LinearOp(Op):
    """y = x W^T: an op of x [..., in] and a stored matrix, linear in x and differentiable in x alone.

    Its arguments are x and the fields of `matrix`; backends and peers get the two, `(x, matrix)`. Errors are relative
    to the largest output, as an output is a sum in which large terms cancel.

    matrix       a NamedTuple class, see `Matrix`: fields, types and defaults make the op's schema
    random       `(case, dtype, on) -> a random matrix`; `on` has device and generator for torch's functions. A case has
                 batch, in_features, mostly out_features, and what `random` reads
    product      the specification, `(x, matrix) -> y`; a rounding of x in it counts as the identity (`unrounded`)
    adjoint      `(grad of y, in_features, matrix) -> gradient of x`
    shape_flops  `(shape of x, shape of y) -> floating point operations` of the dense equivalent
    """

    def __init__(
        self,
        *,
        matrix: Callable[..., Matrix],
        random: Callable[[Case, torch.dtype, dict[str, Any]], Any],
        product: Callable[[Tensor, Any], Tensor] = multiply_decoded,
        adjoint: Callable[[Tensor, int, Any], Tensor] = multiply_transposed,
        shape_flops: Callable[[Sequence[int], Sequence[int]], int] = count_product_flops,
        **shared: Any,
    ) -> None:
        import torch

        self.matrix, self.random = matrix, random
        types = typing.get_type_hints(matrix)
        stored = [
            parameter.replace(annotation=types[parameter.name])
            for parameter in inspect.signature(matrix).parameters.values()
        ]

        def sign(function: Callable[..., Any], **first: Any) -> Callable[..., Any]:
            """The function with parameters of these types, then those of the matrix."""
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
            leading = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in first.items()]
            function.__signature__ = inspect.Signature([*leading, *stored], return_annotation=torch.Tensor)  # type: ignore[attr-defined]
            return function

        def reference(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return product(x, matrix(*args, **kwargs))

        def gradient(grad_out: Tensor, x_shape: Sequence[int], **kwargs: Any) -> Tensor:
            return adjoint(grad_out, x_shape[-1], matrix(**kwargs))

        def fake(x: Tensor, *args: Any) -> Tensor:
            return x.new_empty(*x.shape[:-1], matrix(*args).out_features(x.shape[-1]))

        def count_flops(x: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
            return shape_flops(x, out_shape)

        super().__init__(
            reference=sign(reference, x=torch.Tensor),
            inputs=self._draw,
            fake=fake,
            differentiable=("x",),
            gradient=sign(gradient, grad_out=torch.Tensor, x_shape=Sequence[int]),
            flop_formula=count_flops,
            gradient_flop_formula=count_flops,
            warm=("x",),
            **shared,
        )

    def _draw(self, case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        on = {"device": device, "generator": generator}
        return {"x": random_activations(case, dtype, on), **self.random(case, dtype, on)._asdict()}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The product; under autocast of x in its type, as torch's own linear."""
        import torch

        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        return cast("Tensor", super().__call__(x, *args, **kwargs))

    def _find(self, name: str) -> Callable[..., Any]:
        function = super()._find(name)
        if name == "reference":
            return function
        return lambda x, **stored: function(x, self.matrix(**stored))

    def decode(self, inputs: Mapping[str, Any]) -> Tensor:
        """The dense matrix of these arguments, at least float32 [out, in]."""
        stored = {name: value for name, value in inputs.items() if name != "x"}
        return self.matrix(**stored).dense(inputs["x"].shape[-1])

    def numbers(self, case: Case) -> int:
        """Weights of the dense matrix."""
        return int(case["in_features"] * case.get("out_features", case["in_features"]))

    def widen(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """x in float64; the matrix is what is stored."""
        return {**inputs, "x": inputs["x"].double()}

    def measure_error(self, output: Tensor, exact: Tensor) -> float:
        """Largest error relative to the largest number of `exact`."""
        return float((output.double() - exact).abs().max() / exact.abs().max())


# ---- tensors among arguments ----


def flatten(values: Any) -> list[Tensor]:
    """The tensors in a value, in lists and tuples at any depth, in order; plain values are left out."""
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in flatten(value)]
    return [values] if hasattr(values, "is_cuda") else []


def convert_tensors(values: Any, convert: Callable[[Tensor], Any]) -> Any:
    """The same value with every tensor, in mappings and lists at any depth, replaced by `convert` of it."""
    if isinstance(values, Mapping):
        return {name: convert_tensors(value, convert) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [convert_tensors(value, convert) for value in values]
    return convert(values) if hasattr(values, "is_cuda") else values


@contextmanager
def poison_memory() -> Iterator[None]:
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


def _define(name: str, run: Callable[..., Any], prototype: Callable[..., Any], mutates: Sequence[str]) -> Any:
    """Register `run` as `torch.ops.effbench.<name>` with the signature of `prototype`."""
    import torch

    def typed() -> None: ...

    typed.__signature__ = inspect.signature(prototype, eval_str=True)  # type: ignore[attr-defined]

    def run_as_given(*arguments: Any) -> Any:
        # Autocast would reach into an op, except where something looks on: counters of operations take it away there.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return run(*arguments)

    schema = torch.library.infer_schema(typed, mutates_args=mutates)
    return torch.library.custom_op(f"effbench::{name}", run_as_given, mutates_args=mutates, schema=schema)


def _read_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters of a function in order, with their defaults."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def _name_arguments(defaults: dict[str, Any], arguments: Sequence[Any]) -> dict[str, Any]:
    """Arguments by name; the dispatcher drops trailing ones that equal their defaults."""
    return defaults | dict(zip(defaults, arguments, strict=False))


def _import(path: str) -> Callable[..., Any]:
    """The function named "module:function"."""
    module, _, attribute = path.partition(":")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), attribute))
