"""Models whose modules are not what their configuration says: saved and loaded to the same logits, or refused."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.pytorch_utils import Conv1D

from effbench.checks import toy, toy_run
from effbench.core.errors import Unsupported
from effbench.core.recipe import parse, parse_step
from effbench.nn.files import artifact
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import MaskedLinear, dense_weight, kept, rebuilt, stored_bytes
from effbench.nn.run import narrow

IDS = torch.arange(40).view(2, 20) * 7 % 94 + 1


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def body(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / artifact.MANIFEST).read_text())
    return found


def same_after(model: Any, folder: Path) -> Any:
    """The model saved, loaded, and seen to be the same in its logits, classes, shapes and attributes."""
    written = artifact.save(model, folder, torch.bfloat16)
    assert written == sum(stored_bytes(model, torch.bfloat16))
    loaded = artifact.load(folder)
    assert torch.equal(logits(loaded), logits(model))
    assert repr(loaded) == repr(model)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    return loaded


def cut(linear: Any, rows: Any = slice(None), columns: Any = slice(None)) -> None:
    """Keep some outputs and inputs of a linear or a Conv1D, in place."""
    if isinstance(linear, Conv1D):
        rows, columns = columns, rows
    linear.weight = nn.Parameter(linear.weight[rows][:, columns].clone())
    if linear.bias is not None:
        kept = columns if isinstance(linear, Conv1D) else rows
        linear.bias = nn.Parameter(linear.bias[kept].clone())
    if isinstance(linear, Conv1D):
        linear.nx, linear.nf = linear.weight.shape
    else:
        linear.out_features, linear.in_features = linear.weight.shape


def narrow_mlp(block: nn.Module, view: Blocks, width: int) -> None:
    for name in view.names.up:
        cut(block.get_submodule(name), rows=slice(width))
    cut(block.get_submodule(view.names.down), columns=slice(width))


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
def test_an_unchanged_model_is_an_ordinary_checkpoint(architecture: str, tmp_path: Path) -> None:
    model = toy(architecture)
    same_after(model, tmp_path)
    assert not body(tmp_path)["replaced"] and not body(tmp_path)["changed"]
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()) and torch.equal(logits(plain), logits(model))


def test_a_removed_layer_and_uniform_widths_are_ordinary_checkpoints(tmp_path: Path) -> None:
    model = toy(layers=3)
    view = Blocks(model)
    del view.blocks[1]
    view.renumber()
    for block in view.blocks:
        narrow_mlp(block, view, 96)
        block.mlp.intermediate_size = 96
    model.config.intermediate_size = 96
    same_after(model, tmp_path)
    assert not body(tmp_path)["replaced"] and not body(tmp_path)["changed"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
def test_uneven_mlp_widths(architecture: str, tmp_path: Path) -> None:
    model = toy(architecture)
    view = Blocks(model)
    for index, block in enumerate(view.blocks):
        narrow_mlp(block, view, 200 - 8 * index)
    same_after(model, tmp_path)


def test_uneven_heads_of_grouped_queries(tmp_path: Path) -> None:
    model = toy("qwen2")
    attention = model.model.layers[1].self_attn  # 4 heads of 32 on 2 groups; the second group goes
    for linear, rows in ((attention.q_proj, 64), (attention.k_proj, 32), (attention.v_proj, 32)):
        cut(linear, rows=slice(rows))
    cut(attention.o_proj, columns=slice(64))
    attention.num_key_value_groups = 2
    same_after(model, tmp_path)
    attention.num_key_value_groups = 1  # an attribute alone is a change too, here one without a group to repeat
    cut(attention.q_proj, rows=slice(32))
    cut(attention.o_proj, columns=slice(32))
    loaded = same_after(model, tmp_path / "again")
    assert loaded.model.layers[1].self_attn.num_key_value_groups == 1
    assert loaded.model.layers[0].self_attn.num_key_value_groups == 2


def test_uneven_heads_of_opt(tmp_path: Path) -> None:
    model = toy("opt")
    attention = model.model.decoder.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        cut(getattr(attention, name), rows=slice(96))
    cut(attention.out_proj, columns=slice(96))
    attention.num_heads, attention.embed_dim = 3, 96
    assert same_after(model, tmp_path).model.decoder.layers[0].self_attn.num_heads == 3


def test_uneven_heads_of_gpt2(tmp_path: Path) -> None:
    model = toy("gpt2")
    attention = model.transformer.h[1].attn
    kept = torch.cat([torch.arange(96) + 128 * part for part in range(3)])
    cut(attention.c_attn, rows=kept)
    cut(attention.c_proj, columns=slice(96))
    attention.num_heads, attention.split_size, attention.embed_dim = 3, 96, 96
    same_after(model, tmp_path)
    assert body(tmp_path)["changed"]["transformer.h.1.attn"]["attributes"] == {
        "embed_dim": 96,
        "num_heads": 3,
        "split_size": 96,
    }


def test_tied_embeddings_of_another_size_stay_tied(tmp_path: Path) -> None:
    model = toy("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    shorter = nn.Parameter(model.transformer.wte.weight[:-1].clone())
    model.transformer.wte.weight = model.lm_head.weight = shorter
    model.transformer.wte.num_embeddings = model.lm_head.out_features = len(shorter)
    loaded = same_after(model, tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_tensors_come_and_go(tmp_path: Path) -> None:
    model = toy("opt")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    model.lm_head.bias = nn.Parameter(torch.randn(96).bfloat16().float())
    model.model.decoder.layers[0].fc1.bias = None
    model.model.decoder.layers[1].fc1.extra = nn.Parameter(torch.ones(3))
    loaded = same_after(model, tmp_path)
    assert torch.equal(loaded.lm_head.bias, model.lm_head.bias)
    assert loaded.model.decoder.layers[0].fc1.bias is None
    assert torch.equal(loaded.model.decoder.layers[1].fc1.extra, torch.ones(3))


def test_a_linear_in_place_of_a_conv1d_is_not_read_transposed(tmp_path: Path) -> None:
    model = toy("gpt2")
    attention = model.transformer.h[0].attn
    attention.c_proj = rebuilt(attention.c_proj, attention.c_proj.weight.T.clone())  # square: shapes do not tell
    same_after(model, tmp_path)


def test_compressed_linears_of_other_widths(tmp_path: Path) -> None:
    run = toy_run("llama")
    view = Blocks(run.model)
    narrow_mlp(view.blocks[0], view, 192)
    run.apply(parse_step("rtn(group_size=64)"))
    run.finish()
    artifact.save(run.model, tmp_path, run.storage)
    assert torch.equal(logits(artifact.load(tmp_path)), logits(run.model))


class Scaled(nn.Module):
    """A module of effbench that is no linear but holds some."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.inner = nn.Linear(width, width, bias=False)

    def config(self) -> dict[str, Any]:
        return {"width": self.inner.in_features, "scale": self.scale}

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


class Doubled(LlamaDecoderLayer):
    """A block of effbench: still one of the original class, with a tensor of its own."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, **kwargs) * self.factor


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the classes of this file pass for effbench's own."""
    home = types.ModuleType("effbench.nn.at_home")
    for found in (Scaled, Doubled):
        monkeypatch.setattr(found, "__module__", home.__name__)
        setattr(home, found.__name__, found)
    monkeypatch.setitem(sys.modules, home.__name__, home)
    names = artifact.buildable() | {f"{home.__name__}:{own.__name__}" for own in (Scaled, Doubled)}
    monkeypatch.setattr(artifact, "buildable", lambda: names)


@pytest.mark.usefixtures("at_home")
def test_own_modules_and_what_they_hold(tmp_path: Path) -> None:
    model = toy()
    model.model.layers[0].mlp = Scaled(128, 0.5)
    model.model.layers[1].mlp = Scaled(128, 0.25)
    narrow(model, torch.bfloat16)
    weight = model.model.layers[0].mlp.inner.weight
    model.model.layers[0].mlp.inner = MaskedLinear.of(weight, weight > 0)
    same_after(model, tmp_path)
    assert list(body(tmp_path)["replaced"]) == [
        "model.layers.0.mlp",
        "model.layers.0.mlp.inner",
        "model.layers.1.mlp",
    ]


@pytest.mark.usefixtures("at_home")
def test_a_block_of_another_class_stays_a_block(tmp_path: Path) -> None:
    model = toy()
    expected = logits(model)
    for block in model.model.layers:
        block.__class__ = Doubled
        block.factor = nn.Parameter(torch.full((1,), 2.0))
    assert not torch.equal(logits(model), expected)
    loaded = same_after(model, tmp_path)
    assert isinstance(loaded.model.layers[0], LlamaDecoderLayer)
    assert len(loaded(IDS, output_hidden_states=True).hidden_states) == 3


def test_a_foreign_module_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    model = toy()
    model.model.layers[0].mlp.act_fn = nn.Tanhshrink()
    with pytest.raises(Unsupported, match=r"layers\.0\.mlp\.act_fn: .*Tanhshrink cannot be built again"):
        artifact.save(model, tmp_path, torch.bfloat16)
    model = toy(layers=3)
    del model.model.layers[2]
    with pytest.raises(Unsupported, match=r"layers\.2 is gone, but the configuration still describes it"):
        artifact.save(model, tmp_path, torch.bfloat16)


def test_what_does_not_fit_is_fatal(tmp_path: Path) -> None:
    model = toy()
    view = Blocks(model)
    narrow_mlp(view.blocks[0], view, 200)
    artifact.save(model, tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / artifact.WEIGHTS)
    name = "model.layers.0.mlp.down_proj.weight"

    def fails(message: str, changed: dict[str, Tensor]) -> None:
        save_file(changed, tmp_path / artifact.WEIGHTS)
        with pytest.raises(Unsupported, match=message):
            artifact.load(tmp_path)

    fails("1 tensors are missing", {key: value for key, value in tensors.items() if key != name})
    fails("1 tensors are unexpected", tensors | {"more": torch.ones(1)})
    fails(r"is \(128, 199\), expected \(128, 200\)", tensors | {name: tensors[name][:, :199].contiguous()})
    save_file(tensors, tmp_path / artifact.WEIGHTS)
    artifact.load(tmp_path)
    found = body(tmp_path)
    for part, entry in (
        ("changed", {"model.layers.7": {"attributes": {"hidden_size": 4}}}),
        ("changed", {"model.layers.1": {"class": "os:system"}}),
        ("changed", {"model.layers.1": {"class": "effbench.nn.model.linear:MaskedLinear"}}),
        ("replaced", {"model.layers.1.mlp": {"class": "torch.nn.modules.module:Module", "config": {}}}),
    ):
        text = json.dumps(found | {part: found[part] | entry})
        (tmp_path / artifact.MANIFEST).write_text(text)
        with pytest.raises(Unsupported):
            artifact.load(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("steps", ["magnitude(pattern='2:4')", "magnitude(sparsity=0.6), rtn(group_size=32)", "nf4()"])
def test_a_dense_export_is_read_by_plain_transformers(architecture: str, steps: str, tmp_path: Path) -> None:
    run = toy_run(architecture)
    for step in parse(steps).steps:
        run.apply(step)
    run.finish()
    linears = dict(Blocks(run.model).linears())
    weights = {path: dense_weight(module) for path, module in linears.items()}
    masks = {path: kept(module) for path, module in linears.items()}
    artifact.save_dense(run.model, tmp_path, torch.bfloat16)
    assert not (tmp_path / artifact.MANIFEST).exists()
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    for path, module in Blocks(plain).linears():
        assert type(module) in (nn.Linear, Conv1D)
        assert torch.equal(dense_weight(module), weights[path].bfloat16().float())
    if "magnitude" in steps:
        stored = load_file(tmp_path / artifact.MASKS)
        assert stored.keys() == masks.keys()
        for path, keep in stored.items():
            assert keep.dtype == torch.bool and torch.equal(keep, masks[path])
            assert not dense_weight(plain.get_submodule(path))[~keep].any()
    else:
        assert not (tmp_path / artifact.MASKS).exists()


def test_shapes_that_plain_transformers_does_not_know_have_no_dense_export(tmp_path: Path) -> None:
    run = toy_run()
    run.apply(parse_step("slicegpt(slicing=0.25)"))
    run.finish()
    with pytest.raises(Unsupported, match="plain transformers"):
        artifact.save_dense(run.model, tmp_path / "out", torch.bfloat16)
    assert not (tmp_path / "out").exists()
