"""`Op` by use: attention with two outputs and three gradients, a loss, a step of an optimizer, and what is wrong."""

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from effbench.ops import TOLERANCE, Case, Declined, Op, Peer, backend_calls, flatten, reset_backend_calls

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# ---- attention ----


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> tuple[Tensor, Tensor]:
    """q, k, v [batch, heads, length, size] -> mixed values like q, and the logarithm of the weights' sum, float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores.sub(lse.unsqueeze(-1)).exp() @ v.to(wide)).to(q.dtype), lse.float()


def attention_gradient(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """From the outputs that are kept, as FlashAttention does (arXiv:2205.14135, appendix B)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    qw, kw, vw, dout = (tensor.to(wide) for tensor in (q, k, v, grad_out))
    scale = q.shape[-1] ** -0.5
    weights = (qw @ kw.mT * scale - lse.unsqueeze(-1)).exp()
    if causal:
        weights = weights.tril()
    mean = (dout * out.to(wide)).sum(-1, keepdim=True)
    dscores = weights * (dout @ vw.mT - mean) * scale
    return (dscores @ kw).to(q.dtype), (dscores.mT @ qw).to(k.dtype), (weights.mT @ dout).to(v.dtype)


def attention_inputs(
    case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    shape = (2, case["heads"], case["length"], 16)
    q, k, v = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(3))
    return {"q": q, "k": k, "v": v, "causal": case["causal"]}


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], causal: bool = True, **_: Any) -> int:
    batch, heads, length, size = q
    return 4 * batch * heads * length * k[-2] * size


def attention_gradient_flops(grad_out: Any, q: Sequence[int], k: Sequence[int], *_: Any, **__: Any) -> int:
    return 5 * attention_flops(q, k, k) // 2  # five products instead of two


def make_attention(name: str, **changes: Any) -> Op:
    declared: dict[str, Any] = dict(
        name=name,
        reference=attention,
        inputs=attention_inputs,
        cases=[dict(heads=2, length=length, causal=causal) for length in (5, 17) for causal in (True, False)],
        outputs=("out", "lse"),
        differentiable=("q", "k", "v"),
        gradient=attention_gradient,
        flop_formula=attention_flops,
        gradient_flop_formula=attention_gradient_flops,
        tolerance=TOLERANCE | {"bfloat16": 3.2e-2},  # the gradient is computed from the rounded output
    )
    return Op(**declared | changes)


# ---- loss ----


def loss(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits [rows, classes] with target int64 [rows], one number in float32 or wider."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logs = logits.to(wide).log_softmax(-1)
    right = logs.gather(1, target[:, None])[:, 0]
    return -((1 - smoothing) * right + smoothing * logs.mean(-1)).mean()


def loss_gradient(grad_out: Tensor, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    rows, classes = logits.shape
    wanted = torch.full_like(logits, smoothing / classes, dtype=grad_out.dtype)
    wanted[torch.arange(rows, device=logits.device), target] += 1 - smoothing
    return (grad_out * (logits.to(grad_out.dtype).softmax(-1) - wanted) / rows).to(logits.dtype)


def loss_inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    logits = 3 * torch.randn(case["rows"], 11, device=device, generator=generator)
    target = torch.randint(11, (case["rows"],), device=device, generator=generator)
    return {"logits": logits.to(dtype), "target": target, "smoothing": case["smoothing"]}


def make_loss(name: str, **changes: Any) -> Op:
    declared: dict[str, Any] = dict(
        name=name,
        reference=loss,
        inputs=loss_inputs,
        cases=[dict(rows=rows, smoothing=smoothing) for rows in (1, 40) for smoothing in (0.0, 0.1)],
        differentiable=("logits",),
        gradient=loss_gradient,
    )
    return Op(**declared | changes)


# ---- a step of an optimizer ----


def step(
    parameters: list[Tensor], gradients: list[Tensor], means: list[Tensor], rate: float, beta: float = 0.9
) -> None:
    """One step of a sign-momentum optimizer (Lion, arXiv:2302.06675) on many tensors, in place."""
    for parameter, gradient, mean in zip(parameters, gradients, means, strict=True):
        parameter -= rate * (beta * mean + (1 - beta) * gradient).sign()
        mean.lerp_(gradient, 0.01)


def step_inputs(case: Case, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    def draw() -> list[Tensor]:
        return [torch.randn(n, 3, device=device, generator=generator).to(dtype) for n in case["sizes"]]

    return {"parameters": draw(), "gradients": draw(), "means": draw(), "rate": case["rate"]}


def make_step(name: str, **changes: Any) -> Op:
    declared: dict[str, Any] = dict(
        name=name,
        reference=step,
        inputs=step_inputs,
        cases=[dict(sizes=(4, 9), rate=0.5), dict(sizes=(1,), rate=1e-3)],
        mutates=("parameters", "means"),
    )
    return Op(**declared | changes)


OPS = {make.__name__: make(make.__name__.replace("make", "toy")) for make in (make_attention, make_loss, make_step)}
ATTENTION, LOSS, STEP = OPS.values()
CASES = [pytest.param(op, case, id=f"{op.name}-{i}") for op in OPS.values() for i, case in enumerate(op.cases)]


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Makes functions importable as backends."""

    def offer(**functions: Callable[..., Any]) -> dict[str, str]:
        module = types.ModuleType("backends_of_test_ops")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return {name: f"{module.__name__}:{name}" for name in functions}

    return offer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_reference_is_right(op: Op, case: Case, dtype: torch.dtype) -> None:
    error, fine = op.check(case, "reference", dtype=dtype)
    assert fine, error


@pytest.mark.parametrize(("op", "case"), [case for case in CASES if case.values[0] is not STEP])
def test_gradients_are_right(op: Op, case: Case) -> None:
    error, fine = op.check_gradient(case)
    assert fine, error
    error, fine = op.check_gradient(case, dtype=torch.bfloat16)
    assert fine, error


@pytest.mark.parametrize(("op", "case"), CASES)
def test_registration(op: Op, case: Case) -> None:
    inputs = op.arguments(case)
    for name in op.differentiable:
        inputs[name].requires_grad_()
    packet = getattr(torch.ops.effbench, op.name)
    assert set(torch.library.opcheck(packet.default, tuple(inputs.values())).values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_compiles_whole_and_counts_what_ran(op: Op) -> None:
    eager, inputs = op.arguments(op.cases[0]), op.arguments(op.cases[0])
    outputs = flatten([op(**eager)])
    reset_backend_calls()
    torch.compiler.reset()
    compiled = flatten([torch.compile(op, fullgraph=True, backend="aot_eager")(**inputs)])
    assert backend_calls() == {op.name: {"reference": 1}}
    for one, other in zip(
        [*outputs, *flatten([*eager.values()])], [*compiled, *flatten([*inputs.values()])], strict=True
    ):
        assert torch.equal(one, other)


def test_costs() -> None:
    case = dict(heads=2, length=17, causal=True)
    inputs = ATTENTION.arguments(case)
    for name in "qkv":
        inputs[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out, _ = ATTENTION(**inputs)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == ATTENTION.flops(case) == 4 * 2 * 2 * 17 * 17 * 16
    assert counter.get_total_flops() == 7 * forward // 2
    assert ATTENTION.bytes(case, torch.bfloat16) == 4 * 2 * 2 * 2 * 17 * 16 + 4 * 2 * 2 * 17  # the sum is float32
    assert STEP.flops(STEP.cases[0]) == 0
    assert STEP.bytes(STEP.cases[0]) == 5 * 4 * 3 * 13  # two of three are written, too
    assert STEP.numbers(STEP.cases[0]) == 3 * 3 * 13
    assert {tensor.device.type for tensor in flatten([*STEP.describe_arguments(STEP.cases[0]).values()])} == {"meta"}


def test_an_output_without_a_declared_gradient_is_a_constant() -> None:
    inputs = ATTENTION.arguments(ATTENTION.cases[0])
    inputs["v"].requires_grad_()
    out, lse = ATTENTION(**inputs)
    assert out.requires_grad and not lse.requires_grad
    out.sum().backward()
    assert inputs["v"].grad is not None and inputs["q"].grad is None


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * x, 3 * x


def split_gradient(grad_twice: Tensor, grad_thrice: Tensor, x_shape: Sequence[int]) -> Tensor:
    return 2 * grad_twice + 3 * grad_thrice


def test_an_output_that_is_not_used_has_a_gradient_of_zero() -> None:
    op = Op(
        name="toy_split",
        reference=split,
        inputs=lambda case, device, dtype, generator: {"x": torch.ones(3, dtype=dtype)},
        cases=[{}],
        outputs=("twice", "thrice"),
        differentiable=("x",),
        gradient=split_gradient,
    )
    assert op.check_gradient({})[1]
    x = torch.ones(3, requires_grad=True)
    op(x)[1].sum().backward()
    assert x.grad is not None and x.grad.tolist() == [3, 3, 3]


def test_only_what_the_gradient_takes_is_kept() -> None:
    def scale_gradient(grad_out: Tensor, x_shape: Sequence[int], factor: Tensor) -> Tensor:
        return grad_out * factor

    def scale(x: Tensor, factor: Tensor) -> Tensor:
        return x * factor

    op = Op(
        name="toy_scale",
        reference=scale,
        inputs=lambda case, device, dtype, generator: {"x": torch.ones(3, dtype=dtype), "factor": torch.ones(3)},
        cases=[{}],
        differentiable=("x",),
        gradient=scale_gradient,
    )
    assert op.check_gradient({})[1]
    kept: list[Tensor] = []
    x, factor = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        op(x, factor).sum().backward()
    assert [tensor.data_ptr() for tensor in kept] == [factor.data_ptr()]


# ---- what is wrong is caught ----


@pytest.mark.parametrize(
    "spoil",
    [
        lambda dq, dk, dv: (dq, dk, 2 * dv),
        lambda dq, dk, dv: (dk, dq, dv),
        lambda dq, dk, dv: (dq, torch.zeros_like(dk), dv),
        lambda dq, dk, dv: (dq.masked_fill(torch.arange(17)[:, None] == 3, torch.nan), dk, dv),
    ],
    ids=["factor", "swapped", "zero", "nan"],
)
def test_a_wrong_gradient_is_caught(spoil: Callable[..., Any], request: pytest.FixtureRequest) -> None:
    def gradient(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return spoil(*attention_gradient(grad_out, q, k, v, out, lse, causal))

    op = make_attention(f"toy_wrong_{request.node.callspec.id}", gradient=gradient)
    case = dict(heads=2, length=17, causal=True)
    assert op.check(case, "reference")[1]
    error, fine = op.check_gradient(case)
    assert not fine, error


def test_a_wrong_gradient_of_a_loss_is_caught() -> None:
    def forgets_the_mean(grad_out: Tensor, logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
        return loss_gradient(grad_out, logits, target, smoothing) * len(logits)

    op = make_loss("toy_loss_sum", gradient=forgets_the_mean)
    assert op.check_gradient(op.cases[0])[1]  # one row
    assert not op.check_gradient(op.cases[2])[1]


def test_wrong_backends_of_several_outputs_are_caught(backends: Callable[..., dict[str, str]]) -> None:
    def fine(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal), attention(q, k, v, causal)[
            1
        ]

    def second(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, causal)
        return out, lse + 1e-3

    def small_row(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, causal)
        out[0, 0, 0, 0] *= 1.01
        return out, lse

    def unwritten(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, causal)
        return out, torch.empty_like(lse)

    def wrong_type(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = attention(q, k, v, causal)
        return out, lse.half()

    def one_output(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return attention(q, k, v, causal)[0]

    def declines(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        raise Declined("never")

    functions = (fine, second, small_row, unwritten, wrong_type, one_output, declines)
    op = make_attention("toy_attention_backends", backends=backends(**{f.__name__: f for f in functions}))
    case = dict(heads=2, length=17, causal=True)
    assert op.check(case, "fine")[1]
    for name in ("second", "small_row", "unwritten", "wrong_type", "one_output"):
        error, right = op.check(case, name)
        assert not right, (name, error)
    with pytest.raises(Declined, match="never"):
        op.check(case, "declines")


def test_wrong_backends_of_a_step_are_caught(backends: Callable[..., dict[str, str]]) -> None:
    def fine(parameters: Any, gradients: Any, means: Any, rate: float, beta: float = 0.9) -> None:
        step(parameters, gradients, means, rate, beta)

    def forgets_the_means(parameters: Any, gradients: Any, means: Any, rate: float, beta: float = 0.9) -> None:
        step(parameters, gradients, [mean.clone() for mean in means], rate, beta)

    def forgets_the_last(parameters: Any, gradients: Any, means: Any, rate: float, beta: float = 0.9) -> None:
        step(parameters[:-1], gradients[:-1], means[:-1], rate, beta)

    def other_way(parameters: Any, gradients: Any, means: Any, rate: float, beta: float = 0.9) -> None:
        step(parameters, gradients, means, -rate, beta)

    def converts(parameters: Any, gradients: Any, means: Any, rate: float, beta: float = 0.9) -> Callable[[], None]:
        return lambda: step(parameters, gradients, means, rate, beta)

    paths = backends(**{f.__name__: f for f in (fine, forgets_the_means, forgets_the_last, other_way, converts)})
    peer = Peer(paths.pop("converts"), "torch")
    op = make_step("toy_step_backends", backends=paths, peers={"peer": peer})
    inputs = op.arguments(op.cases[0])
    before = [tensor.clone() for tensor in flatten([*inputs.values()])]
    exact = op.compute_exact(inputs)
    assert op.verify("fine", inputs, exact)[1] and op.verify("fine", inputs, exact)[1]  # each on copies of its own
    assert op.verify("peer", inputs, exact)[1]
    for name in ("forgets_the_means", "forgets_the_last", "other_way"):
        error, right = op.verify(name, inputs, exact)
        assert not right, (name, error)
    assert all(torch.equal(one, other) for one, other in zip(before, flatten([*inputs.values()]), strict=True))


def test_dispatch_changes_the_arguments_themselves() -> None:
    inputs = STEP.arguments(STEP.cases[0])
    exact = STEP.compute_exact(inputs)
    with torch.no_grad():
        assert STEP(**inputs) is None
    changed = flatten([inputs["parameters"], inputs["means"]])
    for one, other in zip(changed, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def takes_no_gradient(logits: Tensor) -> Tensor:
    return logits


def takes_no_logits(grad_out: Tensor, target: Tensor) -> Tensor:
    return grad_out


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (make_step, {"mutates": ("parameter",)}, "mutates names 'parameter'"),
        (make_step, {"warm": ("x",)}, "warm names 'x'"),
        (make_step, {"differentiable": ("rate",)}, "declared together"),
        (make_loss, {"gradient": None}, "declared together"),
        (make_loss, {"mutates": ("logits",)}, "has no gradient"),
        (make_loss, {"differentiable": ("target_",)}, "differentiable names 'target_'"),
        (make_loss, {"unrounded": {"rounding": "none"}}, "unrounded names 'rounding'"),
        (make_loss, {"outputs": ("loss", "count")}, "1 outputs, and names of 2"),
        (make_loss, {"outputs": ("value",)}, "takes 'grad_out'"),
        (make_attention, {"gradient": loss_gradient}, "takes 'logits'"),
        (make_loss, {"gradient": takes_no_gradient}, "takes none of grad_out"),
        (make_loss, {"gradient": takes_no_logits}, "takes neither logits nor logits_shape"),
    ],
)  # fmt: skip
def test_a_declaration_that_contradicts_itself_is_refused(
    make: Callable[..., Op], changes: dict[str, Any], words: str, request: pytest.FixtureRequest
) -> None:
    name = f"toy_refused_{abs(hash(request.node.name))}"
    with pytest.raises(TypeError, match=rf"^op {name}: .*{words}"):
        make(name, **changes)


def test_an_op_without_gradients_has_none_to_check() -> None:
    with pytest.raises(TypeError, match="has no gradient"):
        STEP.check_gradient(STEP.cases[0])


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "case"), CASES)
def test_ops_on_the_device(op: Op, case: Case) -> None:
    assert op.check(case, "reference", device="cuda")[1]
    if op.gradient:
        assert op.check_gradient(case, device="cuda")[1]
