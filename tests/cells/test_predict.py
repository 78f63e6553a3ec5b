"""What `effbench plan` foretells is what runs measure, and what closed forms say."""

import dataclasses
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from effbench import sources
from effbench.cells.claims import CLAIMS
from effbench.cells.predict import PlanOptions, parse_memory, predict
from effbench.cli.main import main
from effbench.core.errors import Usage
from effbench.core.recipe import parse
from effbench.nn import rehearse
from effbench.nn.files.load import open_run
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.held import Followed, count_bytes
from effbench.nn.model.linear import stored_bytes
from effbench.nn.rehearse import Batch, Held, Rehearsals, Rows, make_case
from effbench.nn.stand_in import stand_for
from effbench.probes.memory import resident_bytes
from effbench.sources import TINY

ROWS, TOKENS = 2, 48


def measure(steps, model="tiny"):
    """The parts of a prediction as a run on the embedded model has them."""
    run = open_run(sources.model(model), sources.data(None), "cpu", "float32", 0, {"calibration_sequences": 2})
    data = Rows(4, TOKENS)
    data.calibration = run.data.calibration
    run.data = data
    found = {}
    try:
        for step in parse(steps).steps:
            run.apply(step)
            if step.consumes:
                cost = run.log.fits[-1]["cost"]
                found["weights"] = cost["parameter_bytes"] + cost["buffer_bytes"]
                found |= {part: cost[f"{key}_bytes"] for part, key in PARTS.items()}
        run.finish(recipe_is_empty=True)
        stored = stored_bytes(run.model, run.storage)
        found |= {"stored": sum(stored), "stored_constants": stored.metadata, "resident": resident_bytes(run.model)}
        if run.infer.streams:
            engine = open_engine(run)
            engine.score([([1] * TOKENS, [1, 1])] * ROWS)
            found["cache"] = sum(use.nbytes for use in engine.uses)
    finally:
        run.close()
    return found


PARTS = {"gradients": "gradient", "optimizer": "optimizer", "activations": "activation"}


def foretell(steps, model="tiny", dtype=torch.float32, batch=None, context=None, engine=""):
    """What is foretold; without a fit and without `batch` and `context`, for so many rows in the cache."""
    (divider,) = parse(engine).steps if engine else (None,)
    case = make_case(sources.model(model), parse(steps).steps, dtype, Batch(batch, context))
    return Rehearsals(dataclasses.replace(case, cached=Batch(batch or ROWS, context or TOKENS))).take(divider)


FIT = f"fit(steps=7, batch_size={ROWS}, max_length={TOKENS})"


@pytest.mark.parametrize(
    "steps",
    [
        FIT,
        f"lora(rank=4), {FIT}",
        pytest.param(f"nf4(double_quant=True), lora(rank=4), {FIT}", marks=pytest.mark.slow),
        pytest.param(f"galore(rank=8), {FIT}", marks=pytest.mark.slow),
        pytest.param(f"gqa(), {FIT}", marks=pytest.mark.slow),
        "gqa(kv_heads=2), kv_quant()",
        f"paged_adamw(bits=8), {FIT}",
        pytest.param(f"checkpointing(), {FIT}", marks=pytest.mark.slow),
        pytest.param(f"bf16(), {FIT}", marks=pytest.mark.slow),
        pytest.param("gptq(group_size=64)", marks=pytest.mark.slow),
        "wanda(pattern='2:4')",
        "magnitude(sparsity=0.7)",
        "kv_quant(key_bits=4, value_bits=4, per='group')",
        "streaming_llm(sinks=2, window=16)",
    ],
)
def test_foretells_what_is_measured(steps):
    measured, held = measure(steps), dataclasses.asdict(foretell(steps))
    assert measured.keys() >= ({"weights"} if "fit" in steps else {"stored"})
    for part, size in measured.items():
        if part == "activations":
            assert held[part] == pytest.approx(size, rel=0.1)
        elif part in ("stored", "stored_constants", "resident") and "magnitude" in steps:
            assert held[part] == pytest.approx(size, rel=0.02)  # by how many weights lie above a threshold
        else:
            assert held[part] == size, part


def test_sizes_are_read_in_powers_of_1000_or_1024():
    assert [parse_memory(text) for text in ("24GB", "80GiB", "1.5 tb", "512B", "24g")] == [
        24 * 10**9,
        80 * 2**30,
        15 * 10**11,
        512,
        24 * 10**9,
    ]
    for text in ("abc", "24XB", "-1GB", "0", "0GB", "24", "24iB", ""):
        with pytest.raises(Usage, match="memory="):
            parse_memory(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model=shape:llama-9"], "unknown shape 'llama-9'"),
        (["memory=abc"], "memory=abc: must be a size such as 24GB"),
        (["ranks=0"], "ranks=0"),
        (["batch=-1"], "batch=-1"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    assert main(["plan", "recipe=fit()", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_neither_suite_nor_recipe_is_wrong_usage(capsys):
    assert main(["plan", "model=tiny"]) == 2
    assert "give suite=NAME or recipe=" in capsys.readouterr().err


def test_what_is_followed_counts_as_long_as_it_is_there():
    followed, tensors = Followed(), [torch.zeros(10), torch.zeros(5)]
    for tensor in (*tensors, tensors[0][:4]):
        followed.follow(tensor)
    del tensors[0], tensor
    assert followed.now == 20 and followed.peak == 60
    followed.follow(torch.zeros(7))
    assert followed.now == 20 and followed.peak == 60


def test_a_process_that_stands_for_one_of_several_is_one_again_after():
    hook, gather = sys.excepthook, distributed.all_gather_object
    with pytest.raises(ZeroDivisionError), stand_for(1, 4):
        found, number = [None] * 4, torch.ones(2)
        distributed.all_gather_object(found, "mine")
        distributed.all_reduce(number)
        assert (distributed.get_rank(), distributed.get_world_size()) == (1, 4)
        assert found == ["mine"] * 4 and number.tolist() == [1, 1]
        raise ZeroDivisionError
    assert not distributed.is_initialized() and sys.excepthook is hook and distributed.all_gather_object is gather


def test_views_of_a_storage_count_once():
    whole = torch.zeros(10)
    assert count_bytes([whole, whole.view(2, 5), whole[:4], whole[4:]]) == 40
    assert count_bytes([whole[:4], whole[:4]]) == 16  # of a file that is mapped, what is read counts
    assert count_bytes([whole[:4], torch.zeros(4)]) == 32


@pytest.mark.slow
def test_an_engine_says_what_it_divides():
    alone, pair = (
        next(predict(PlanOptions(recipe=f"ddp(ranks={n}), fit(batch_size=4, max_length=32)", dtype="float32")))
        for n in (1, 2)
    )
    assert pair.held.weights == alone.held.weights and pair.held.optimizer == alone.held.optimizer
    assert pair.held.activations == pytest.approx(alone.held.activations / 2, rel=0.1)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("ep(ranks=2), fit()", "a llama has no experts to divide"),
        ("tp(ranks=8), fit()", "8 ranks are more than 4 heads"),
        ("sp(ranks=3), fit()", "4 heads cannot be dealt out evenly to 3 ranks"),
        ("pp(ranks=8), fit()", "8 stages are wanted, and the model has 6 blocks"),
        ("lora(), tp(), fit()", "only plain linears are divided"),
        ("galore(rank=8), fsdp(), fit()", "keeps states of whole matrices"),
    ],
)
def test_what_a_run_would_refuse_is_refused(steps, said):
    (found,) = predict(PlanOptions(recipe=steps, batch=2, context=16))
    assert found.held is None and found.outcome.startswith("unsupported: ") and said in found.outcome


@pytest.mark.slow
def test_engines_divide_what_they_say():
    """In float32 on the embedded model, whose table has a row for padding and stays whole where linears are divided."""
    model = load_file(TINY / "model" / "model.safetensors")
    table, last = (4 * model[f"model.{name}.weight"].numel() for name in ("embed_tokens", "norm"))
    norms = 4 * sum(tensor.numel() for tensor in model.values() if tensor.ndim == 1)
    whole = foretell(FIT)
    frequencies = whole.weights - whole.gradients  # of rotary positions, which every process has
    matrices = whole.gradients - norms - table
    assert whole.optimizer >= 2 * whole.gradients
    found = foretell(FIT, engine="tp(ranks=4)")
    assert found.gradients == norms + table + matrices / 4 and found.weights == found.gradients + frequencies
    found = foretell(FIT, engine="fsdp(ranks=4, stage=2)")
    rows = sum(4 * -(-len(tensor) // 4) * tensor[0].numel() for tensor in model.values())  # of the first of four
    assert found.gradients == rows > whole.gradients / 4 and found.weights == found.gradients + frequencies
    assert found.gathered == whole.gradients  # from the forward pass to the end of the backward pass
    found = foretell(FIT, engine="pp(ranks=3)")  # the last stage has the table too, and the norm
    assert found.gradients == table + last + (whole.gradients - table - last) / 3
    packed = "nf4(), lora(rank=4), " + FIT
    whole = foretell(packed)
    assert foretell(packed, engine="fsdp(ranks=2)").weights > whole.weights / 2  # codes are no parameters
    ends = table + last + frequencies
    assert foretell(packed, engine="pp(ranks=3)").weights == ends + (whole.weights - ends) / 3  # and belong to blocks


@pytest.mark.slow
def test_what_is_alike_under_all_engines_is_found_once(monkeypatch):
    """And what an engine alone changes is what a rehearsal of its own has."""
    filled, fill = [], rehearse._fill_cache
    monkeypatch.setattr(rehearse, "_fill_cache", lambda *given: filled.append(1) or fill(*given))
    rehearsals = Rehearsals(make_case(sources.model("tiny"), parse(f"lora(rank=4), {FIT}").steps, torch.float32))
    rehearsals.case = dataclasses.replace(rehearsals.case, cached=Batch(ROWS, TOKENS))
    _, found = (rehearsals.take(*parse(engine).steps) for engine in ("ddp()", "fsdp()"))
    assert len(filled) == 3  # at three depths
    assert found == foretell(f"fsdp(), lora(rank=4), {FIT}")


def test_predictions_come_one_by_one(monkeypatch):
    made = []
    take = Rehearsals.take
    monkeypatch.setattr(Rehearsals, "take", lambda self, engine: made.append(engine) or take(self, engine))
    first = next(predict(PlanOptions(recipe=FIT, ranks=2)))
    assert len(made) == 1 and first.ranks == 2 and first.held is not None


def test_a_recipe_without_an_engine_is_tried_under_each_of_their_settings(monkeypatch):
    monkeypatch.setattr(Rehearsals, "take", lambda self, engine: Held(trained=engine.ranks))
    found = list(predict(PlanOptions(recipe=FIT, ranks=3)))
    assert len({prediction.engine for prediction in found}) == len(found) == 10
    assert all(prediction.ranks == prediction.held.trained == 3 for prediction in found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pp()", "fsdp(stage=1)", "tp()"])
def test_a_deep_model_is_foretold_by_few_blocks(engine):
    """What few blocks are carried on to is what all of them hold, whichever way an engine deals them out."""
    case = make_case(sources.model("shape:deep-tiny"), parse(FIT).steps, torch.float32)
    case.config.num_hidden_layers = 13  # an odd number: one of two stages has one block more
    (step,) = parse(engine).steps
    few = Rehearsals(case)
    gone, depths = few._find, []
    few._find = lambda step, process, depth: depths.append(depth) or gone(step, process, depth)
    assert few.take(step, process=0) == Rehearsals(case)._find(step, 0, 13)[0]
    assert max(depths) < 13


@pytest.mark.parametrize("steps", ["kv_quant()", FIT])
def test_a_context_has_no_more_tokens_than_the_model_has_positions(steps, capsys):
    assert main(["plan", f"recipe={steps}", "context=2049"]) == 0
    assert "unsupported: a context of 2049 tokens is longer than the 2048 positions" in capsys.readouterr().out


def test_what_a_fit_reads_by_itself_and_the_cache_end_with_the_positions():
    long, whole = (
        next(predict(PlanOptions(recipe=f"fit(max_length={length}, batch_size=1)", dtype="float32")))
        for length in (4096, 2048)
    )
    assert long.context == whole.context == 2048
    assert long.held.cache == whole.held.cache and long.held.activations == whole.held.activations


def test_other_ranks_than_the_recipe_takes_are_wrong_usage(capsys):
    for steps in (f"fsdp(ranks=4), {FIT}", f"tp(), {FIT}", f"pp(ranks=4), {FIT}"):
        assert main(["plan", f"recipe={steps}", "ranks=3"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "ranks=3" in line and ("takes 4" in line or "tp()" in line)
    (found,) = predict(PlanOptions(recipe=f"fsdp(ranks=4), {FIT}", ranks=4))
    assert found.ranks == 4 and found.engine == "fsdp(ranks=4)"


@pytest.mark.slow
def test_experts_are_divided_and_all_else_is_not():
    whole, found = (foretell(FIT, "tiny:moe", engine=engine) for engine in ("", "ep(ranks=4)"))
    assert whole.activations == pytest.approx(measure(FIT, "tiny:moe")["activations"], rel=0.01)
    experts = 6 * 4 * 3 * 4 * 384 * 128
    assert whole.gradients - found.gradients == experts * 3 / 4
    assert found.activations == pytest.approx(whole.activations / 2, rel=0.01)  # a rank reads one of two examples


def linears(hidden, kv, mlp):
    """[out, in] of the linears of a block of Llama."""
    return [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (mlp, hidden), (mlp, hidden), (hidden, mlp)]


def nf4_bytes(out, width):
    """Codes, 8-bit factors of 64 weights, a float32 one of 256 of these, their mean, map and the 16 levels."""
    blocks = out * width // 64
    return out * width // 2 + blocks + 4 * -(-blocks // 256) + 4 + 4 * 256 + 4 * 16


def figures():
    """Every right figure of the claims, by hand."""
    found = {
        "lora_matrix": 16 * (4096 + 4096),
        "prefix_heads": 2 * 32 * 20 * 4096,
        "prefix_groups": 2 * 32 * 20 * 8 * 128,
    }
    for name, kv, mlp in (("65", 8192, 22016), ("70", 1024, 28672)):
        shapes = linears(8192, kv, mlp)
        rest = 2 * 32000 * 8192 + (2 * 80 + 1) * 8192
        found[f"parameters{name}"] = 80 * sum(out * width for out, width in shapes) + rest
        found[f"nf4{name}"] = 80 * sum(nf4_bytes(*shape) for shape in shapes) + 2 * rest
        found[f"lora{name}"] = 80 * sum(16 * (out + width) for out, width in shapes)
    return {
        "lora_matrix": found["lora_matrix"],
        "prefix_heads": found["prefix_heads"],
        "prefix_groups": found["prefix_groups"],
        "llama65b_weights": 2 * found["parameters65"],
        "llama65b_optimizer": 12 * found["parameters65"],
        "llama65b_total": 16 * found["parameters65"],
        "qlora65b_weights": found["nf465"],
        "qlora65b_optimizer": 8 * found["lora65"],
        "qlora65b_gradients": 4 * found["lora65"],
        "qlora65b_total": found["nf465"] + 16 * found["lora65"],
        "qlora70b_total": found["nf470"] + 16 * found["lora70"],
        "llama70b_cache": 2 * 80 * 8 * 128 * 2 * 4096,
        "checkpointing_every_compute": 1 + 1 + 2,  # forward, again, backward
        "checkpointing_every_memory": 32 * 4096 * 4096 * 2,
        "checkpointing_sqrt_memory": -(-32 // 6) * 4096 * 4096 * 2,
        "zero1": 7_500_000_000 * (4 + 12 / 64),
        "zero2": 7_500_000_000 * (2 + 14 / 64),
        "zero3": 7_500_000_000 * 16 / 64,
    }


def test_claims_state_the_right_figures():
    assert {claim.name: claim.figure for claim in CLAIMS} == figures()


@pytest.mark.slow
def test_every_engine_is_foretold_on_a_model_of_80_blocks_or_says_why():
    """A rank of two has half the stages' blocks, and half of what is trained; packed codes are whole but in stages."""
    options = PlanOptions(recipe="nf4(), lora(), fit()", model="shape:llama-2-70b", ranks=2)
    found = {prediction.engine: prediction for prediction in predict(options)}
    assert {prediction.outcome.split(":")[0] for prediction in found.values()} == {"", "unsupported"}
    held = {engine: prediction.held for engine, prediction in found.items() if prediction.held}
    assert held.keys() == {f"fsdp(stage={n})" for n in (1, 2)} | {"ddp()", "fsdp()", "sp(kind='ulysses')"} | {
        "pp()",
        "pp(schedule='1f1b')",
    }
    for part in ("resident", "stored", "cache", "trained"):
        assert len({getattr(one, part) for one in held.values()}) == 1, part
    assert held["fsdp()"].gradients == held["ddp()"].gradients / 2
    assert held["pp()"].weights < 0.52 * held["ddp()"].weights


@pytest.mark.slow
def test_llama_2_70b_is_foretold_as_by_hand():
    held = foretell("nf4(double_quant=True), lora(rank=16), fit()", "shape:llama-2-70b", torch.bfloat16, 1, 4096)
    by_hand = figures()
    assert held.parameters == 68_976_648_192 and held.opened >= 2 * held.parameters
    assert held.weights + held.gradients + held.optimizer == pytest.approx(by_hand["qlora70b_total"], rel=1e-6)
    assert held.cache == by_hand["llama70b_cache"]


@pytest.mark.parametrize(
    "acquisition",
    [
        "acquire='bald(samples=2)', budget=96",
        pytest.param("acquire='random_selection()', budget=3, rounds=3", marks=pytest.mark.slow),
    ],
)
def test_answers_that_are_bought_are_not_counted_among_the_rows_of_a_rehearsal(acquisition):
    assert foretell(f"active_learning({acquisition}, batch_size={ROWS}, max_length={TOKENS})") == foretell(FIT)


def test_what_goes_by_the_length_of_fits_is_shortened_with_them():
    (ticket,) = parse("lottery_ticket(rewind=10, lr=(0.1, 0.2), batch_size=9, accumulate=7)").steps
    assert str(ticket.shorten(2, 4, 48)) == (
        "lottery_ticket(steps=2, lr=0.1, batch_size=4, accumulate=4, max_length=48, rewind=1)"
    )
