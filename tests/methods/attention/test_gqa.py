"""GQA and MQA: keys and values pooled in contiguous groups equal a model whose heads were written alike by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toys_cache import fill, run_of, text
from toys_grouped import ALL, FIELD, NO_FIELD, change_heads, first, make, mean, repeat
from transformers import AutoModelForCausalLM

from effbench import sources
from effbench.cells.predict import PlanOptions, predict
from effbench.checks import IDS, probe, probe_model
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.recipe import parse
from effbench.methods.attention.gqa import GQA
from effbench.methods.attention.mqa import MQA
from effbench.nn.files import artifact
from effbench.nn.files.load import open_run
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.structure import heads
from effbench.nn.rehearse import Batch, make_case, rehearse
from effbench.nn.run import ModelRun
from effbench.nn.train.fit import fit
from effbench.nn.train.settings import FitSettings


def groups_of(run: ModelRun) -> list[int]:
    view = Blocks(run.model)
    return [heads(view, index).groups for index in range(len(view))]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize(("heads", "left"), [(8, 2), (9, 3)])
def test_heads_that_are_alike_within_groups_give_what_they_gave(architecture: str, heads: int, left: int) -> None:
    """Biases included, and heads of different groups differ: other groups than contiguous ones would not do."""
    run, other = make(architecture, heads), make(architecture, heads)
    change_heads(run.model, repeat(left, first))
    before = probe(run)
    run.apply(GQA(kv_heads=left))
    assert groups_of(run) == [left] * 2
    close(probe(run), before)
    change_heads(other.model, lambda rows: rows.copy_(rows[:left].repeat(len(rows) // left, 1, 1)))  # strided groups
    before = probe(other)
    other.apply(GQA(kv_heads=left))
    assert float((probe(other) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize(("pool", "which"), [("mean", mean), ("first", first)])
@pytest.mark.parametrize(("heads", "left"), [(8, 2), (9, 3)])
def test_a_groups_head_is_the_mean_or_the_first_of_its_heads(
    architecture: str, pool: Any, which: Any, heads: int, left: int
) -> None:
    """All heads, written by hand in the model that was: its attention is transformers' own."""
    run, plain = make(architecture, heads), make(architecture, heads)
    before = probe(run)
    change_heads(plain.model, repeat(left, which))
    run.apply(GQA(kv_heads=left, pool=pool))
    close(probe(run), probe(plain))
    assert float((probe(run) - before).abs().max()) > 1e-2


def test_heads_drawn_anew_depend_on_the_seed_alone_and_are_as_large() -> None:
    def drawn(seed: int) -> Tensor:
        run = make("llama", 8)
        run.seed = seed
        torch.manual_seed(seed + 1)
        run.apply(GQA(kv_heads=4, pool="random"))
        keys, values = (getattr(run.model.model.layers[0].self_attn, name).weight for name in ("k_proj", "v_proj"))
        assert not torch.allclose(keys, values)
        return keys

    deviation = float(make("llama", 8).model.model.layers[0].self_attn.k_proj.weight.std())
    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert float(drawn(0).std()) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("architecture", FIELD)
@pytest.mark.parametrize(("queries", "there", "left"), [(8, 4, 2), (9, 3, 1)])
def test_a_model_that_has_groups_gets_larger_ones(architecture: str, queries: int, there: int, left: int) -> None:
    run, plain = make(architecture, queries, there), make(architecture, queries, there)
    change_heads(plain.model, repeat(left, mean))
    run.apply(GQA(kv_heads=left))
    close(probe(run), probe(plain))


@pytest.mark.parametrize("architecture", NO_FIELD)
def test_converting_twice_is_converting_at_once(architecture: str) -> None:
    twice, once = make(architecture, 8), make(architecture, 8)
    for left in (4, 2):
        twice.apply(GQA(kv_heads=left))
    once.apply(GQA(kv_heads=2))
    close(probe(twice), probe(once))


@pytest.mark.parametrize("architecture", ALL)
def test_mqa_is_gqa_with_one_head(architecture: str) -> None:
    one, other = make(architecture, 4), make(architecture, 4)
    one.apply(MQA())
    other.apply(GQA(kv_heads=1))
    assert groups_of(one) == [1, 1] and torch.equal(probe(one), probe(other))


@pytest.mark.parametrize(
    ("there", "left"), [(32, 8), (12, 3), (8, 2), (4, 1), (10, 2), (9, 1), (15, 3), (22, 2), (3, 1), (2, 1)]
)
def test_by_default_a_quarter_is_left_or_the_next_number_that_divides(there: int, left: int) -> None:
    run = make("llama", there, layers=1)
    run.apply(GQA())
    assert groups_of(run) == [left] and run.model.config.num_key_value_heads == left


def test_of_grouped_queries_a_quarter_of_the_keys_is_left() -> None:
    run = make("llama", 16, 8, layers=1)
    run.apply(GQA())
    assert groups_of(run) == [2]


@pytest.mark.parametrize("architecture", ALL)
def test_as_many_heads_as_there_are_change_nothing(architecture: str) -> None:
    run = make(architecture, 4)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    kinds = [type(module) for module in run.model.modules()]
    run.apply(GQA(kv_heads=4))
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert [type(module) for module in run.model.modules()] == kinds and not run.log.removed


def test_a_recipe_that_changes_nothing_is_refused() -> None:
    run = run_of("gqa(kv_heads=4)")
    with pytest.raises(Refused, match="changed nothing"):
        run.finish()


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("left", [1, 2, 4])
def test_caches_shrink_as_heads_do(architecture: str, left: int) -> None:
    """Of transformers' cache, and of slots that something is done to; tokens are read alike in one pass and in many."""
    plain, run = make(architecture, 8), make(architecture, 8)
    run.apply(GQA(kv_heads=left))
    sizes = []
    for each in (plain, run):
        state = open_engine(each).prefill(IDS)
        sizes.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in state.cache.layers))
        assert all(layer.keys.shape[1] == (left if each is run else 8) for layer in state.cache.layers)
    assert sizes[1] * 8 == sizes[0] * left
    slots = []
    for each in (plain, run):
        each.apply(parse("sliding_window(window=1000)").steps[0])
        slots.append(int(fill(each, text(20), 15).nbytes()) - 2 * 4 * 20)  # but for the places of the tokens
    assert slots[1] * 8 == slots[0] * left
    ids = text(30)
    found = open_engine(run).predict([(ids[:12], ids[12:])])[0]
    with torch.no_grad():
        whole = run.model(torch.tensor([ids])).logits[0, 11:-1]
    close(found, whole)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("steps", ["", "h2o(budget=9)"])
def test_rows_of_a_batch_are_read_as_if_alone(architecture: str, steps: str) -> None:
    run = make(architecture, 8)
    for step in parse(f"gqa(kv_heads=2), {steps}" if steps else "gqa(kv_heads=2)").steps:
        run.apply(step)
    pairs = [(text(40), text(5)), (text(21, 1), text(7, 2)), (text(3, 3), text(2, 4))]
    together = [scored.token_logprobs for scored in open_engine(run).score(pairs)]
    alone = [open_engine(run).score([pair])[0].token_logprobs for pair in pairs]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("architecture", ALL)
def test_what_is_saved_is_loaded(architecture: str, tmp_path: Path) -> None:
    run = make(architecture, 8)
    run.apply(GQA())
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    loaded = artifact.load(tmp_path / "model")
    assert torch.equal(probe_model(loaded), probe(run))
    changed = json.loads((tmp_path / "model" / artifact.CONFIG).read_text())["changed"]
    assert bool(changed) == (architecture in NO_FIELD)


@pytest.mark.parametrize("architecture", FIELD)
def test_plain_transformers_opens_the_dense_form(architecture: str, tmp_path: Path) -> None:
    run = make(architecture, 8)
    run.apply(GQA())
    run.finish()
    artifact.save_dense(run.model, tmp_path / "model", run.storage)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_key_value_heads"] == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        close(model(IDS).logits, probe(run))


@pytest.mark.parametrize("architecture", NO_FIELD)
def test_a_configuration_that_cannot_say_it_is_not_exported(architecture: str, tmp_path: Path) -> None:
    run = make(architecture, 8)
    run.apply(GQA())
    run.finish()
    with pytest.raises(Unsupported, match="not that of the configuration"):
        artifact.save_dense(run.model, tmp_path / "model", run.storage)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_blocks_with_linears_that_are_left_alone_stay(architecture: str, tmp_path: Path) -> None:
    run, plain = make(architecture, 8), make(architecture, 8)
    run.skip = ("*.1.*",)
    run.apply(GQA(kv_heads=2))
    assert groups_of(run) == [2, 8]
    path = Blocks(run.model).path(0, Blocks(run.model).names.attention)
    assert run.log.removed == [{"step": "gqa(kv_heads=2)", "pooled_heads": {path: [8, 2]}}]
    assert getattr(run.model.config, "num_key_value_heads", 8) == 8  # of the other block as well
    run.finish()
    artifact.save(run.model, tmp_path / "model", run.storage)
    assert torch.equal(probe_model(artifact.load(tmp_path / "model")), probe(run))
    assert int(fill(run_plan(run), text(9), 5).nbytes()) < int(fill(run_plan(plain), text(9), 5).nbytes())


def run_plan(run: ModelRun) -> ModelRun:
    run.apply(parse("sliding_window(window=100)").steps[0])
    return run


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("gqa(kv_heads=3)", r"self_attn: 4 heads of keys make no 3 groups of one size; kv_heads=\[1, 2, 4\] do"),
        ("gqa(kv_heads=8)", "4 heads of keys make no 8 groups"),
        ("mqa(), gqa()", "has one head of keys and values already"),
        ("nf4(), gqa()", r"k_proj: a \w+ cannot be made smaller; put this step first"),
        ("wanda(), gqa()", "k_proj: a PrunedLinear cannot be made smaller"),
        ("lora(), gqa()", "k_proj: a LoRALinear cannot be made smaller"),
        ("prefix_tuning(), gqa()", "self_attn: a Reparametrized holds keys and values of the heads"),
    ],
)
def test_what_cannot_be_pooled_is_said_and_nothing_changes(steps: str, message: str) -> None:
    *before, last = parse(steps).steps
    run = run_of(", ".join(map(str, before)))
    shapes = [value.shape for value in run.model.state_dict().values()]
    with pytest.raises(Unsupported, match=message):
        run.apply(last)
    assert [value.shape for value in run.model.state_dict().values()] == shapes
    assert run.model.config.num_key_value_heads in (1, 4)


@pytest.mark.parametrize("architecture", NO_FIELD)
def test_packed_weights_cannot_be_pooled(architecture: str) -> None:
    with pytest.raises(Unsupported, match="cannot be made smaller; put this step first"):
        run_of("nf4(), gqa()", architecture)


@pytest.mark.parametrize("bad", ["gqa(kv_heads=0)", "gqa(kv_heads=-1)", "gqa(pool='last')", "mqa(pool='last')"])
def test_settings_that_mean_nothing_are_wrong_usage(bad: str) -> None:
    with pytest.raises(Usage, match=r"kv_heads must be at least 1|pool"):
        parse(bad)


@pytest.mark.parametrize("architecture", ALL)
def test_a_fit_uptrains_what_was_pooled(architecture: str) -> None:
    """All weights, the pooled ones too; the loss falls and heads stay as few."""
    run = run_of("gqa()", architecture)
    run.data.pool = run.data.pool[:8]
    before = probe(run)
    keys = [p for name, p in run.model.named_parameters() if any(k in name for k in KEYS) and "weight" in name]
    start = [parameter.detach().clone() for parameter in keys]
    report = fit(run, FitSettings(steps=12, lr=3e-3, batch_size=4, schedule="constant", warmup=0.0, max_length=32))
    assert all(not torch.equal(now, then) for now, then in zip(keys, start, strict=True)) and keys
    assert report["loss_last"] < report["loss_first"] - 0.2 and groups_of(run) == [1, 1]
    assert not torch.equal(probe(run), before)


KEYS = ("k_proj", "v_proj", "c_attn", "query_key_value")


@pytest.mark.parametrize("left", [1, 2])
def test_the_mean_is_nearer_than_the_first_and_that_than_chance(left: int) -> None:
    """The paper's order (figure 4), in nats a token of the embedded model on held-out text, before any training."""
    losses = []
    for pool in ("mean", "first", "random"):
        run = open_run(sources.model("tiny"), sources.data(None), "cpu", "float32", 0, {"calibration_sequences": 2})
        run.apply(parse(f"gqa(kv_heads={left}, pool={pool!r})").steps[0])
        ids = run.data.heldout_ids(2048).view(-1, 256)
        with torch.no_grad():
            losses.append(float(run.model(ids, labels=ids).loss))
        run.close()
    assert losses[0] + 0.5 < losses[1] < losses[2] - 0.5


@pytest.mark.parametrize(
    ("steps", "model", "share"),
    [("gqa()", "gpt2", 4), ("mqa()", "opt-125m", 12), ("gqa(kv_heads=6), nf4()", "gpt2", 2)],
)
def test_plan_foretells_it(steps: str, model: str, share: int) -> None:
    """Twelve heads of 64 in twelve blocks; a cache holds keys and values of 256 tokens."""
    held = rehearse(make_case(sources.model(f"shape:{model}"), parse(steps).steps, torch.float32, Batch(1, 256)))
    assert held.cache == 12 * 2 * 256 * 768 * 4 // share
    if "nf4" not in steps:
        gone = 12 * 2 * (768 - 768 // share) * (768 + 1)  # weights and biases
        assert held.opened - held.resident == 4 * gone


def test_plan_goes_by_the_model_where_its_small_one_has_fewer_heads() -> None:
    """To foresee packed weights it runs the recipe on eight heads, which do not make sixteen."""
    (prediction,) = predict(PlanOptions(recipe="gqa(kv_heads=16), rtn()", model="shape:llama-65b", context=128))
    (plain,) = predict(PlanOptions(recipe="rtn()", model="shape:llama-65b", context=128))
    assert prediction.held is not None and plain.held is not None, prediction.outcome
    assert prediction.held.cache * 4 == plain.held.cache and prediction.held.stored < plain.held.stored


def test_plan_says_what_cannot_be_done() -> None:
    (prediction,) = predict(PlanOptions(recipe="gqa(kv_heads=5)", model="shape:gpt2"))
    assert prediction.held is None
    assert prediction.outcome.startswith("unsupported: ") and "12 heads of keys make no 5 groups" in prediction.outcome
