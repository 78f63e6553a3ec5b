"""Layer pruning: scores and which blocks go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys_structured import ARCHITECTURES, IDS, logits, make_run, parts
from transformers import AutoConfig, AutoModelForCausalLM

from effbench.core.errors import Unsupported
from effbench.methods.prune.layer_pruning import LayerPruning, angular_distance, block_influence
from effbench.nn.files import artifact
from effbench.nn.model.blocks import Blocks
from effbench.nn.run import ModelRun


class Turns(nn.Module):
    """A block that turns every pair of channels by `angle`, at the last token by `last`."""

    def __init__(self, angle: float, last: float) -> None:
        super().__init__()
        self.angle, self.last = angle, last

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        angle = torch.full(hidden.shape[1:2], self.angle)
        angle[-1] = self.last
        first, second = hidden.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def turning_run(angles: list[float], last: list[float]) -> ModelRun:
    run = make_run(layers=len(angles))
    for block, angle, end in zip(Blocks(run.model).blocks, angles, last, strict=True):
        block.forward = Turns(angle, end).forward
    return run


def test_scores_of_blocks_that_turn_by_known_angles() -> None:
    angles = [0.3, 0.05, 0.4, 0.1, 0.02]
    last = [0.5, 0.2, 0.1, 0.3, 0.01]
    run = turning_run(angles, last)
    cosines = (torch.tensor(angles).double().cos() * 15 + torch.tensor(last).double().cos()) / 16
    assert block_influence(run) == pytest.approx((1 - cosines).tolist(), rel=1e-3)
    for number in (1, 2, 3):
        expected = [sum(last[start : start + number]) / torch.pi for start in range(5 - number)]
        assert angular_distance(run, number) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("fraction", "score", "expected"),
    [
        (0.4, "block_influence", [1, 4]),  # not next to each other, the last one too
        (0.3, "block_influence", [1, 4]),  # 1.5 is rounded up
        (0.2, "block_influence", [4]),
        (0.4, "angular", [1, 2]),  # blocks 3 and 4 turn less together, but the last one stays
        (0.2, "angular", [2]),
        (0.8, "angular", [0, 1, 2, 3]),
    ],
)
def test_blocks_that_go(fraction: float, score: Any, expected: list[int]) -> None:
    run = turning_run([0.3, 0.05, 0.4, 0.1, 0.02], [0.5, 0.2, 0.1, 0.21, 0.01])
    stay = [block for index, block in enumerate(Blocks(run.model).blocks) if index not in expected]
    run.apply(LayerPruning(fraction=fraction, score=score))
    (entry,) = run.log.removed
    assert entry["blocks"] == expected and len(entry[score]) == (5 if score == "block_influence" else 5 - len(expected))
    assert list(Blocks(run.model).blocks) == stay


@pytest.mark.parametrize("score", ["block_influence", "angular"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
def test_a_block_that_does_nothing_goes_first(architecture: str, score: Any) -> None:
    run = make_run(architecture, layers=4)
    names = Blocks(run.model).names
    for linear in parts(run, 2, names.out, names.down):
        linear.weight.data.zero_()
        if linear.bias is not None:
            linear.bias.data.zero_()
    before = logits(run.model)
    run.apply(LayerPruning(score=score))
    (entry,) = run.log.removed
    assert entry["blocks"] == [2] and entry[score][2] == pytest.approx(0, abs=1e-6)
    assert torch.allclose(logits(run.model), before, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_left_is_an_ordinary_model(architecture: str, tmp_path: Path) -> None:
    run = make_run(architecture, layers=4)
    run.apply(LayerPruning(fraction=0.5))
    model = run.model
    assert len(Blocks(model)) == 2 == model.config.num_hidden_layers
    cache = model(IDS, use_cache=True).past_key_values
    assert len(cache.layers) == 2
    assert torch.allclose(
        model(IDS[:, :1], past_key_values=cache).logits,
        model(torch.cat([IDS, IDS[:, :1]], 1), use_cache=False).logits[:, -1:],
        atol=1e-4,
    )
    told = model.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert told.shape == (1, 27)
    run.finish()
    artifact.save(model, tmp_path / "model", run.storage)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_blocks_keep_the_kind_of_attention_they_had(tmp_path: Path) -> None:
    """Where windows differ between blocks, the configuration follows the blocks that stay."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=96,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=kinds,
    )
    run = make_run()
    run.model = AutoModelForCausalLM.from_config(config).eval()
    (out, down) = parts(run, 0, "self_attn.o_proj", "mlp.down_proj")
    out.weight.data.zero_()
    down.weight.data.zero_()
    before = logits(run.model)
    run.apply(LayerPruning())
    assert run.log.removed[0]["blocks"] == [0] and run.model.config.layer_types == kinds[1:]
    assert torch.allclose(logits(run.model), before, atol=1e-6)


def test_blocks_that_compute_with_their_number_are_unsupported() -> None:
    run = make_run("gpt2", layers=4)
    run.model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(Unsupported, match="scaled by the number of its block"):
        run.apply(LayerPruning())


def test_fractions_of_nothing_and_of_everything_are_unsupported() -> None:
    for fraction, score, match in (
        (0.1, "block_influence", "less than half of one of 4 blocks"),
        (0.9, "block_influence", "4 blocks of 4"),
        (0.9, "angular", "no 4 blocks in a row before the last"),
    ):
        with pytest.raises(Unsupported, match=match):
            make_run(layers=4).apply(LayerPruning(fraction=fraction, score=score))
