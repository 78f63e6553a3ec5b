"""Heads, neurons and blocks that leave: scores against closed forms and brute force, surgery against masking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from effbench import checks
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.recipe import parse
from effbench.methods.prune.head_pruning import HeadPruning, importance
from effbench.methods.prune.layer_pruning import LayerPruning, angular_distance, block_influence
from effbench.methods.prune.neuron_pruning import NeuronPruning
from effbench.nn.files import artifact
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import dense_weight, replace
from effbench.nn.model.structure import heads, keep_groups, keep_neurons, neurons
from effbench.nn.run import ModelRun

ARCHITECTURES = list(checks.TOYS)
GROUPED = ["mistral", "qwen2", "qwen3"]  # two key-value heads of two query heads each
IDS = torch.arange(48).view(2, 24) * 7 % 95 + 1


@pytest.fixture(autouse=True)
def _alone() -> Any:
    """One thread: several only get in each other's way on tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_run(architecture: str = "llama", layers: int = 2, double: bool = False, **settings: Any) -> ModelRun:
    """A toy run whose biases are not zero, in float64 if asked for."""
    run = checks.toy_run(architecture, **({"sequences": 4, "length": 16} | settings))
    run.model = checks.toy(architecture, layers=layers)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in run.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    if double:
        run.model.double()
        for path, module in list(run.model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):  # those of transformers compute in float32
                norm = nn.RMSNorm(len(module.weight), module.variance_epsilon)
                norm.weight = module.weight
                replace(run.model, path, norm)
    return run


def logits(model: Any, **keywords: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False, **keywords).logits


def loss(run: ModelRun) -> Tensor:
    """[sequences] float64: the loss of each calibration sequence, which transformers computes in float32."""
    ids = run.calibration()
    with torch.no_grad():
        found = run.model(input_ids=ids).logits[:, :-1].double().transpose(1, 2)
    return nn.functional.cross_entropy(found, ids[:, 1:], reduction="none").mean(1)


def zero_inputs(linear: nn.Module, gone: Tensor) -> None:
    """Take away what a linear makes of the inputs at `gone`."""
    weight = linear.weight.data
    (weight.T if not isinstance(linear, Conv1D) else weight)[gone] = 0


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def parts(run: ModelRun, index: int, *names: str) -> list[nn.Module]:
    return [Blocks(run.model).blocks[index].get_submodule(name) for name in names]


def without(number: int, gone: list[int]) -> Tensor:
    return torch.tensor([index for index in range(number) if index not in gone])


# Surgery


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_removed_head_is_a_head_whose_output_is_zeroed(architecture: str) -> None:
    cut, masked = make_run(architecture, double=True), make_run(architecture, double=True)
    view = Blocks(cut.model)
    before = parameters(cut.model)
    found = heads(view, 1)
    hidden = cut.model.config.hidden_size
    wide = found.share * found.size
    (out,) = parts(masked, 1, view.names.out)
    zero_inputs(out, torch.arange(wide, 2 * wide))
    keep_groups(view, 1, without(found.groups, [1]))

    assert heads(view, 1).groups == found.groups - 1 and heads(view, 0) == found
    assert torch.allclose(logits(cut.model), logits(masked.model), atol=1e-12)
    rows = wide + 2 * found.size  # of queries, keys and values
    biased = parts(cut, 1, view.names.qkv[0])[0].bias is not None
    assert before - parameters(cut.model) == hidden * (rows + wide) + biased * rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_removed_neuron_is_a_neuron_whose_output_is_zeroed(architecture: str) -> None:
    cut, masked = make_run(architecture, double=True), make_run(architecture, double=True)
    view = Blocks(cut.model)
    width, hidden, before = neurons(view, 0), cut.model.config.hidden_size, parameters(cut.model)
    gone = [0, 7, 100, width - 1]
    (down,) = parts(masked, 0, view.names.down)
    zero_inputs(down, torch.tensor(gone))
    keep_neurons(view, 0, without(width, gone))

    assert neurons(view, 0) == width - 4 and neurons(view, 1) == width
    assert torch.allclose(logits(cut.model), logits(masked.model), atol=1e-12)
    biased = len(view.names.up) == 1  # OPT, GPT-2 and NeoX have biases
    assert before - parameters(cut.model) == 4 * (hidden * (len(view.names.up) + 1) + biased)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_caches_shrink_with_their_heads_and_generation_equals_the_whole_forward_pass(architecture: str) -> None:
    run = make_run(architecture)
    view = Blocks(run.model)
    keep_groups(view, 0, without(heads(view, 0).groups, [0]))
    keep_neurons(view, 1, torch.arange(9))
    expected = logits(run.model)
    cache = DynamicCache(config=run.model.config)
    with torch.no_grad():
        pieces = [run.model(IDS[:, :10], past_key_values=cache, use_cache=True).logits]
        for step in range(10, IDS.shape[1]):
            pieces.append(run.model(IDS[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(pieces, 1), expected, atol=1e-4)
    for index in (0, 1):
        found = heads(view, index)
        assert cache.layers[index].keys.shape == (2, found.groups, 24, found.size)
    assert cache.layers[0].values.numel() < cache.layers[1].values.numel()

    engine = run.engine()
    state = engine.prefill(IDS)
    told = [state.ids]
    for _ in range(4):
        state = engine.decode(state)
        told.append(state.ids)
    ids = IDS
    for token in told:
        with torch.no_grad():
            assert torch.equal(run.model(ids, use_cache=False).logits[:, -1].argmax(-1), token)
        ids = torch.cat([ids, token[:, None]], 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_implementation_of_attention_sees_the_heads_that_are_left(architecture: str) -> None:
    run = make_run(architecture)
    view = Blocks(run.model)
    keep_groups(view, 1, without(heads(view, 1).groups, [0]))
    fused = logits(run.model)
    run.model.set_attn_implementation("eager")
    assert torch.allclose(logits(run.model), fused, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_uneven_models_are_saved_and_loaded(architecture: str, tmp_path: Path) -> None:
    run = make_run(architecture, layers=4)
    for step in (
        HeadPruning(sparsity=0.25),
        NeuronPruning(sparsity=0.3, scope="global", score="magnitude"),
        LayerPruning(),
    ):
        run.apply(step)
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    loaded = artifact.load(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(run.model))
    assert [heads(Blocks(loaded), i) for i in range(3)] == [heads(Blocks(run.model), i) for i in range(3)]
    with torch.no_grad():
        cached = loaded(IDS, use_cache=True).past_key_values
        last = loaded(IDS[:, -1:], past_key_values=cached).logits
    again = torch.cat([IDS, IDS[:, -1:]], 1)
    with torch.no_grad():
        assert torch.allclose(loaded(again, use_cache=False).logits[:, -1:], last, atol=1e-4)


# Heads


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "opt", "gpt2", "gpt_neox"])
def test_importance_is_the_loss_gradient_of_the_gates(architecture: str) -> None:
    run = make_run(architecture, double=True, sequences=3)
    view = Blocks(run.model)
    found = importance(run, view)
    epsilon = 1e-5
    for index, block in enumerate(view.blocks):
        division = heads(view, index)
        weight = block.get_submodule(view.names.out).weight.data
        columns = weight.T if not isinstance(block.get_submodule(view.names.out), Conv1D) else weight
        for head in range(division.queries):
            at = slice(head * division.size, (head + 1) * division.size)
            kept = columns[at].clone()
            columns[at] = kept * (1 + epsilon)  # the gate, moved into the output projection
            above = loss(run)
            columns[at] = kept * (1 - epsilon)
            slope = (above - loss(run)) / (2 * epsilon)
            columns[at] = kept
            assert float(found[index][head]) == pytest.approx(float(slope.abs().mean()), rel=1e-5)
            assert float(slope.abs().mean()) >= abs(float(slope.mean()))


def test_importance_by_token_is_the_dot_product_of_outputs_and_their_gradients() -> None:
    run = make_run(double=True, sequences=3)
    view = Blocks(run.model)
    found = importance(run, view, "token")
    expected = torch.zeros(2, 4, dtype=torch.float64)
    taken: list[Tensor] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].retain_grad()
        taken.append(args[0])

    for out in (block.get_submodule(view.names.out) for block in view.blocks):
        out.register_forward_pre_hook(take)
    for ids in run.calibration():
        taken.clear()
        run.model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for index, x in enumerate(taken):
            assert x.grad is not None
            expected[index] += (x * x.grad).detach().unflatten(-1, (4, -1)).sum(-1)[0].abs().mean(0) / 3
    assert torch.allclose(torch.stack(found), expected)


def removed_heads(run: ModelRun) -> dict[int, list[int]]:
    entry = run.log.removed[-1]["key_value_heads"]
    return {int(path.split("layers.")[-1].split("h.")[-1].split(".")[0]): gone for path, gone in entry.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_head_without_effect_goes_first(architecture: str) -> None:
    run = make_run(architecture)
    names = Blocks(run.model).names
    (out,) = parts(run, 1, names.out)
    zero_inputs(out, torch.arange(64, 96))  # head 2
    before = logits(run.model)
    run.apply(HeadPruning(sparsity=0.125))
    assert list(removed_heads(run).values()) == [[2]] and heads(Blocks(run.model), 1).queries == 3
    assert torch.allclose(logits(run.model), before, atol=1e-5)


def test_blocks_are_normalised_before_they_are_compared() -> None:
    """A block whose heads all matter little keeps most of them, unless importances are compared as they are."""

    def faint() -> ModelRun:
        run = make_run()
        (out,) = parts(run, 0, "self_attn.o_proj")
        out.weight.data *= 1e-3
        return run

    raw, normal = faint(), faint()
    scores = importance(raw, Blocks(raw.model))
    raw.apply(HeadPruning(sparsity=0.4, normalize=False))
    assert removed_heads(raw).keys() == {0} and len(removed_heads(raw)[0]) == 3
    normal.apply(HeadPruning(sparsity=0.4))
    ranking = sorted(
        (float(score[head] / score.norm()), index, head)
        for index, score in enumerate(scores)
        for head in range(4)
        if head != int(score.argmax())
    )
    expected = {(index, head) for _, index, head in ranking[:3]}
    assert {(index, head) for index, gone in removed_heads(normal).items() for head in gone} == expected


@pytest.mark.parametrize("architecture", GROUPED)
def test_grouped_queries_go_with_their_key_value_head(architecture: str) -> None:
    run = make_run(architecture)
    scores = [score / score.norm() for score in importance(run, Blocks(run.model))]
    groups = torch.stack([score.view(2, 2).sum(1) for score in scores])
    index, group = divmod(int(groups.flatten().argmin()), 2)
    queries, keys, out = parts(run, index, "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj")
    expected = dense_weight(queries)[64 * (1 - group) : 64 * (2 - group)].clone()
    run.apply(HeadPruning(sparsity=0.25))
    assert removed_heads(run) == {index: [group]}
    assert torch.equal(queries.weight, expected) and keys.weight.shape == (32, 128) and out.weight.shape == (128, 64)


def test_rounds_rank_again_and_say_which_of_the_first_heads_went() -> None:
    run, original = make_run(), make_run()
    run.apply(HeadPruning(sparsity=0.6, rounds=4))
    gone = removed_heads(run)
    assert sum(map(len, gone.values())) == 4
    for index, gone_here in gone.items():
        stay = without(4, gone_here)
        (now,) = parts(run, index, "self_attn.v_proj")
        (then,) = parts(original, index, "self_attn.v_proj")
        assert torch.equal(now.weight, then.weight.view(4, 32, 128)[stay].flatten(0, 1))


def test_every_block_keeps_its_most_important_head() -> None:
    run = make_run()
    best = [int(score.argmax()) for score in importance(run, Blocks(run.model))]
    run.apply(HeadPruning(sparsity=0.75))
    assert removed_heads(run) == {index: without(4, [head]).tolist() for index, head in enumerate(best)}
    with pytest.raises(Unsupported, match="7 of 8 key-value heads would leave a block with none"):
        make_run().apply(HeadPruning(sparsity=0.9))
    with pytest.raises(Unsupported, match="less than one of 8"):
        make_run().apply(HeadPruning(sparsity=0.1))


# Neurons


def gradients(run: ModelRun, linears: list[nn.Module]) -> list[Tensor]:
    """[out, in] of each: the gradient of the mean loss, all sequences in one batch."""
    ids = run.calibration()
    found = torch.autograd.grad(run.model(input_ids=ids, labels=ids).loss, [linear.weight for linear in linears])
    return [g.T if isinstance(linear, Conv1D) else g for g, linear in zip(found, linears, strict=True)]


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("score", ["taylor", "taylor_vector", "magnitude", "activation"])
def test_scores_are_what_they_say(architecture: str, score: Any) -> None:
    run = make_run(architecture)
    view = Blocks(run.model)
    found = NeuronPruning(score=score).scores(run, view, [1])[1]
    linears = parts(run, 1, *view.names.up, view.names.down)
    weights = [dense_weight(linear) for linear in linears]
    slices = [*weights[:-1], weights[-1].T]  # [width, other]
    if score == "magnitude":
        expected = torch.cat(slices, 1).square().sum(1)
    elif score == "activation":
        taken: list[Tensor] = []
        linears[-1].register_forward_pre_hook(lambda _, args: taken.append(args[0].flatten(0, -2)))
        loss(run)
        expected = torch.cat(taken).norm(dim=0) * weights[-1].abs().mean(0)
    else:
        grads = gradients(run, linears)
        products = [w * g for w, g in zip(slices, [*grads[:-1], grads[-1].T], strict=True)]
        flat = [p.abs().sum(1) if score == "taylor" else p.sum(1).abs() for p in products]
        expected = torch.stack(flat).sum(0)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-8)


def test_taylor_estimates_what_removing_single_weights_does_to_the_loss() -> None:
    """Element by element, in the limit of small weights: |change of the loss| summed over a neuron's weights."""
    run = make_run("opt", double=True, sequences=2, length=8)
    view = Blocks(run.model)
    up, down = parts(run, 0, "fc1", "fc2")
    up.weight.data *= 1e-3
    down.weight.data *= 1e-3
    up.bias.data = up.bias.data.abs()  # no activation changes sides
    score = NeuronPruning().scores(run, view, [0])[0]
    whole = loss(run).mean()
    change = 0.0
    for vector in (up.weight.data[5], down.weight.data[:, 5]):
        for place in range(len(vector)):
            kept = float(vector[place])
            vector[place] = 0
            change += float((loss(run).mean() - whole).abs())
            vector[place] = kept
    assert change > 0 and float(score[5]) == pytest.approx(change, rel=0.01)


def test_taylor_vector_ranks_neurons_as_removing_them_does() -> None:
    """With ReLU and no bias both vectors of a neuron have the same salience, the change of the loss to first order."""
    run = make_run("opt", double=True)
    view = Blocks(run.model)
    up, down = parts(run, 1, "fc1", "fc2")
    up.bias.data.zero_()
    down.weight.data *= 1e-3
    score = NeuronPruning(score="taylor_vector").scores(run, view, [1])[1].double()
    whole = loss(run).mean()
    change = torch.zeros(24, dtype=torch.float64)
    for neuron in range(24):
        kept = down.weight.data[:, neuron].clone()
        down.weight.data[:, neuron] = 0
        change[neuron] = (loss(run).mean() - whole).abs()
        down.weight.data[:, neuron] = kept
    assert torch.allclose(score[:24], 2 * change, rtol=0.01, atol=float(change.max()) * 1e-3)


@pytest.mark.parametrize("score", ["taylor", "taylor_vector", "magnitude", "activation"])
def test_dead_neurons_go_first(score: Any) -> None:
    run = make_run()
    linears = parts(run, 0, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for linear in linears[:2]:
        linear.weight.data[3:6] = 0
    linears[2].weight.data[:, 3:6] = 0
    expected = dense_weight(linears[0])[without(256, [3, 4, 5])]
    before = logits(run.model)
    run.apply(NeuronPruning(sparsity=3 / 512, score=score, scope="global"))
    assert run.log.removed == [{"step": run.log.removed[0]["step"], "neurons": {"model.layers.0.mlp.down_proj": 3}}]
    assert torch.equal(linears[0].weight, expected)
    assert torch.allclose(logits(run.model), before, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_width_is_a_model_for_plain_transformers(architecture: str, tmp_path: Path) -> None:
    run = make_run(architecture)
    width = neurons(Blocks(run.model), 0)
    run.apply(NeuronPruning(score="magnitude", sparsity=0.3))
    assert {neurons(Blocks(run.model), index) for index in (0, 1)} == {int(width * 0.7)}
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded.eval()), logits(run.model))


def test_global_scope_leaves_uneven_widths_and_the_number_asked_for(tmp_path: Path) -> None:
    run = make_run()
    (down,) = parts(run, 1, "mlp.down_proj")
    down.weight.data[:, :128] *= 3
    scores = NeuronPruning(score="magnitude").scores(run, Blocks(run.model), [0, 1])
    lowest = torch.cat([scores[0], scores[1]]).sort().values[:154]  # 512 - int(512 * 0.7)
    run.apply(NeuronPruning(sparsity=0.3, score="magnitude", scope="global"))
    widths = [neurons(Blocks(run.model), index) for index in (0, 1)]
    assert widths == [int((scores[index] > lowest.max()).sum()) for index in (0, 1)]
    assert sum(widths) == 358 and widths[0] < widths[1]
    assert run.model.config.intermediate_size == 256


def test_widths_are_rounded_up_to_a_multiple_so_that_groups_divide_them() -> None:
    run = make_run()
    for step in parse("neuron_pruning(sparsity=0.3, multiple=64, score='magnitude'), rtn(group_size=64)").steps:
        run.apply(step)
    run.finish()
    assert parts(run, 0, "mlp.down_proj")[0].in_features == 192  # from 179
    assert torch.isfinite(logits(run.model)).all()
    with pytest.raises(Unsupported, match="width 179 is not a multiple"):
        for step in parse("neuron_pruning(sparsity=0.3, score='magnitude'), rtn(group_size=64)").steps:
            (run := make_run()).apply(step) if step.key == "neuron_pruning" else run.apply(step)


def test_no_block_is_left_without_neurons() -> None:
    run = make_run()
    for linear in parts(run, 0, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        linear.weight.data *= 1e-3
    with pytest.raises(Unsupported, match=r"layers\.0\.mlp\.down_proj: no neuron would be left"):
        run.apply(NeuronPruning(sparsity=0.6, score="magnitude", scope="global"))
    with pytest.raises(Unsupported, match="less than one neuron"):
        make_run().apply(NeuronPruning(sparsity=0.2, score="magnitude", multiple=256))


# Blocks


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


# All three


def test_settings_no_data_can_mend_are_usage_errors() -> None:
    for make in (
        lambda: HeadPruning(sparsity=1.0),
        lambda: HeadPruning(rounds=0),
        lambda: HeadPruning(absolute="batch"),  # type: ignore[arg-type]
        lambda: NeuronPruning(sparsity=-0.1),
        lambda: NeuronPruning(multiple=0),
        lambda: NeuronPruning(score="hessian"),  # type: ignore[arg-type]
        lambda: LayerPruning(fraction=1.0),
        lambda: LayerPruning(score="cosine"),  # type: ignore[arg-type]
    ):
        with pytest.raises(Usage):
            make()


def test_linears_to_be_left_alone_are() -> None:
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    run = make_run(layers=4, skip=("model.layers.0.*.o_proj", "model.layers.1.*.down_proj", "model.layers.2.mlp.*"))
    before = [[dense_weight(linear).clone() for linear in parts(run, index, *names)] for index in range(4)]
    run.apply(HeadPruning(sparsity=0.5))
    run.apply(NeuronPruning(score="magnitude"))
    changed = [
        [linear.weight.shape != was.shape for linear, was in zip(parts(run, index, *names), before[index], strict=True)]
        for index in range(4)
    ]
    assert not any(changed[0][:2]) and not any(changed[1][2:]) and not any(changed[2][2:])
    assert all(changed[0][2:]) and all(changed[3][2:])
    assert run.model.config.intermediate_size == 256  # no longer that of all blocks
    blocks = list(Blocks(run.model).blocks)
    run.apply(LayerPruning())
    assert list(Blocks(run.model).blocks) == blocks[:3]
    with pytest.raises(Unsupported, match="0 of which may go"):
        make_run(layers=4, skip=("*.o_proj",)).apply(LayerPruning())
    with pytest.raises(Unsupported, match="every block has a linear that is to be left alone"):
        make_run(layers=4, skip=("*.o_proj",)).apply(HeadPruning())


@pytest.mark.parametrize("first", ["magnitude()", "rtn(group_size=32)"])
def test_what_cannot_be_cut_names_itself(first: str) -> None:
    for step in ("head_pruning(sparsity=0.25)", "neuron_pruning()"):
        run = make_run()
        before, after = parse(f"{first}, {step}").steps
        run.apply(before)
        with pytest.raises(Unsupported, match=r"layers\.0\..*_proj: a \w+ cannot be made smaller; put this step first"):
            run.apply(after)
    run = make_run(layers=4)
    for method in parse(f"{first}, layer_pruning()").steps:
        run.apply(method)
    run.finish()
    assert torch.isfinite(logits(run.model)).all() and len(Blocks(run.model)) == 3


def test_training_goes_on_in_the_smaller_model() -> None:
    run = make_run(layers=4)
    for method in parse("head_pruning(sparsity=0.25), neuron_pruning(), layer_pruning(), fit(steps=2)").steps:
        run.apply(method)
    run.finish()
    assert all(torch.isfinite(torch.tensor(run.log.fits[0][key])) for key in ("loss_first", "loss_last"))


@pytest.mark.parametrize("method", [HeadPruning(sparsity=0.0), NeuronPruning(sparsity=0.0), LayerPruning(fraction=0.0)])
def test_removing_nothing_changes_nothing(method: Any) -> None:
    run = checks.toy_run()
    run.apply(method)
    assert not run.log.removed
    with pytest.raises(Refused, match="changed nothing"):
        run.finish()
