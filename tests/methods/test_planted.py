"""Methods that do nothing, or lose what they did, and the check of the contract that catches each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from effbench import checks
from effbench.core.kinds import Select, Swap, Train
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.methods.peft._lowrank import LoRALinear
from effbench.methods.peft._prefix import Prefix
from effbench.methods.peft.lora import LoRA
from effbench.methods.peft.prefix_tuning import PrefixTuning
from effbench.nn.model.attention import list_attention
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.feed import count_front
from effbench.nn.model.linear import Around, Replaced, dense_weight, find_inner, make_linear
from effbench.nn.model.sites import find_sites


@dataclasses.dataclass(frozen=True)
class NaivePrecision(Train):
    """Autocast round the whole fit: every step computes with the weights of the first."""

    claims: ClassVar = ("train.precision",)

    def slot_values(self) -> dict[str, Any]:
        from effbench.nn.train.slots import Precision

        return {"precision": Precision()}

    @contextlib.contextmanager
    def context(self, run: Run) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16):
            yield


@dataclasses.dataclass(frozen=True)
class InertPrompt(Method):
    """Trains embeddings that only its own batches are given."""

    trains: ClassVar = True

    def apply(self, run: Run) -> None:
        run.model.requires_grad_(False)
        run.model.register_parameter("lost", nn.Parameter(torch.zeros(128)))
        super().apply(run)

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        return {"own": (run.model.lost - 1).square().sum()}


@dataclasses.dataclass(frozen=True)
class LostAdapter(Method):
    """Puts a trained vector in by a hook, which no file holds."""

    trains: ClassVar = True

    def apply(self, run: Run) -> None:
        run.model.requires_grad_(False)
        block = Blocks(run.model).blocks[0]
        block.mlp.register_parameter("shift", nn.Parameter(torch.zeros(128)))
        block.mlp.register_forward_hook(lambda module, inputs, output: output + module.shift)
        super().apply(run)

    def batch(self, batch: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        return batch


class Dead(Replaced):
    """Two factors, both zero: neither has a gradient."""

    def __init__(self, base: nn.Module) -> None:
        weight = dense_weight(base)
        super().__init__(weight.shape[1], weight.shape[0])
        self.base = base
        self.a = nn.Parameter(torch.zeros(4, weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], 4))

    def dense_weight(self) -> Tensor:
        return dense_weight(self.base) + (self.b @ self.a).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@dataclasses.dataclass(frozen=True)
class Untrained(Swap):
    """Starts where nothing moves."""

    def replace(self, module: nn.Module, site: Any) -> nn.Module:
        return Dead(module)


@dataclasses.dataclass(frozen=True)
class Loose(Swap):
    """Puts a new linear in, with a weight that the freezing before has not met."""

    type: ClassVar = "PEFT"

    def replace(self, module: nn.Module, site: Any) -> nn.Module:
        return make_linear(dense_weight(module), None)


@dataclasses.dataclass(frozen=True)
class Unattached(Train):
    """Forgets to put its hooks into the plan."""

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        return {"term": out.logits.float().mean()}

    def apply(self, run: Run) -> None: ...


@dataclasses.dataclass(frozen=True)
class Unordered(Select):
    """Ranks, and then has the fit shuffle what it ranked."""

    def order(self, examples: Any, run: Run) -> list[int]:
        return sorted(range(len(examples)), key=lambda i: examples[i].ids)

    def sampler(self, examples: Any, run: Run) -> Any:
        from effbench.nn.train.samplers import Shuffled

        return Shuffled(len(examples), run.seed)


@dataclasses.dataclass(frozen=True)
class Hidden(Train):
    """Keeps an average where no checkpoint finds it."""

    def on_step(self, run: Run) -> None:
        weight = next(run.model.parameters())
        average = 0.5 * getattr(run, "hidden", 0.0) + 0.5 * weight.detach()
        run.hidden = average  # type: ignore[attr-defined]
        weight.data.mul_(0.9).add_(0.1 * average)


@dataclasses.dataclass(frozen=True)
class Inert(Train):
    """Adds a term of weight zero."""

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        return {"nothing": 0.0 * out.logits.float().mean()}


@dataclasses.dataclass(frozen=True)
class Mover(Method):
    """Trains norms, and shrinks what it froze."""

    trains: ClassVar = True

    def apply(self, run: Run) -> None:
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_("norm" in name)
        super().apply(run)

    def on_step(self, run: Run) -> None:
        for parameter in run.model.parameters():
            parameter.data.mul_(1.0 if parameter.requires_grad else 0.999)


@dataclasses.dataclass(frozen=True)
class Summed(Train):
    """Its term grows with the batch."""

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        return {"sum": 1e-3 * out.logits.float().square().sum()}


@dataclasses.dataclass(frozen=True)
class Quiet(Train):
    """Takes the cross-entropy back and puts its own loss in its place, without a word."""

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        from effbench.nn.train.loss import mean_cross_entropy

        return {"own": out.logits.float().square().mean() - mean_cross_entropy(out.logits, batch)}


@dataclasses.dataclass(frozen=True)
class Negative(LoRA):
    """Merges its product with the wrong sign."""

    def settle(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, LoRALinear)
        module.scaling *= -1
        return super().settle(module)


@dataclasses.dataclass(frozen=True)
class Left(LoRA):
    """Says that it merges, and stays beside."""

    def settle(self, module: nn.Module) -> nn.Module:
        return module


class Shift(Around):
    """Adds a trained vector to what the one module inside gives, past all others that stand round it."""

    def __init__(self, inner: nn.Module, adapter: str = "") -> None:
        super().__init__(inner)
        self.adapter = adapter
        self.vector = nn.Parameter(torch.zeros(128))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return find_inner(self)(*args, **kwargs) + self.vector


@dataclasses.dataclass(frozen=True)
class Shadowing(Swap):
    """The second takes the place of the first, which is then not called."""

    sites: ClassVar = ("embedding",)
    stacks: ClassVar = True

    adapter: str = ""

    def replace(self, module: nn.Module, site: Any) -> nn.Module:
        return Shift(module, self.adapter)


class Sum(Shift):
    """Adds a trained vector, whichever adapter is chosen."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) + self.vector


@dataclasses.dataclass(frozen=True)
class Unchosen(Swap):
    """Has a name that nothing goes by."""

    sites: ClassVar = ("embedding",)

    adapter: str = ""

    def replace(self, module: nn.Module, site: Any) -> nn.Module:
        return Sum(module, self.adapter)


PLANTED = [
    ("check_merges", Negative(), "llama: logits differ by .* after the merge"),
    ("check_merges", Left(), "q_proj.a is left after the merge"),
    ("check_stacks", Shadowing(), "of two that stand on one model the first does not count"),
    ("check_swaps", Unchosen(), "two adapters give the same logits: both count, or neither"),
    ("check_computes_with_its_weights", NaivePrecision(), "belongs round each forward pass"),
    ("check_trained_survives", InertPrompt(), "what was trained is lost|nothing"),
    ("check_two_steps_of_fit", InertPrompt(), "nothing was trained"),
    ("check_learns", Untrained(), "the loss of one batch is .* in all of 4 steps"),
    ("check_hooks_arrive", Unattached(), "never called: loss"),
    ("check_architectures", Loose(), "llama: the weight of .*q_proj is left trainable"),
    ("check_resume", Hidden(), "what a method keeps between steps belongs in the model"),
    ("check_two_steps_of_fit", Inert(), "leave what they leave without the method"),
    ("check_two_steps_of_fit", Mover(), "embed_tokens.weight is frozen, and a fit has changed it"),
    ("check_terms", Summed(), "a term is a mean over the learned tokens"),
    ("check_terms", Quiet(), "terms that take its place claim `train.loss`"),
]


@pytest.mark.parametrize(("check", "method", "message"), PLANTED)
def test_a_planted_fault_is_caught(check: str, method: Method, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        getattr(checks, check)(method)


def test_what_a_hook_adds_is_seen_to_be_lost() -> None:
    with pytest.raises(AssertionError, match="the loaded model does not do what was trained"):
        checks.check_trained_survives(LostAdapter())


def test_an_order_that_is_not_read_is_seen() -> None:
    with pytest.raises(AssertionError, match="the order is not the one that is read"):
        checks.check_hooks_arrive(Unordered())


# Modules of other kinds than linears


class Scaled(Around):
    """Multiplies what a module gives by a trained number."""

    def __init__(self, inner: nn.Module, start: float = 1.0) -> None:
        super().__init__(inner)
        self.scale = nn.Parameter(torch.tensor([start]))

    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        return self.scale * output if isinstance(output, Tensor) else (self.scale * output[0], *output[1:])


@dataclasses.dataclass(frozen=True)
class Scaling(Swap):
    """Stands round MLPs, attention and the embedding."""

    sites: ClassVar = ("attention", "mlp", "embedding")

    def replace(self, module: nn.Module, site: Any) -> nn.Module:
        return Scaled(module, 1.0 + site.seed % 7 / 100)


@pytest.mark.parametrize("architecture", checks.DENSE)
def test_what_stands_round_a_module_lets_paths_through(architecture: str) -> None:
    run = checks.toy_run(architecture)
    linears = list(run.linears())
    run.apply(Scaling())
    places = sum(isinstance(module, Scaled) for module in run.model.modules())
    assert places == (2 if architecture == "opt" else 4) + 1
    assert list(run.linears()) == linears
    for path in linears:
        assert run.model.get_submodule(path) is run.linears()[path]
    before = checks.probe(run)
    checks.fit_two_steps(run)
    assert not torch.equal(checks.probe(run), before)
    for step in ("gptq(bits=8)", "wanda(sparsity=0.1)"):
        from effbench.core.recipe import parse_step

        run.apply(parse_step(step))
    assert torch.isfinite(checks.probe(run)).all() and list(run.linears()) == linears


@pytest.mark.parametrize("first", [True, False])
def test_a_prefix_takes_part_in_attention_that_something_stands_round(first: bool) -> None:
    run = checks.toy_run()
    prefix = PrefixTuning(length=4, hidden=16)
    for method in (prefix, Scaling()) if first else (Scaling(), prefix):
        run.apply(method)
    assert count_front(run.model) == 4
    before = checks.probe(run)
    checks.fit_two_steps(run)
    run.finish()
    after = checks.probe(run)
    assert not torch.equal(after, before) and len(list_attention(run.model)) == 2
    assert all(any(isinstance(child, Prefix) for child in module.children()) for module in list_attention(run.model))


def test_no_two_sites_share_a_seed_and_none_depends_on_the_recipe() -> None:
    run = checks.toy_run()
    kinds = ("linear", "attention", "mlp", "embedding")
    seeds = [site.seed for site in find_sites(run, kinds)]
    assert len(set(seeds)) == len(seeds) == 14 + 2 + 2 + 1
    roles = [(site.role, site.block) for site in find_sites(run, ("linear",))]
    assert roles[:7] == [("q", 0), ("k", 0), ("v", 0), ("o", 0), ("gate", 0), ("up", 0), ("down", 0)]
    run.apply(Scaling())
    assert [site.seed for site in find_sites(run, ("linear",))] == seeds[:14]
    assert [site.seed for site in find_sites(checks.toy_run(seed=1), kinds)] != seeds
