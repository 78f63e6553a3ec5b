"""The contract that every method must pass; tests run it over the registry, `effbench check` over an author's file.

>>> from effbench import checks
>>> from effbench.methods.quant.rtn import RTN
>>> for check in checks.all_checks():
...     check(RTN(**RTN.trials[0]))

Each check takes a method and raises `AssertionError` with what is wrong. A method that must fail one
says so in its class: `exceptions = {"check_name": "why"}`. `examine` runs them all and gives a verdict for each:

>>> [verdict.check for verdict in checks.examine(RTN) if not verdict.ok]
[]
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.core.errors import Unsupported
from effbench.core.kinds import Cache, Prompt, Select, Train, Weights
from effbench.core.method import Method
from effbench.core.packages import method_line
from effbench.core.recipe import parse, parse_step
from effbench.core.registry import blame_method
from effbench.core.run import FitReport
from effbench.core.source import document_fields
from effbench.core.views import Example, Segments
from effbench.nn.calibration import walk
from effbench.nn.data import Data
from effbench.nn.files import artifact
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.linear import Replaced, dense_weight, matrix_shape, rebuilt, replace, stored_bytes, top_linears
from effbench.nn.model.sparsity import measure_sparsity
from effbench.nn.run import ModelRun, narrow
from effbench.nn.train.fit import FitSettings, fit
from effbench.sources import Source

Check = Callable[[Method], None]
VOCABULARY = 96
WIDTH = 128  # one group of the usual size
ODD = {"hidden_size": 72, "intermediate_size": 100}  # no multiples of 16, and of 8 and 4 at most
TOYS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 256, "num_key_value_heads": 4},
    "mistral": {"intermediate_size": 256, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"intermediate_size": 256, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": WIDTH},
    "gpt2": {"n_positions": 256},
    "gpt_neox": {"intermediate_size": 256},
}


def toy(
    architecture: str = "llama", seed: int = 0, layers: int = 2, activation: str | None = None, **changes: Any
) -> Any:
    """A random model of `architecture`, small enough to be changed in milliseconds, `activation` in its MLPs.

    `changes` are entries of its configuration.
    """
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **(shape | TOYS[architecture] | changes))
    if activation is not None:
        setattr(config, "hidden_act" if hasattr(config, "hidden_act") else "activation_function", activation)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    narrow(model, torch.bfloat16)
    return model


class ToyData(Data):
    """Random tokens that count as text."""

    def __init__(self) -> None:
        super().__init__("toy", {}, None)
        generator = torch.Generator().manual_seed(1)
        self._rows = torch.randint(1, VOCABULARY, (64, 32), generator=generator)
        self.pool = [Example(str(i), tuple(row)) for i, row in enumerate(self._rows.tolist())]

    def ids(self, part: str, limit: int | None = None) -> Tensor:
        return self._rows.flatten()[:limit]


def toy_run(
    architecture: str = "llama",
    seed: int = 0,
    activation: str | None = None,
    shape: dict[str, Any] | None = None,
    **settings: Any,
) -> ModelRun:
    """A run on a toy model with toy data; `shape` holds entries of the configuration that differ."""
    build = functools.partial(toy, architecture, activation=activation, **(shape or {}))
    return ModelRun(
        Source(name="toy", kind="folder", path=None, tokenizer=None, digest="toy"),
        build(),
        build,
        None,
        ToyData(),
        device=torch.device("cpu"),
        storage=torch.bfloat16,
        seed=seed,
        **({"sequences": 16, "length": 32} | settings),
    )


def probe(run: ModelRun) -> Tensor:
    """[2, 24, V] logits of fixed tokens."""
    ids = torch.arange(48).view(2, 24) * 7 % (VOCABULARY - 1) + 1
    return open_engine(run).logits(ids)


PROMPT = Segments(
    instruction="Read.", context="one two three four five six", question="What comes next?", separator=" "
)


class Behaviour(NamedTuple):
    """What a run does that a method may change."""

    logits: Tensor  # [2, 24, V]
    continuation: list[list[int]]  # greedy, through the cache
    prompt: Segments  # after the methods that rewrite prompts
    examples: tuple[str, ...]  # that the next fit sees, by id

    def same(self, other: Behaviour) -> bool:
        """Whether two runs do exactly the same."""
        return torch.equal(self.logits, other.logits) and self[1:] == other[1:]

    def in_any_order(self) -> Behaviour:
        """The same with the examples sorted."""
        return self._replace(examples=tuple(sorted(self.examples)))


def behave(run: ModelRun) -> Behaviour:
    """Have a toy run do everything that a method may change."""
    continuation = open_engine(run).generate([list(range(1, 25)), list(range(30, 40))], 8, set())
    return Behaviour(probe(run), continuation, run.rewrite(PROMPT), tuple(example.id for example in run.data.train))


def applied(method: Method, seed: int = 0, chance: int = 0) -> ModelRun:
    """A toy run that `method` has been applied to, with two steps of fit after it where it needs them.

    `chance` seeds torch's own generator, on which nothing may depend.
    """
    run = toy_run(seed=seed)
    torch.manual_seed(chance)
    run.apply(method)
    if method.trains:
        fit_two_steps(run)
    run.finish(recipe_is_empty=True)
    return run


def fit_two_steps(run: ModelRun) -> FitReport:
    """Two steps of the library's fit at a small learning rate."""
    return fit(run, FitSettings(steps=2, lr=1e-3, batch_size=4, schedule="constant", warmup=0.0, max_length=32))


def check_frozen_and_picklable(method: Method) -> None:
    """Instances cannot be changed and survive pickling."""
    for field in dataclasses.fields(method):
        try:
            setattr(method, field.name, None)
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError(f"{field.name} can be set: make the dataclass frozen")
    assert pickle.loads(pickle.dumps(method)) == method


def check_step_string(method: Method) -> None:
    """The canonical step string parses back to the same method."""
    assert parse_step(str(method)) == method


def check_facts(method: Method) -> None:
    """A reader learns what the method is, where it was published and what each of its parameters means."""
    cls = type(method)
    summary = inspect.getdoc(sys.modules[cls.__module__])
    assert summary, "the file does not begin with a docstring whose first line says what the method is"
    assert cls.paper, "the paper is not named: paper = 'arXiv:...', or where else it was published"
    assert cls.published or cls.caveats or cls.paper == "unpublished", (
        "the paper's own setting is not named: published = 'RECIPE', or caveats = ('why there is none here',)"
    )
    steps = parse(cls.published).steps
    assert not steps or cls in map(type, steps), f"published = {cls.published!r} does not use the method"
    made = f"{cls.__name__}("  # by dataclass, for a class without
    assert not (cls.__dict__["__doc__"] or made).startswith(made), "the class has no docstring"
    bare = [field.name for field in document_fields(cls).values() if not field.comment]
    assert not bare, f"without a comment beside or above the field: {', '.join(bare)}"


def check_identity(method: Method) -> None:
    """At its `identity` settings a method changes nothing; training goes as it would without it."""
    if method.identity is None:
        return
    run = toy_run()
    plain = [behave(run)]
    if isinstance(method, Train):
        fit_two_steps(run)
        plain = []
    run.finish(recipe_is_empty=True)
    plain.append(behave(run))
    same = behave(applied(dataclasses.replace(method, **method.identity))).in_any_order()
    assert any(same.same(other.in_any_order()) for other in plain), "logits or text differ at the identity settings"


def check_deterministic(method: Method) -> None:
    """The same seed gives the same model, which does the same."""
    assert behave(applied(method, chance=5)).same(behave(applied(method, chance=6))), (
        "two runs with one seed differ: draw from a generator seeded by `run.seed` or `layer.seed`"
    )


def check_touches_only_its_part(method: Method) -> None:
    """A kind changes what it may change: weights by Weights and Swap, data by Select, plans by the rest."""
    run = toy_run()
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.apply(method)
    after = dict(run.model.named_parameters())
    if isinstance(method, (Select, Train, Cache, Prompt)):
        assert before.keys() == after.keys(), "modules were replaced"
        assert all(torch.equal(before[name], after[name]) for name in before), "weights were changed"
    untouched = [name for name in before if "embed" in name or "lm_head" in name]
    if isinstance(method, Weights):
        assert all(torch.equal(before[name], after[name]) for name in untouched), "embeddings or head were changed"
        run.reference.load_state_dict(toy().state_dict())


def check_two_steps_of_fit(method: Method) -> None:
    """Two steps of fit after the method give a finite loss, or there is honestly nothing to train."""
    if method.trains:
        run = toy_run()
        run.apply(method)
        assert torch.isfinite(torch.tensor(fit_two_steps(run)["loss_last"]))


def check_save_and_load(method: Method) -> None:
    """A saved model loads to the same logits, and its bytes are the bytes reported."""
    run = applied(method)
    with tempfile.TemporaryDirectory() as folder:
        written = artifact.save(run.model, Path(folder) / "model", run.storage)
        loaded = artifact.load(Path(folder) / "model")
    ids = torch.arange(48).view(2, 24) * 7 % (VOCABULARY - 1) + 1
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, run.model(ids).logits), "logits differ after loading"
    whole = stored_bytes(run.model, run.storage)
    inner = [stored_bytes(module, run.storage) for _, module in top_linears(run.model)]
    metadata = sum(part.metadata for part in inner)
    assert whole.weights + whole.metadata == written, f"reported {whole}, written {written}"
    assert metadata <= written


def check_linear_protocol(method: Method) -> None:
    """A replaced linear computes with exactly the weight it reports, and reports zero where it says so."""
    run = applied(method)
    for path, module in run.model.named_modules():
        if isinstance(module, Replaced):
            weight = dense_weight(module)
            assert weight.shape == (module.out_features, module.in_features), path
            x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
            expected = nn.functional.linear(x, weight, module.bias)
            error = (module(x) - expected).norm() / expected.norm().clamp(min=1e-30)  # all of it may be pruned
            assert error < method_tolerance(method), f"{path}: forward differs from dense_weight by {float(error):.2g}"
            mask = module.kept()
            assert mask is None or not weight[~mask].any(), f"{path}: a weight held at zero is not zero"


def check_sparsity(method: Method) -> None:
    """What is asked to be zero is zero, no more and no less."""
    if method.asked_sparsity is not None:
        found = measure_sparsity(applied(method).model).linears
        assert abs(found - method.asked_sparsity) < 0.01, f"{found:.3f} of the weights are zero"


def method_tolerance(method: Method) -> float:
    """Relative error that a method may add in its forward pass beyond its weights: activation rounding, if any."""
    return 0.08 if method.rounds_activations else 1e-4


def check_folded_scales(method: Method) -> None:
    """Scales that a method moves between modules change nothing before it rounds, in no architecture."""
    if not isinstance(method, Weights) or type(method).scales is Weights.scales:
        return
    for architecture, activation in itertools.product(TOYS, ("relu", "gelu")):
        inputs = next(walk(toy_run(architecture, activation=activation), method.needs))
        shared = inputs.view.shared_inputs(inputs.module)
        inputs.gather(shared, method.needs)
        before = torch.cat(inputs.forward())
        inputs.fold(shared, method.scales(inputs, shared))
        for layer in inputs.layers(shared):
            linear: Any = rebuilt(layer.module, layer.weight)
            if layer.bias is not None:
                linear.bias.data.copy_(layer.bias)
            replace(inputs.run.model, layer.name, linear)
        error = float((torch.cat(inputs.forward()) - before).norm() / before.norm())
        assert error < 1e-5, (
            f"{architecture} with {activation}: moving the scales changes the outputs of a block by {error:.2g}"
        )


def check_undone_on_exit(method: Method) -> None:
    """Closing a run leaves no trace in the process: a fresh run is as before."""
    before = probe(toy_run())
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    run = applied(method)
    run.close()
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(probe(toy_run()), before)


def check_architectures(method: Method) -> None:
    """Every architecture works or is refused with a reason; none crashes."""
    from effbench.core.errors import Outcome

    for architecture in TOYS:
        run = toy_run(architecture)
        try:
            run.apply(method)
            assert torch.isfinite(behave(run).logits).all(), architecture
        except Outcome as outcome:
            assert str(outcome), architecture
        finally:
            run.close()


def check_odd_shapes(method: Method) -> None:
    """Of shapes that divide by little, a method either says beforehand that it cannot take them, or it takes them."""
    run = toy_run(shape=ODD)
    try:
        method.check_shapes({path: matrix_shape(module) for path, module in run.linears().items()})
    except Unsupported:
        return
    try:
        run.apply(method)
        if method.trains:
            fit_two_steps(run)
    except Unsupported as reason:
        raise AssertionError(
            f"refused while it runs, which check_shape(out, width) can say beforehand: {reason}"
        ) from None
    run.finish(recipe_is_empty=True)
    assert torch.isfinite(probe(run)).all(), f"logits are not finite at {ODD}"


# What other settings than the first must pass too.
PACKING = (check_linear_protocol, check_save_and_load, check_sparsity, check_odd_shapes)


def all_checks() -> tuple[Check, ...]:
    """Every check, in the order written."""
    return tuple(value for name, value in globals().items() if name.startswith("check_"))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one check with one setting of a method."""

    check: str  # name of the function
    settings: dict[str, Any]  # one of the method's `trials`
    reason: str  # why it failed, or may fail; empty if it passed
    ok: bool
    seconds: float


def examine(cls: type[Method]) -> Iterator[Verdict]:
    """Run every check with the first of a method's `trials`, those of packing with all. Raises `Usage` for settings
    that the method itself refuses."""
    for number, settings in enumerate(cls.trials):
        with blame_method(cls.__name__):
            method = cls(**settings)
        for check in PACKING if number else all_checks():
            begin = time.perf_counter()
            reason = _run_check(check, method)
            allowed = method.exceptions.get(check.__name__)
            ok = not reason
            if allowed is not None:
                ok = bool(reason)
                reason = f"fails as declared: {allowed}" if reason else "passes: take it out of `exceptions`"
            yield Verdict(check.__name__, settings, reason, ok, time.perf_counter() - begin)


def _run_check(check: Check, method: Method) -> str:
    """Why a check fails, with the line of the method's file that crashed; empty if it passes.

    What the method prints goes to stderr.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            check(method)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # an author's code may end the program, too
        message = " ".join(str(error).split())
        name = "" if message and isinstance(error, AssertionError) else type(error).__name__
        return ": ".join(filter(None, (name, message))) + method_line(error)
    return ""
