"""The contract that every method must pass; tests run it over the registry, authors over their own file.

    for check in checks.all_checks():
        check(MyMethod(**MyMethod.trial))

Each check takes a method and raises `AssertionError` with what is wrong. A method that must fail one
says so in its class: `exceptions = {"check_name": "why"}`.
"""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.core.kinds import Cache, Prompt, Select, Train, Weights
from effbench.core.method import Method
from effbench.core.recipe import parse_step
from effbench.core.run import FitReport
from effbench.core.views import Example
from effbench.nn.data import Data
from effbench.nn.files import artifact
from effbench.nn.model.linear import Replaced, dense_weight, stored_bytes, top_linears
from effbench.nn.run import ModelRun, narrow
from effbench.nn.train.fit import FitSettings, fit
from effbench.sources import Source

Check = Callable[[Method], None]
VOCABULARY = 96
WIDTH = 128  # one group of the usual size
TOYS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 256, "num_key_value_heads": 4},
    "mistral": {"intermediate_size": 256, "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"intermediate_size": 256, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": WIDTH},
    "gpt2": {"n_positions": 256},
    "gpt_neox": {"intermediate_size": 256},
}


def toy(architecture: str = "llama", seed: int = 0, layers: int = 2) -> Any:
    """A random model of `architecture`, small enough to be changed in milliseconds."""
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
    config = AutoConfig.for_model(architecture, **(shape | TOYS[architecture]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    narrow(model, torch.bfloat16)
    return model


class ToyData(Data):
    """Random tokens that count as text."""

    def __init__(self) -> None:
        super().__init__("toy", {"train": ["toy"]}, None)
        generator = torch.Generator().manual_seed(1)
        self._rows = torch.randint(1, VOCABULARY, (64, 32), generator=generator)
        self._pool = [Example(str(i), tuple(row)) for i, row in enumerate(self._rows.tolist())]

    def ids(self, part: str) -> Tensor:
        return self._rows.flatten()


def toy_run(architecture: str = "llama", seed: int = 0, **settings: Any) -> ModelRun:
    """A run on a toy model with toy data."""
    return ModelRun(
        Source(name="toy", kind="folder", path=None, tokenizer=None, digest="toy"),
        toy(architecture),
        lambda: toy(architecture),
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
    return run.engine().logits(ids)


def applied(method: Method, seed: int = 0) -> ModelRun:
    """A toy run that `method` has been applied to, with two steps of fit after it where it needs them."""
    run = toy_run(seed=seed)
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
    """The paper is named and the module says in one line what it is."""
    assert type(method).paper, "paper is empty"
    assert type(method).__doc__, "the class has no docstring"


def check_identity(method: Method) -> None:
    """At its `identity` settings a method leaves the logits unchanged."""
    if method.identity is None:
        return
    plain = probe(toy_run())
    same = probe(applied(dataclasses.replace(method, **method.identity)))
    run = toy_run()
    run.finish(recipe_is_empty=True)
    assert torch.equal(same, plain) or torch.equal(same, probe(run)), "logits differ at the identity settings"


def check_deterministic(method: Method) -> None:
    """The same seed gives the same model."""
    torch.manual_seed(5)
    first = probe(applied(method))
    torch.manual_seed(6)
    assert torch.equal(first, probe(applied(method))), "two runs with one seed differ"


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
            error = (module(x) - expected).norm() / expected.norm()
            assert error < method_tolerance(method), f"{path}: forward differs from dense_weight by {float(error):.2g}"
            mask = module.kept()
            assert mask is None or not weight[~mask].any(), f"{path}: a weight held at zero is not zero"


def method_tolerance(method: Method) -> float:
    """Relative error that a method may add in its forward pass beyond its weights: activation rounding, if any."""
    return 0.08 if method.rounds_activations else 1e-4


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
            assert torch.isfinite(probe(run)).all(), architecture
        except Outcome as outcome:
            assert str(outcome), architecture
        finally:
            run.close()


def all_checks() -> dict[str, Check]:
    """Every check by name, in the order written."""
    return {name: value for name, value in globals().items() if name.startswith("check_")}
