"""SliceGPT: nothing changes until something is cut, and what is left then is the model with its stream projected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.llama.modeling_llama import LlamaRMSNorm as LlamaNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm as Qwen2Norm

from effbench.checks import TOYS, VOCABULARY, WIDTH, fit_two_steps, toy_run
from effbench.core.errors import Diverged, Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.formats.integer import IntLinear
from effbench.methods.prune.slicegpt import SliceGPT, principal
from effbench.nn.files import artifact
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import stored_bytes
from effbench.nn.model.sliced import RMS, Sliced, fuse_norms
from effbench.nn.run import ModelRun

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "gpt2")
IDS = torch.arange(48).view(2, 24) * 7 % (VOCABULARY - 1) + 1
LAYERS, MLP, POSITIONS = 2, 256, 256


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the RMSNorms of transformers compute in float64, too; as they are they go through float32."""

    def forward(self: Any, x: Tensor) -> Tensor:
        found: Tensor = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return found

    for norm in (LlamaNorm, Qwen2Norm):
        monkeypatch.setattr(norm, "forward", forward)


def uneven(architecture: str, dtype: torch.dtype = torch.float32) -> ModelRun:
    """A toy run whose norms scale and shift, whose biases are not zero and whose embeddings have a mean."""
    run = toy_run(architecture)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if parameter.dim() == 1 or name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight")):
                parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
    run.model.to(dtype)
    return run


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS, use_cache=False).logits
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def orthonormal(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


# Nothing is cut


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fused_norms_change_nothing(architecture: str) -> None:
    model = uneven(architecture).model
    view, before = Blocks(model), logits(model)
    fuse_norms(view)
    assert distance(logits(model), before) < 5e-6
    paths = [view.names.norm, *(view.path(i, name) for i in range(len(view)) for name in view.names.norms)]
    assert all(isinstance(model.get_submodule(path), RMS) for path in paths)
    assert view.head.weight is not view.embedding.weight


@pytest.mark.parametrize("orientation", ["random", "pca"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_slicing_nothing_changes_nothing(architecture: str, orientation: Any) -> None:
    run = uneven(architecture)
    before = logits(run.model)
    run.apply(SliceGPT(slicing=0.0, orientation=orientation))
    assert distance(logits(run.model), before) < 1e-5
    for block in Blocks(run.model).blocks:
        for shortcut in (block.shortcut_attention, block.shortcut_mlp):
            assert torch.allclose(shortcut.T @ shortcut, torch.eye(WIDTH), atol=1e-5)
            assert not torch.allclose(shortcut, torch.eye(WIDTH), atol=1e-2)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt2"])
def test_in_float64_not_even_rounding_is_seen(architecture: str) -> None:
    run = uneven(architecture, torch.float64)
    before = logits(run.model)
    run.apply(SliceGPT(slicing=0.0))
    assert distance(logits(run.model), before) < 1e-12


def test_rms_is_a_layer_norm_of_what_has_no_mean_in_any_basis() -> None:
    x, basis = torch.randn(5, WIDTH, dtype=torch.float64), orthonormal(WIDTH)
    norm = nn.LayerNorm(WIDTH, eps=1e-3, elementwise_affine=False)
    centred = x - x.mean(-1, keepdim=True)
    assert torch.allclose(RMS(WIDTH, 1e-3)(centred @ basis), norm(x) @ basis)
    mean_square = centred.square().mean(-1, keepdim=True)  # of all channels, however many are handed over
    flat = nn.functional.pad(centred.norm(dim=-1, keepdim=True), (0, 7))
    assert torch.allclose(RMS(WIDTH, 1e-3)(flat), flat / (mean_square + 1e-3).sqrt())


# Principal directions


def test_planted_directions_are_found_in_their_order() -> None:
    basis, energies = orthonormal(16), torch.tensor([400.0, 100.0, 25.0, 4.0], dtype=torch.float64)
    coefficients = orthonormal(64, seed=1)[:, :4] * energies.sqrt()  # columns orthogonal, of known energy
    tokens = coefficients @ basis[:, [3, 1, 0, 2]].T
    directions, found = principal([tokens[:40].view(2, 20, 16), tokens[40:].view(1, 24, 16)], "here")
    assert torch.allclose(found[:4], energies) and torch.allclose(found[4:], torch.zeros(12).double(), atol=1e-9)
    overlap = (directions[:, :4].T @ basis[:, [3, 1, 0, 2]]).abs()
    assert torch.allclose(overlap, torch.eye(4).double(), atol=1e-9)
    assert torch.allclose(directions.T @ directions, torch.eye(16).double(), atol=1e-12)


def test_the_mean_of_the_signal_is_part_of_it() -> None:
    tokens = torch.zeros(8, 3)
    tokens[:, 1] = 5  # no variance, but energy
    tokens[::2, 2], tokens[1::2, 2] = 1, -1
    directions, energy = principal([tokens], "here")
    assert directions[1, 0].abs() == pytest.approx(1) and energy.tolist() == pytest.approx([200, 8, 0])


def test_a_signal_that_is_not_finite_is_an_outcome() -> None:
    run = toy_run()
    run.model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(Diverged, match=r"layers\.0\.post_attention_layernorm: activations are not finite"):
        run.apply(SliceGPT())


# What is cut


@pytest.mark.parametrize(
    ("architecture", "slice_head"),
    [("llama", False), ("llama", True), ("qwen2", False), ("opt", False), ("opt", True), ("gpt2", True)],
)
def test_a_signal_in_a_subspace_of_the_kept_width_loses_nothing(architecture: str, slice_head: bool) -> None:
    run = uneven(architecture)
    view = Blocks(run.model)
    subspace = orthonormal(WIDTH)[:, :96].float()
    # LayerNorm takes the mean off after the projection; a subspace without means stays what it is.
    subspace = torch.linalg.qr(subspace - subspace.mean(0))[0]
    inside = subspace @ subspace.T
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(parameter @ inside)
        for block in view.blocks:
            for name in (view.names.out, view.names.down):
                linear = block.get_submodule(name)
                linear.weight.copy_(linear.weight @ inside if architecture == "gpt2" else inside @ linear.weight)
                if linear.bias is not None:
                    linear.bias.copy_(inside @ linear.bias)
    before = logits(run.model)
    run.apply(SliceGPT(slicing=0.25, slice_head=slice_head))
    assert view.embedding.weight.shape[1] == 96
    assert distance(logits(run.model), before) < 1e-4
    assert max(lost["energy_lost"] for lost in run.log.layers.values()) < 1e-9
    further = uneven(architecture)
    further.apply(SliceGPT(slicing=0.5, slice_head=slice_head))
    assert distance(logits(further.model), before) > 0.05


def test_layer_norm_leaves_one_direction_that_costs_nothing() -> None:
    run = uneven("opt")
    before = logits(run.model)
    run.apply(SliceGPT(slicing=1 / WIDTH, multiple=1, slice_head=True))
    assert run.model.lm_head.in_features == WIDTH - 1
    assert distance(logits(run.model), before) < 1e-5


@torch.no_grad()
def projected(run: ModelRun, width: int, slice_head: bool) -> Tensor:
    """Logits of the model as it was, its stream projected wherever it reaches a norm: no fusion, no rotation.

    A projection is on the first right singular vectors of what the calibration set brings there.
    """
    model, opt = run.model, run.model.config.model_type == "opt"
    inner = model.model.decoder if opt else model.model
    centre = torch.eye(WIDTH, dtype=torch.float64) - (1 / WIDTH if opt else 0)
    rows = [*run.calibration()[:, None], IDS]

    def project(streams: list[Tensor], width: int) -> list[Tensor]:
        streams = [stream @ centre for stream in streams]
        found = torch.linalg.svd(torch.cat([stream.flatten(0, 1) for stream in streams[:-1]]), full_matrices=False)
        return [stream @ found.Vh[:width].T @ found.Vh[:width] for stream in streams]

    streams, calls = [], []
    for ids in rows:
        x, places = inner.embed_tokens(ids), torch.arange(ids.shape[1])[None]
        if opt:
            x = x + inner.embed_positions(torch.ones_like(ids))
        streams.append(x)
        calls.append({} if opt else {"position_embeddings": inner.rotary_emb(x, places)})
    streams = project(streams, width)
    names = Blocks(model).names
    for index, block in enumerate(inner.layers):
        first, second = (block.get_submodule(name) for name in names.norms)
        attention = [
            block.self_attn(hidden_states=first(x), attention_mask=None, **call)[0]
            for x, call in zip(streams, calls, strict=True)
        ]
        streams = project([x + a for x, a in zip(streams, attention, strict=True)], width)
        fed = [block.fc2(block.activation_fn(block.fc1(second(x)))) if opt else block.mlp(second(x)) for x in streams]
        streams = [x + f for x, f in zip(streams, fed, strict=True)]
        if index < len(inner.layers) - 1 or slice_head:
            streams = project(streams, width)
    found: Tensor = model.lm_head(model.get_submodule(names.norm)(streams[-1]))
    return found


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("orientation", ["random", "pca"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_a_sliced_model_is_the_model_with_its_stream_projected(
    architecture: str, orientation: Any, slice_head: bool
) -> None:
    run = uneven(architecture, torch.float64)
    before, expected = logits(run.model), projected(run, 96, slice_head)
    run.apply(SliceGPT(slicing=0.25, orientation=orientation, slice_head=slice_head))
    found = logits(run.model)
    assert distance(found, expected) < 1e-9 < 1e-2 < distance(found, before)


def test_the_share_of_the_signal_lost_is_recorded() -> None:
    run = toy_run()
    run.apply(SliceGPT(slicing=0.5))
    lost = {path: entry["energy_lost"] for path, entry in run.log.layers.items()}
    assert list(lost) == [
        *(f"model.layers.{i}.{name}" for i in range(2) for name in ("input_layernorm", "post_attention_layernorm")),
        "model.norm",
    ]
    x = toy_run().model.model.embed_tokens(run.calibration()).detach().double().flatten(0, 1)
    energy = torch.linalg.svdvals(x).square()
    assert lost["model.layers.0.input_layernorm"] == pytest.approx(float(energy[64:].sum() / energy.sum()))
    assert lost["model.norm"] == 0


# Sizes


@pytest.mark.parametrize(("slicing", "multiple", "kept"), [(0.25, 8, 96), (0.3, 8, 88), (0.3, 1, 89), (0.2, 64, 64)])
def test_the_width_is_rounded_down(slicing: float, multiple: int, kept: int) -> None:
    run = toy_run()
    run.apply(SliceGPT(slicing=slicing, multiple=multiple))
    first, last = run.model.model.layers
    assert run.model.model.embed_tokens.weight.shape == (VOCABULARY, kept)
    assert first.shortcut_attention.shape == first.shortcut_mlp.shape == last.shortcut_attention.shape == (kept, kept)
    assert last.shortcut_mlp.shape == (kept, WIDTH) and run.model.lm_head.in_features == WIDTH
    assert first.mlp.up_proj.weight.shape == (MLP, kept) and first.self_attn.o_proj.weight.shape == (kept, WIDTH)
    for linear in (module for module in run.model.modules() if isinstance(module, nn.Linear)):
        assert linear.weight.shape == (linear.out_features, linear.in_features)


@pytest.mark.parametrize("slice_head", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt"])
def test_parameters_by_closed_form(architecture: str, slice_head: bool) -> None:
    run = toy_run(architecture)
    run.apply(SliceGPT(slicing=0.25, slice_head=slice_head))
    d, k, tokens = WIDTH, 96, VOCABULARY
    total = tokens * k  # embeddings
    for layer in range(LAYERS):
        out = d if layer == LAYERS - 1 and not slice_head else k
        total += k * k + k * out  # residuals change their basis twice
        if architecture == "opt":
            total += 3 * (d * k + d) + (k * d + k) + (MLP * k + MLP) + (out * MLP + out)
        else:
            kv = d // 2 if architecture == "qwen2" else d
            total += (d + 2 * kv) * k + k * d + 2 * MLP * k + out * MLP
            total += d + 2 * kv if architecture == "qwen2" else 0  # biases of q, k, v
    total += tokens * (k if slice_head else d)  # the head, no longer tied
    if architecture == "opt":
        total += (POSITIONS + 2) * k + tokens  # positions; the bias of the last norm as the head's
    assert sum(parameter.numel() for parameter in run.model.parameters()) == total
    assert sum(stored_bytes(run.model, torch.bfloat16)) == 2 * total


# Afterwards


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt2"])
def test_a_sliced_model_is_compressed_saved_and_loaded(architecture: str, tmp_path: Path) -> None:
    run, method = uneven(architecture), SliceGPT(slice_head=architecture == "gpt2")
    run.apply(method)
    run.apply(parse_step("gptq(bits=8, group_size=32)"))
    run.finish()
    assert all(isinstance(module, IntLinear) for _, module in Blocks(run.model).linears())
    written = artifact.save(run.model, tmp_path, run.storage)
    assert written == sum(stored_bytes(run.model, run.storage))
    loaded = artifact.load(tmp_path)
    assert torch.equal(logits(loaded), logits(run.model)) and repr(loaded) == repr(run.model)
    plain = uneven(architecture)
    plain.apply(method)
    assert distance(logits(run.model), logits(plain.model)) < 0.1
    plain.finish()
    artifact.save(plain.model, tmp_path / "plain", plain.storage)
    assert torch.equal(logits(artifact.load(tmp_path / "plain")), logits(plain.model))


@pytest.mark.parametrize("size", [32, 40, 128])  # of a width of 96
def test_four_bits_after_slicing(size: int) -> None:
    run = toy_run()
    run.apply(SliceGPT())
    run.apply(parse_step(f"rtn(bits=4, group_size={size})"))
    assert torch.isfinite(open_engine(run).logits(IDS)).all()


@pytest.mark.parametrize("architecture", FAMILIES)
def test_decoding_with_a_cache_is_decoding_without(architecture: str) -> None:
    run = uneven(architecture)
    run.apply(SliceGPT(slice_head=architecture == "gpt2"))
    prompts = [[5, 9, 2, 40], [7, 8]]
    found = open_engine(run).generate(prompts, 6, set())
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(run.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert tokens == ids[len(prompt) :]
    scored = open_engine(run).score([([5, 9], [2, 40, 3])]), open_engine(run).score([([5, 9], [2, 40, 3])], block=1)
    assert scored[0][0].logprob == pytest.approx(scored[1][0].logprob, abs=1e-4)


def test_transformers_still_finds_the_blocks() -> None:
    run = toy_run()
    before = run.model(IDS, output_hidden_states=True).hidden_states  # hooks are set once, here, before slicing
    run.apply(SliceGPT())
    blocks = run.model.model.layers
    assert all(isinstance(block, Sliced) and isinstance(block, LlamaDecoderLayer) for block in blocks)
    after = run.model(IDS, output_hidden_states=True).hidden_states
    assert [x.shape[-1] for x in before] == [128, 128, 128] and [x.shape[-1] for x in after] == [96, 96, 128]

    calls: list[nn.Module] = []
    for block in blocks:
        block.self_attn.register_forward_hook(lambda module, *_: calls.append(module))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls.clear()
        run.model.train().zero_grad()
        run.model(IDS, labels=IDS, use_cache=False).loss.backward()
        assert len(calls) == (4 if checkpointing else 2)
        gradients.append([parameter.grad.clone() for parameter in run.model.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


def test_recovery_trains_the_shortcuts_unless_they_are_frozen() -> None:
    run = toy_run()
    run.apply(SliceGPT())
    block = run.model.model.layers[0]
    shortcut, weight = block.shortcut_mlp.detach().clone(), block.mlp.up_proj.weight.detach().clone()
    fit_two_steps(run)
    assert not torch.equal(block.shortcut_mlp, shortcut) and not torch.equal(block.mlp.up_proj.weight, weight)
    block.shortcut_mlp.requires_grad_(False)
    shortcut = block.shortcut_mlp.detach().clone()
    report = fit_two_steps(run)
    assert torch.equal(block.shortcut_mlp, shortcut) and report["loss_last"] < report["loss_first"] + 1


# What cannot be done


@pytest.mark.parametrize(
    "settings", [{"slicing": 1.0}, {"slicing": -0.1}, {"multiple": 0}, {"orientation": "other"}], ids=str
)
def test_settings_no_data_can_mend(settings: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        SliceGPT(**settings)


@pytest.mark.parametrize(
    ("architecture", "steps", "message"),
    [
        ("gpt_neox", ["slicegpt()"], r"gpt_neox\.layers\.0: GPTNeoXLayer is not known"),
        ("gpt2", ["slicegpt()"], "use slice_head=True"),
        (
            "llama",
            ["rtn(group_size=32)", "slicegpt()"],
            "q_proj: a IntLinear would become dense .* put this step first",
        ),
        ("llama", ["magnitude(sparsity=0.5)", "slicegpt()"], "q_proj: a .*Linear .* put this step first"),
        ("llama", ["slicegpt()", "slicegpt()"], r"layers\.0: is sliced already"),
        ("llama", ["slicegpt(slicing=0.95)"], "nothing would be left of a stream of width 128"),
    ],
)
def test_what_cannot_be_sliced_says_why(architecture: str, steps: list[str], message: str) -> None:
    run = toy_run(architecture)
    for step in steps[:-1]:
        run.apply(parse_step(step))
    before = logits(run.model)
    with pytest.raises(Unsupported, match=message):
        run.apply(parse_step(steps[-1]))
    assert torch.equal(logits(run.model), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_layer_norm_before": False}, "norms after the sum"),
        ({"word_embed_proj_dim": 64}, "embeddings of width 64 in a stream of width 128"),
        ({"_remove_final_layer_norm": True}, "there is no norm to fuse"),
    ],
    ids=str,
)
def test_forms_of_opt_that_cannot_be_sliced(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOYS, "opt", TOYS["opt"] | change)
    with pytest.raises(Unsupported, match=message):
        toy_run("opt").apply(SliceGPT())


def test_a_linear_to_be_skipped_is_in_the_way() -> None:
    with pytest.raises(Unsupported, match=r"layers\.1\.mlp\.down_proj: slicing changes every linear"):
        toy_run(skip=("*.1.mlp.down_proj",)).apply(SliceGPT())
