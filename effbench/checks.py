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
import json
import pickle
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from effbench.core.errors import Outcome, Unsupported
from effbench.core.kinds import Cache, Evict, Prompt, Select, Swap, Train, Weights
from effbench.core.method import BUILDERS, HOOKS, Method
from effbench.core.packages import method_line
from effbench.core.recipe import parse, parse_step
from effbench.core.registry import blame_method
from effbench.core.run import FitReport, InferPlan
from effbench.core.source import document_fields
from effbench.core.views import Example, Segments
from effbench.nn.calibration import walk
from effbench.nn.data import Data
from effbench.nn.files import artifact
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import (
    Replaced,
    dense_bias,
    dense_weight,
    matrix_shape,
    rebuilt,
    replace,
    stored_bytes,
    top_linears,
)
from effbench.nn.model.sparsity import measure_sparsity
from effbench.nn.run import ModelRun, narrow
from effbench.nn.train.batches import collate
from effbench.nn.train.fit import fit
from effbench.nn.train.loss import cross_entropy
from effbench.nn.train.settings import FitSettings
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
    "mixtral": {"intermediate_size": 256, "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": WIDTH},
    "gpt2": {"n_positions": 256},
    "gpt_neox": {"intermediate_size": 256},
}


DENSE = tuple(name for name in TOYS if name != "mixtral")  # whose MLPs are no mixtures of experts


PROMPT = Segments(
    instruction="Read. ",
    contexts=("One two three. Four five six. ", "What is next is far from it. "),
    question="What comes next?",
)


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


@functools.cache
def toy_tokenizer() -> Any:
    """A word is a token; there are as many as a toy model has, the first for padding and the end."""
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]", PROMPT.text()))
    names = ["<end>", *words, *(f"word{i}" for i in range(VOCABULARY))][:VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>", pad_token="<end>")


SKILLS: tuple[dict[str, Any], ...] = ({"skill": "odd"}, {"skill": "even"})  # of toy examples in turn


class ToyData(Data):
    """Random tokens that count as text."""

    def __init__(self) -> None:
        super().__init__("toy", {}, toy_tokenizer(), made=True)
        generator = torch.Generator().manual_seed(1)
        self._rows = torch.randint(1, VOCABULARY, (64, 32), generator=generator)
        self.pool = [Example(str(i), tuple(row), meta=SKILLS[i % 2]) for i, row in enumerate(self._rows.tolist())]
        self.validation = [Example(f"v{i}", tuple(row)) for i, row in enumerate(self._rows.flip(1)[:8].tolist())]
        rows = enumerate(self._rows.flip(0, 1)[:4].tolist())
        self.target = [Example(f"t{i}", tuple(row), meta=SKILLS[i % 2]) for i, row in rows]

    def ids(self, part: str, limit: int | None = None) -> Tensor:
        return self._rows.flatten()[:limit]


class ToyRun(ModelRun):
    """A run on toy data, whose texts begin with prompts where a method asks for some."""

    def apply(self, method: Method) -> None:
        if method.blind and not any(example.prompt for example in self.data.pool):
            self.data.pool = [dataclasses.replace(e, prompt=len(e.ids) // 4) for e in self.data.pool]
        super().apply(method)


def toy_run(
    architecture: str = "llama",
    seed: int = 0,
    activation: str | None = None,
    shape: dict[str, Any] | None = None,
    **settings: Any,
) -> ModelRun:
    """A run on a toy model with toy data; `shape` holds entries of the configuration that differ."""
    build = functools.partial(toy, architecture, activation=activation, **(shape or {}))
    return ToyRun(
        Source(name="toy", kind="folder", path=None, tokenizer=None, digest="toy"),
        build(),
        build,
        toy_tokenizer(),
        ToyData(),
        device=torch.device("cpu"),
        storage=torch.bfloat16,
        seed=seed,
        **({"sequences": 16, "length": 32} | settings),
    )


IDS = torch.arange(48).view(2, 24) * 7 % (VOCABULARY - 1) + 1


def probe(run: ModelRun) -> Tensor:
    """[2, 24, V] logits of fixed tokens."""
    return open_engine(run).logits(IDS)


def probe_model(model: Any) -> Tensor:
    """[2, 24, V] logits of fixed tokens under no plan."""
    return Engine(model, InferPlan()).logits(IDS)


class Behaviour(NamedTuple):
    """What a run does that a method may change."""

    logits: Tensor  # [2, 24, V]
    scores: Tensor  # log-probabilities of continuations behind prompts of three lengths, token by token
    continuations: list[list[int]]  # greedy, of the same prompts, through the cache
    prompt: Segments  # after the methods that rewrite prompts
    examples: tuple[str, ...]  # that the next fit sees, by id

    def same(self, other: Behaviour) -> bool:
        """Whether two runs do the same: exactly, but that caches may add the same numbers in another order."""
        close = torch.allclose(self.scores, other.scores, rtol=1e-4)
        return torch.equal(self.logits, other.logits) and close and self[2:] == other[2:]

    def in_any_order(self) -> Behaviour:
        """The same with the examples sorted."""
        return self._replace(examples=tuple(sorted(self.examples)))


PROMPTS = [list(range(1, 41)), list(range(30, 47)), [50, 60, 70, 80, 90]]


def score(run: ModelRun, prompts: Sequence[list[int]] = PROMPTS) -> Tensor:
    """[prompts x 4] log-probabilities of four tokens behind each prompt, read token by token."""
    found = open_engine(run).score([(prompt, [9, 7, 5, 3]) for prompt in prompts], block=1)
    return torch.tensor([value for scored in found for value in scored.token_logprobs])


def behave(run: ModelRun) -> Behaviour:
    """Have a toy run do everything that a method may change."""
    continuations = open_engine(run).generate(PROMPTS, 8, set())
    examples = tuple(example.id for example in run.data.train)
    return Behaviour(probe(run), score(run), continuations, run.rewrite(PROMPT), examples)


def applied(method: Method, seed: int = 0, chance: int = 0, fitted: bool = True) -> ModelRun:
    """A toy run that `method` has been applied to, with two steps of fit after it where it needs them, unless told.

    `chance` seeds torch's own generator, on which nothing may depend.
    """
    run = toy_run(seed=seed)
    torch.manual_seed(chance)
    run.apply(method)
    if fitted and needs_fit(method, run):
        fit_two_steps(run)
    run.finish(recipe_is_empty=True)
    torch.manual_seed(chance)  # of what is drawn while it is scored
    return run


@functools.lru_cache(maxsize=2)
def finished(method: Method) -> ModelRun:
    """The run of `applied`, shared by checks that only look at it."""
    return applied(method, chance=5)


def needs_fit(method: Method, run: ModelRun) -> bool:
    """Whether a method acts through a fit, or has left something in the model that only a fit makes anything of."""
    before = {name for name, _ in toy().named_parameters()}
    trainable = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    new = any(name.rpartition(".")[0] not in {path.rpartition(".")[0] for path in before} for name in trainable)
    return method.acts_in_fit or not run.train.empty or (new and not method.settles and not method.consumes)


FIT = FitSettings(steps=2, lr=1e-3, batch_size=4, schedule="constant", warmup=0.0, max_length=32)


def fit_two_steps(run: ModelRun) -> FitReport:
    """Two steps of the library's fit at a small learning rate."""
    return fit(run, FIT)


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
    # The order of what is read makes another model, so of a selection it is what is read that counts.
    fitted = not isinstance(method, Select)
    same = behave(applied(dataclasses.replace(method, **method.identity), fitted=fitted)).in_any_order()
    assert any(same.same(other.in_any_order()) for other in plain), "logits or text differ at the identity settings"


def check_deterministic(method: Method) -> None:
    """The same seed gives the same model, which does the same."""
    assert behave(finished(method)).same(behave(applied(method, chance=6))), (
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
    """Two steps of fit after the method give a finite loss, and the model they leave is another."""
    if not method.acts_in_fit:
        return
    run = toy_run()
    run.apply(method)
    before = probe(run)
    frozen = {name: (p, p.detach().clone()) for name, p in run.model.named_parameters() if not p.requires_grad}
    assert torch.isfinite(torch.tensor(fit_two_steps(run)["loss_last"]))
    after = probe(run)
    assert not torch.equal(after, before), "two steps of fit leave the logits as they were: nothing was trained"
    moved = [name for name, (parameter, value) in frozen.items() if not torch.equal(parameter, value)]
    assert not moved, f"{moved[0]} is frozen, and a fit has changed it"
    if isinstance(method, Train) and not {"train.activations", "train.parallel"} & {*method.slots()}:
        plain = toy_run()
        fit_two_steps(plain)
        assert not torch.equal(after, probe(plain)), "two steps of fit leave what they leave without the method"


def check_terms(method: Method) -> None:
    """Terms of the loss are means over the batch, and leave the cross-entropy there unless `train.loss` is claimed."""
    if not method.overrides("loss"):
        return
    told = []
    for times in (1, 2):
        run = toy_run()
        run.data.pool = run.data.pool[:4] * times
        run.apply(method)
        with tempfile.TemporaryDirectory() as folder:
            run.folder = Path(folder)
            fit(run, dataclasses.replace(FIT, steps=1, batch_size=4 * times))
            (line,) = map(json.loads, (run.folder / "fit-1.jsonl").read_text().splitlines())
        told.append(line["terms"])
    for name, once in told[0].items():
        assert abs(told[1][name] - once) <= 1e-4 * max(abs(once), 1e-6), (
            f"{name} is {once:.6g} of four examples, and {told[1][name]:.6g} of the same ones twice: "
            "a term is a mean over the learned tokens"
        )
    if "train.loss" not in method.slots():
        plain, own = _first_gradient(None), _first_gradient(method)
        shared = [name for name in plain if name in own]
        along = sum(float((plain[name] * own[name]).sum()) for name in shared)
        share = along / max(sum(float(plain[name].square().sum()) for name in shared), 1e-30)
        assert not shared or share > 0.5, (
            f"the gradient has {share:.2g} of that of the cross-entropy: terms that take its place claim `train.loss`"
        )


def _first_gradient(method: Method | None) -> dict[str, Tensor]:
    """Gradients of the first step of a fit, by the name of the parameter."""
    run = toy_run()
    run.data.pool = run.data.pool[:4]
    if method is not None:
        run.apply(method)
    found: dict[str, Tensor] = {}

    class Watch:
        def on_step(self, run: Any) -> None:
            found.update({n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None})

    run.train.chain("on_step").append(Watch())
    fit(run, dataclasses.replace(FIT, steps=1, batch_size=4, clip=None))
    return found


def check_learns(method: Method) -> None:
    """Each step of a fit computes with what the steps before it have left: the loss of one batch moves."""
    if not method.acts_in_fit or isinstance(method, Select):
        return
    run = toy_run()
    run.data.pool = run.data.pool[:4]
    run.apply(method)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run.folder = Path(folder)
        fit(run, dataclasses.replace(FIT, steps=4, lr=1e-2))
        losses = [json.loads(line)["loss"] for line in (run.folder / "fit-1.jsonl").read_text().splitlines()]
    moved = max(losses) - min(losses)
    assert moved > 1e-5 * abs(losses[0]), f"the loss of one batch is {losses[0]:.6g} in all of {len(losses)} steps"


def check_computes_with_its_weights(method: Method) -> None:
    """A precision computes each step with the weights that the step before has left, up to its rounding."""
    if "train.precision" not in method.slots():
        return
    run = toy_run()
    run.data.pool = run.data.pool[:4]
    batch = collate(run.data.pool, 0, run.device)
    run.apply(method)
    expected: list[float] = []

    class Watch:
        def on_step(self, run: Any) -> None:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                expected.append(float(cross_entropy(run.model(batch["input_ids"]).logits, batch["labels"])))

    run.train.chain("on_step").append(Watch())
    with tempfile.TemporaryDirectory() as folder:
        run.folder = Path(folder)
        fit(run, dataclasses.replace(FIT, steps=4, lr=3e-3))
        told = [json.loads(line)["loss"] for line in (run.folder / "fit-1.jsonl").read_text().splitlines()]
    for step, (before, after) in enumerate(zip(told[1:], expected, strict=False), 2):
        assert abs(before - after) < 0.1 * abs(told[0] - after) + 0.01 * after, (
            f"step {step} has a loss of {before:.4g}, and {after:.4g} with the weights that it has: "
            "a precision belongs round each forward pass, see effbench.nn.train.slots"
        )


def check_hooks_arrive(method: Method) -> None:
    """What the method overrides is called by the fit, and what it orders is read in that order."""
    if not method.acts_in_fit:
        return
    calls: set[str] = set()

    class Watched(type(method)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in (*HOOKS, *BUILDERS):
                calls.add(name)
            return super().__getattribute__(name)

    run = toy_run()
    object.__setattr__(method := dataclasses.replace(method), "__class__", Watched)
    run.apply(method)
    calls.clear()
    fit_two_steps(run)
    missing = [hook for hook in (*HOOKS, *BUILDERS) if method.overrides(hook) and hook not in calls]
    assert not missing, f"never called: {', '.join(missing)}"
    if isinstance(method, Select) and method.keeps_order:
        run = toy_run()
        read: list[tuple[int, ...]] = []
        run.apply(method)
        run.train.chain("batch").append(Reading(read))
        fit_two_steps(run)
        assert read == [example.ids for example in run.data.train[: len(read)]], "the order is not the one that is read"


class Reading:
    """Stands in a chain of hooks and takes down what a fit reads."""

    def __init__(self, read: list[tuple[int, ...]]) -> None:
        self.read = read

    def batch(self, batch: dict[str, Tensor], run: Any) -> dict[str, Tensor]:
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
        self.read.extend(tuple(row[:size]) for row, size in rows)
        return batch


def check_trained_survives(method: Method) -> None:
    """What was trained is what is saved: a loaded model does what the run does, and not what the model did before."""
    if not method.acts_in_fit or not method.trains:
        return
    run = toy_run()
    before = probe(run)
    run.apply(method)
    fit(run, dataclasses.replace(FIT, steps=4, lr=1e-2))  # far enough that storing it in 16 bits does not undo it
    run.finish()
    with tempfile.TemporaryDirectory() as folder:
        artifact.save(run.model, Path(folder) / "model", run.storage)
        loaded = artifact.load(Path(folder) / "model")
    mine, theirs = behave(run), probe_model(loaded)
    assert torch.equal(mine.logits, theirs), "the loaded model does not do what was trained"
    assert not torch.equal(theirs, before), "the loaded model is the one before training: what was trained is lost"


def check_resume(method: Method) -> None:
    """A fit that was killed after two of four steps goes on from its checkpoint to the same bits."""
    if not method.acts_in_fit:
        return
    settings = dataclasses.replace(FIT, steps=4)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut, again = (toy_run() for _ in range(3))
        for run, name in ((whole, "whole"), (cut, "cut"), (again, "cut")):
            run.folder = Path(folder) / name
            run.apply(method)
        fit(whole, settings)
        with mock.patch("effbench.nn.train.fit.EVERY", 0.0):
            tell = cut.progress
            cut.progress = _stop_after(2, tell)
            with contextlib.suppress(_Stopped):
                fit(cut, settings)
            fit(again, settings)
    assert again.log.fits[-1].get("resumed") == [2], "the fit began anew"
    ours, theirs = dict(again.model.named_parameters()), dict(whole.model.named_parameters())
    wrong = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert not wrong, (
        f"after a kill in the middle {wrong[0]} differs: what a method keeps between steps belongs in the model, "
        "the optimizer or run.state(self), and chance is torch's own"
    )


class _Stopped(Exception):
    """Stands for a kill."""


def _stop_after(steps: int, tell: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    def progress(unit: str, done: int, total: int) -> None:
        if done > steps:
            raise _Stopped
        tell(unit, done, total)

    return progress


def check_merges(method: Method) -> None:
    """What is said to merge leaves what stood there, and the same logits; a biased and a transposed linear, too."""
    if not method.merges:
        return
    for architecture in ("llama", "qwen2", "gpt2"):
        run = toy_run(architecture)
        names = [name for name, _ in run.model.named_parameters()]
        start = probe(run)
        if architecture == "qwen2":  # whose biases are zero at the start
            _stir(run, [p for name, p in run.model.named_parameters() if name.endswith("bias")])
        run.apply(method)
        fit(run, dataclasses.replace(FIT, steps=4, lr=1e-2))
        before = probe(run)
        run.settle()
        left = [name for name, _ in run.model.named_parameters() if name not in names]
        assert not left, f"{architecture}: {left[0]} is left after the merge"
        error = float((probe(run) - before).norm() / before.norm())
        assert not torch.equal(before, start), f"{architecture}: nothing was trained"
        assert error < 1e-5, f"{architecture}: logits differ by {error:.2g} after the merge"


def check_stacks(method: Method) -> None:
    """Of two that are said to stack each counts, and each is given a gradient."""
    if not method.stacks:
        return
    second = _named(method, "second") if method.swaps() else method
    run = toy_run()
    parts: list[list[nn.Parameter]] = []
    for step in (method, second):
        seen = set(run.model.parameters())
        run.apply(step)
        parts.append([p for p in run.model.parameters() if p.requires_grad and p not in seen])
    for part, which in zip(parts, ("first", "second"), strict=True):
        before = probe(run)
        _stir(run, part)
        assert not torch.equal(probe(run), before), f"of two that stand on one model the {which} does not count"
    graded: list[bool] = []

    class Watch:
        def on_step(self, run: Any) -> None:
            graded.extend(any(p.grad is not None and p.grad.any() for p in part) for part in parts)

    run.train.chain("on_step").append(Watch())
    fit(run, dataclasses.replace(FIT, steps=1))
    assert graded == [True, True], "of two that stand on one model one has no gradient"


def check_swaps(method: Method) -> None:
    """Of two kept by name one counts at a time: choosing it gives the bits that it gave, and those of no other."""
    if not method.swaps():
        return
    run = toy_run()
    base = probe(run)
    for name, lr in (("one", 1e-2), ("two", 3e-2)):
        run.apply(_named(method, name))
        fit(run, dataclasses.replace(FIT, steps=4, lr=lr))
    run.settle()
    seen: dict[str | None, Tensor] = {}
    for chosen in ("one", "two", None, "one", "two"):
        run.adapter(chosen)
        logits = probe(run)
        assert torch.equal(seen.setdefault(chosen, logits), logits), f"adapter {chosen!r} is another when chosen again"
    assert not torch.equal(seen["one"], seen["two"]), "two adapters give the same logits: both count, or neither"
    assert torch.equal(seen[None], base), "with no adapter chosen the model is not what it was"


def _named(method: Method, name: str) -> Method:
    """The method, what it trains kept by a name."""
    settings: dict[str, Any] = {"adapter": name}
    return dataclasses.replace(method, **settings)


def _stir(run: ModelRun, parameters: Sequence[nn.Parameter]) -> None:
    """Add noise to parameters, the same in each run of one seed."""
    generator = torch.Generator().manual_seed(run.seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def check_save_and_load(method: Method) -> None:
    """A saved model loads to the same logits, and its bytes are the bytes reported."""
    run = finished(method)
    with tempfile.TemporaryDirectory() as folder:
        written = artifact.save(run.model, Path(folder) / "model", run.storage)
        loaded = artifact.load(Path(folder) / "model")
    assert torch.equal(probe_model(loaded), probe_model(run.model)), "logits differ after loading"
    whole = stored_bytes(run.model, run.storage)
    inner = [stored_bytes(module, run.storage) for _, module in top_linears(run.model)]
    metadata = sum(part.metadata for part in inner)
    assert whole.weights + whole.metadata == written, f"reported {whole}, written {written}"
    assert metadata <= written


def check_linear_protocol(method: Method) -> None:
    """A replaced linear computes with exactly the weight it reports, and reports zero where it says so."""
    run = finished(method)
    for path, module in run.model.named_modules():
        if isinstance(module, Replaced):
            weight = dense_weight(module)
            assert weight.shape == (module.out_features, module.in_features), path
            x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
            expected = nn.functional.linear(x, weight, dense_bias(module))
            error = (module(x) - expected).norm() / expected.norm().clamp(min=1e-30)  # all of it may be pruned
            assert error < method_tolerance(method), f"{path}: forward differs from dense_weight by {float(error):.2g}"
            mask = module.kept()
            assert mask is None or not weight[~mask].any(), f"{path}: a weight held at zero is not zero"


def check_sparsity(method: Method) -> None:
    """What is asked to be zero is zero, no more and no less."""
    if method.asked_sparsity is not None:
        found = measure_sparsity(finished(method).model).linears
        assert abs(found - method.asked_sparsity) < 0.01, f"{found:.3f} of the weights are zero"


def method_tolerance(method: Method) -> float:
    """Relative error that a method may add in its forward pass beyond its weights: activation rounding, if any."""
    return 0.08 if method.rounds_activations else 1e-4


def check_folded_scales(method: Method) -> None:
    """Scales that a method moves between modules change nothing before it rounds, in no architecture."""
    if not isinstance(method, Weights) or type(method).scales is Weights.scales:
        return
    for architecture, activation in itertools.product(DENSE, ("relu", "gelu")):
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
    """Every architecture works or is refused with a reason; none crashes, and what PEFT freezes is frozen in each."""
    layers = 1 if isinstance(method, (Weights, Swap)) else 2  # these work block by block
    for architecture in TOYS:
        run = toy_run(architecture, shape={"layers": layers})
        own = {path: dense_weight(module) for path, module in Blocks(run.model).linears()}
        try:
            run.apply(method)
            trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
            for path, weight in own.items() if method.type == "PEFT" else ():
                loose = any(parameter.shape == weight.shape and torch.equal(parameter, weight) for parameter in trained)
                assert not loose, f"{architecture}: the weight of {path} is left trainable"
            if method.acts_in_fit:
                fit_two_steps(run)
                run.finish()
            assert torch.isfinite(probe(run)).all(), architecture
        except Outcome as outcome:
            assert str(outcome), architecture
        finally:
            run.close()


def check_changes_what_is_read(method: Method) -> None:
    """What changes inference changes what is scored; rows of a batch are read as if each were alone, in every
    architecture that can be read at all."""
    if not method.touches - {"prompt"} or method.is_identity:
        return
    plain = score(toy_run())
    changed = "decoder" in method.touches
    for architecture in TOYS:
        run = toy_run(architecture)
        try:
            run.apply(method)
        except Outcome as outcome:
            assert str(outcome), architecture
            continue
        together = score(run)
        alone = torch.cat([score(run, [prompt]) for prompt in PROMPTS])
        error = float((together - alone).abs().max())
        assert error < 1e-5 * float(alone.abs().max()), f"{architecture}: alone a row differs by {error:.2g}"
        texts = open_engine(run).generate(PROMPTS, 8, set())
        assert texts == [open_engine(run).generate([prompt], 8, set())[0] for prompt in PROMPTS], architecture
        changed |= architecture == "llama" and not torch.allclose(together, plain, rtol=1e-4)
        run.close()
    assert changed, "what is scored is what is scored without it"


def check_encodes(method: Method) -> None:
    """What was encoded comes back about as it was: closer than zeros would be, in every unit."""
    if not isinstance(method, Cache) or type(method).codecs is Cache.codecs:
        return
    generator = torch.Generator().manual_seed(0)
    for codec, what in zip(method.codecs(), ("keys", "values"), strict=True):
        if codec is None:
            continue
        units = torch.randn(3, 4, codec.unit, 32, generator=generator)
        decoded = codec.decode(codec.encode(units), 32).float()
        assert decoded.shape == units.shape, f"{what} of shape {tuple(units.shape)} come back as {tuple(decoded.shape)}"
        error = float(((decoded - units).flatten(2).norm(dim=2) / units.flatten(2).norm(dim=2)).max())
        assert error < 0.9, f"{what} come back with a relative error of {error:.2g}; zeros have 1"


def check_holds_what_is_asked(method: Method) -> None:
    """After the prompt each head holds as many slots as `budget` or `keep` say."""
    if not isinstance(method, Evict):
        return
    run = toy_run()
    run.apply(method)
    state, _ = open_engine(run).read(PROMPTS[:1])
    prompt = torch.tensor([len(PROMPTS[0]) - 1])
    asked = min(int(Evict.capacity(method, prompt)), int(prompt)) + int(not method.evicts_later)
    held = {int(layer.spread(layer.held())) for layer in state.cache.slot_layers}
    assert held == {asked}, f"{asked} slots are asked for, and {held} are held"


def check_writes_its_slots(method: Method) -> None:
    """Every slot that it claims is written when it is applied."""
    run = toy_run()
    run.apply(method)
    plans = {plan.name: plan for plan in (run.train, run.infer)}
    for claim in method.slots() if not method.consumes else ():
        plan, _, slot = claim.partition(".")
        assert plans[plan].slot(slot) is not None, f"it claims {claim} and does not write it"


def check_text_is_the_verifiers(method: Method) -> None:
    """A decoder's greedy text is the one that its verifier makes alone."""
    if "decoder" not in method.touches:
        return
    run = toy_run()
    run.apply(parse_step("rtn(bits=2)"))
    run.apply(method)
    made = open_engine(run).generate(PROMPTS, 8, set())
    assert made == run.infer.slot("decoder").verifier.generate(PROMPTS, 8, set()), "the text is not the verifier's"


def check_shortens(method: Method) -> None:
    """A prompt method leaves a prompt that is shorter, and no other prompt the second time."""
    if not isinstance(method, Prompt) or method.is_identity:
        return
    run = toy_run()
    run.apply(method)
    short = run.rewrite(PROMPT)
    before, after = (len(run.data.encode_prompt(segments.text())) for segments in (PROMPT, short))
    assert after < before, f"the prompt has {before} tokens before and {after} after"
    assert short.question, "the question is gone"
    assert short == run.rewrite(PROMPT), "the same prompt is shortened in two ways"


def check_odd_shapes(method: Method) -> None:
    """Of shapes that divide by little, a method either says beforehand that it cannot take them, or it takes them."""
    run = toy_run(shape=ODD)
    try:
        method.check_shapes({path: matrix_shape(module) for path, module in run.linears().items()})
    except Unsupported:
        return
    try:
        run.apply(method)
        if method.acts_in_fit:
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
