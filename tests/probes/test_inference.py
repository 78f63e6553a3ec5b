"""What probes say of plans that change caches, prompts and decoding: never the plain model's number in their name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fake_records import make

from effbench import probes, sources
from effbench.core.errors import Refused, Unsupported
from effbench.core.recipe import parse
from effbench.core.run import InferPlan
from effbench.core.views import Segments
from effbench.machine.clock import Span
from effbench.nn.files.load import open_run
from effbench.nn.infer.answers import answer_kl
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.kinds.prompt import rewrite
from effbench.probes import Reading, compression, distance, inputs, perplexity, prompts, quality
from effbench.probes.lm_tasks import load, quiet
from effbench.probes.prompts import ask_tasks, divided
from effbench.records.metric import Metric
from effbench.report.differences import Pairs, Side, estimate_difference
from effbench.stats.paired import mean_interval

NEEDLE, FACTS, CONTEXTS, RECALL = "tiny_needle_256", "tiny_facts", "tiny_contexts", "tiny_recall_256"
Under = Callable[..., Any]


@pytest.fixture(scope="module")
def plain() -> Any:
    settings = {"calibration_sequences": 2, "calibration_length": 32}
    return open_run(sources.model("tiny"), sources.data("tiny:questions"), "cpu", "float32", 0, settings)


@pytest.fixture(scope="module")
def under(plain: Any) -> Under:
    """The embedded model under the inference plan of a recipe."""

    def under(steps: str) -> Any:
        run = copy.copy(plain)
        run.infer, run._shared = InferPlan(), {}
        for step in parse(steps).steps:
            run.apply(step)
        return run

    return under


# Caches


@pytest.mark.parametrize("steps", ["h2o(budget=1)", "streaming_llm(sinks=0,window=1)", "random_eviction(budget=1)"])
def test_a_cache_of_one_token_is_at_chance(under: Under, steps: str) -> None:
    reading = probes.take("quality", under(steps), {"tasks": [NEEDLE], "limit": 60})
    accuracy = reading.metrics[f"{NEEDLE}_acc"]
    assert accuracy.low is not None and accuracy.high is not None and accuracy.low < 0.25 < accuracy.high
    assert reading.metrics["cache_kept"].value < 0.01


def test_the_whole_cache_answers(under: Under) -> None:
    reading = probes.take("quality", under(""), {"tasks": [NEEDLE], "limit": 60})
    assert reading.metrics[f"{NEEDLE}_acc"].value > 0.9


def test_a_task_that_met_nothing_is_marked_and_counts_for_no_mean(under: Under) -> None:
    """It keeps its own numbers."""
    settings = {"tasks": [NEEDLE, FACTS], "limit": 12}
    reading, before = (probes.take("quality", under(steps), settings) for steps in ("h2o(budget=64)", ""))
    facts, needle = reading.metrics[f"{FACTS}_acc"], reading.metrics[f"{NEEDLE}_acc"]
    assert facts.findings == {"not_exercised": True} and not needle.findings
    assert facts.value == before.metrics[f"{FACTS}_acc"].value
    assert reading.samples[f"{FACTS}_acc"] == before.samples[f"{FACTS}_acc"]
    assert reading.metrics["tasks_acc"].value == needle.value and reading.metrics["tasks_acc"].n == 12
    assert FACTS not in reading.protocols["tasks_acc"] and FACTS not in reading.protocols["cache_kept"]
    assert reading.metrics[f"{FACTS}_cache_kept"].value == 1
    for part in ("cache_kept", "cache_bytes_per_token"):
        assert reading.metrics[part].value == reading.metrics[f"{NEEDLE}_{part}"].value
    assert not any(metric.findings for metric in before.metrics.values())


@pytest.mark.parametrize(
    ("steps", "tasks"),
    [("h2o(budget=64)", [FACTS]), ("speculative()", [FACTS, NEEDLE]), ("retrieval(keep=0.5)", ["tiny_ppl"])],
)
def test_where_no_task_met_anything_there_are_no_numbers(under: Under, steps: str, tasks: list[str]) -> None:
    with pytest.raises(Refused, match="changed nothing of what was measured"):
        probes.take("quality", under(steps), {"tasks": tasks, "limit": 4})


@pytest.mark.parametrize(
    ("steps", "each"),
    [
        ("", 2 * 4 * 32),
        ("kv_quant(key_bits=8,value_bits=8)", 2 * (32 + 2 * 4)),  # codes, and two scales of float32 for each token
        ("kv_quant(key_bits=2,value_bits=2)", 2 * (32 / 4 + 2 * 4)),
        ("kv_quant(key_bits=2,value_bits=8)", 32 / 4 + 32 + 2 * 2 * 4),
    ],
)
def test_bytes_of_caches_follow_from_what_is_stored(under: Under, steps: str, each: float) -> None:
    """Bytes of keys and values of one head: 6 layers have 4 heads of width 32, computed in float32."""
    settings = {"tasks": [NEEDLE, FACTS], "limit": 3, "score_block": 1}
    metrics = probes.take("quality", under(steps), settings).metrics
    for name in (NEEDLE, FACTS):
        assert metrics[f"{name}_cache_kept"].value == 1
        assert metrics[f"{name}_cache_bytes_per_token"].value == pytest.approx(6 * 4 * each)


def test_the_kept_share_is_the_budget_over_the_tokens(under: Under) -> None:
    reading = probes.take("quality", under("random_eviction(budget=50)"), {"tasks": [NEEDLE], "limit": 3})
    (asks,) = ask_tasks(under(""), {"tasks": [NEEDLE]}, 3)
    expected = [50 / (len(ask.ids) - 1) for ask in asks]  # the last token is read from what is left
    assert reading.metrics[f"{NEEDLE}_cache_kept"].value == pytest.approx(sum(expected) / 3)


# Where caches settle


@pytest.mark.slow
def test_a_quarter_of_the_cache_answers_where_what_is_asked_for_stays(
    under: Under, capsys: pytest.CaptureFixture[str]
) -> None:
    """Differences to random eviction, by item: votes of the last queries find the note, the newest tokens do not."""
    window = "random_eviction(keep=0.25,recent=1.0)"
    rows = ["random_eviction(keep=0.25)", window, "h2o(keep=0.25)", "snapkv(keep=0.25,window=16)"]
    answers = {}
    for steps in rows:
        reading = probes.take("quality", under(steps), {"tasks": [NEEDLE], "limit": 200})
        answers[steps] = np.array(reading.samples[f"{NEEDLE}_acc"], dtype=np.float64)
    lines = []
    for steps in rows[1:]:
        found = mean_interval(answers[steps] - answers[rows[0]])
        lines.append(f"{steps}: {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}], {found.n} items")
    with capsys.disabled():
        print(f"\n{NEEDLE} above random eviction:", *lines, sep="\n  ")
    above = mean_interval(answers[rows[3]] - answers[window])
    assert above.n == 200 and above.low is not None and above.low > 0.2


def test_caches_that_settle_before_the_question_are_another_protocol(under: Under) -> None:
    settings = {"tasks": [NEEDLE], "limit": 24, "score_block": 1}
    found = {
        (steps, where): probes.take("quality", under(steps), settings | {"evict_at": where})
        for steps in ("", "snapkv(keep=0.25)")
        for where in ("prompt", "context")
    }
    for (_, where), reading in found.items():
        suffix = "" if where == "prompt" else "_evict_at_context"
        accuracies = {name for name in reading.metrics if "acc" in name}
        assert accuracies == {f"{NEEDLE}_acc{suffix}", f"tasks_acc{suffix}"}
        assert ("evict_at=context" in reading.protocols[f"{NEEDLE}_acc{suffix}"]) == bool(suffix)
    values = {key: next(m.value for name, m in r.metrics.items() if "tasks_acc" in name) for key, r in found.items()}
    assert values["", "prompt"] == values["", "context"]
    assert values["snapkv(keep=0.25)", "prompt"] > values["snapkv(keep=0.25)", "context"]


def test_what_is_held_back_are_the_tokens_of_the_question(under: Under) -> None:
    run = under("")
    settings = {"tasks": [NEEDLE, CONTEXTS], "evict_at": "context"}
    for asks, segments in zip(ask_tasks(run, settings, 6), divided(run, settings, 6), strict=True):
        for ask, parts in zip(asks, segments, strict=True):
            assert run.tokenizer.decode(ask.ids[-ask.hold :]).strip() == parts.question
            assert run.tokenizer.decode(ask.ids[: -ask.hold]).strip() == parts.text()[: -len(parts.question)].strip()


def test_whole_prompts_have_no_question_to_hold_back_or_to_read(under: Under, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "divide", lambda task, document, prompt: Segments(contexts=(prompt,), whole=True))
    with pytest.raises(Unsupported, match="reads the question, and the prompt could not be divided"):
        probes.take("quality", under("retrieval()"), {"tasks": [FACTS], "limit": 2})
    reading = probes.take("quality", under("random_tokens()"), {"tasks": [FACTS], "limit": 2})
    assert "segments=whole" in reading.protocols[f"{FACTS}_acc"]
    with pytest.raises(Unsupported, match="evict_at=context, and a prompt has no question of its own"):
        probes.take("quality", under("snapkv()"), {"tasks": [FACTS], "limit": 2, "evict_at": "context"})


def test_completions_that_met_nothing_are_refused(under: Under) -> None:
    for steps in ("h2o(budget=900)", "random_tokens(keep=1.0)"):
        with pytest.raises(Refused, match="changed nothing of what was measured"):
            probes.take("completion", under(steps), {"limit": 2})


# What probes see

PARTS = {
    "cache": "h2o(budget=2)",
    "attention": "streaming_llm(sinks=0,window=2)",  # which touches the cache, too
    "prompt": "random_tokens(keep=0.1)",
    "decoder": "speculative()",
}
QUICK = {
    "tasks": [RECALL, NEEDLE],
    "limit": 3,
    "window": 64,
    "speed_points": [[1, 16]],
    "speed_new_tokens": 2,
    "speed_seconds": 0.05,
    "flops_context": 16,
    "memory_context": 16,
    "memory_batch": 1,
    "memory_new_tokens": 2,
}
ABOUT_PREDICTIONS = sorted(probes.QUALITY)


class Touching(InferPlan):
    """A plan that changes one part, nobody knows how."""

    touches = frozenset()  # type: ignore[assignment]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", probes.names())
def test_what_a_probe_does_not_see_it_refuses(
    under: Under, monkeypatch: pytest.MonkeyPatch, name: str, part: str
) -> None:
    """And is not even taken; what it sees it is asked for."""
    run, asked = under(""), []
    run.infer = Touching()
    monkeypatch.setattr(Touching, "touches", frozenset({part}))
    monkeypatch.setattr(f"effbench.probes.{name}.take", lambda run, settings: asked.append(name))
    if part in probes.sees(name):
        probes.take(name, run, QUICK)
    else:
        with pytest.raises(Refused, match=f"{name} does not see what the recipe changes: {part}"):
            probes.take(name, run, QUICK)
    assert asked == ([name] if part in probes.sees(name) else [])


@pytest.mark.parametrize("part", PARTS)
def test_recipes_touch_their_parts(under: Under, part: str) -> None:
    recipe = parse(PARTS[part])
    assert part in under(PARTS[part]).infer.touches == recipe.steps[0].touches


@pytest.fixture(scope="module")
def plainly(under: Under) -> dict[str, Reading]:
    """What probes say of the plain model, scored in the same way."""
    return {name: probes.take(name, under(""), QUICK | {"score_block": 1}) for name in ABOUT_PREDICTIONS}


def is_blind(name: str, run: Any, plainly: dict[str, Reading]) -> bool:
    """Whether a probe gives the plain model's results in the name of another plan."""
    try:
        reading = probes.take(name, run, QUICK | {"score_block": 1})
    except (Refused, Unsupported):
        return False
    marked = {key for key, metric in reading.metrics.items() if metric.findings.get("not_exercised")}
    found = {key: values for key, values in reading.samples.items() if key not in marked}
    return bool(found) and all(plainly[name].samples.get(key) == values for key, values in found.items())


@pytest.mark.parametrize("part", [part for part in PARTS if part != "decoder"])  # whose texts are the plain model's
@pytest.mark.parametrize("name", ABOUT_PREDICTIONS)
def test_no_probe_gives_the_plain_models_results(
    under: Under, plainly: dict[str, Reading], name: str, part: str
) -> None:
    assert not is_blind(name, under(PARTS[part]), plainly)


@pytest.mark.parametrize("name", ["perplexity", "distance"])
def test_planted_blindness_is_caught(
    under: Under, plainly: dict[str, Reading], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A probe that says it sees prompts and does not."""
    monkeypatch.setattr(probes, "sees", lambda name: {"weights", "cache", "attention", "prompt", "decoder"})
    assert is_blind(name, under(PARTS["prompt"]), plainly)


def test_tasks_that_forget_the_plan_are_caught(
    under: Under, plainly: dict[str, Reading], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the engine did not read the plan, and the check of what was met did not look."""
    monkeypatch.setattr(quality, "open_engine", lambda run: open_engine(run, run.model))
    run = under(PARTS["cache"])
    assert not is_blind("quality", run, plainly)
    monkeypatch.setattr(quality.Met, "exercised", lambda self, touched: True)
    monkeypatch.setattr(quality, "require_effect", lambda run, parts: None)
    assert is_blind("quality", run, plainly)


@pytest.mark.parametrize(
    "steps",
    [
        "retrieval(keep=1.0)",
        "random_tokens(keep=1.0)",
        "llmlingua(keep=1.0)",
        "kv_quant(key_bits=16,value_bits=16)",
        "h2o(budget=1000000)",
        "snapkv(budget=1000000), retrieval(keep=1.0)",
    ],
)
def test_methods_at_their_identity_are_refused_like_all_that_changes_nothing(under: Under, steps: str) -> None:
    with pytest.raises(Refused, match="the recipe changed nothing"):
        under(steps).finish()


# Perplexity and distance


def test_perplexity_by_blocks_is_of_the_second_half(under: Under) -> None:
    """Plainly, against transformers' own logits."""
    run, settings = under(""), {"window": 64, "limit": 4, "score_block": 1}
    values = perplexity.take(run, settings).samples["token_ppl_window_nll"]
    for ids, value in zip(run.data.heldout_ids(256).view(4, 64), values, strict=True):
        with torch.no_grad():
            logprobs = run.model(input_ids=ids[None]).logits[0, 31:63].log_softmax(-1)
        assert value == pytest.approx(-float(logprobs.gather(1, ids[32:, None]).mean()), rel=1e-4)


def test_kl_of_the_plain_model_by_blocks_is_zero(under: Under) -> None:
    settings = {"window": 64, "limit": 3, "score_block": 1}
    assert distance.take(under(""), settings).metrics["kl_nats_per_token"].value == pytest.approx(0, abs=1e-9)
    assert inputs.windows(under(""), settings).first == 32
    assert inputs.windows(under(""), settings | {"score_block": None}).first == 1
    reading = distance.take(under("random_eviction(keep=0.25)"), settings)
    assert reading.metrics["kl_nats_per_token"].value > 0.1


# Answers

CHOSEN = {"tasks": [CONTEXTS], "limit": 6}


def test_answers_of_a_plan_without_prompts_and_caches_have_no_divergence(under: Under) -> None:
    for steps in ("", "speculative()"):
        assert not probes.take("answers", under(steps), CHOSEN).metrics


@pytest.mark.parametrize("steps", ["retrieval(keep=0.5)", "h2o(keep=0.3)", "kv_quant(key_bits=2,value_bits=2)"])
def test_answers_diverge_where_something_is_missing(under: Under, steps: str) -> None:
    reading = probes.take("answers", under(steps), CHOSEN)
    assert reading.metrics["answer_kl_nats_per_token"].value > 0.01
    assert len(reading.samples["answer_kl_nats_per_token"]) == 6


def test_answers_to_the_same_prompt_do_not_diverge(under: Under) -> None:
    run = under("")
    (asks,) = ask_tasks(run, CHOSEN, 4)
    ids, engine = [ask.ids for ask in asks], open_engine(run)
    assert answer_kl(engine, engine, ids, ids, {1}) == [0.0] * 6
    with pytest.raises(Refused, match="changed nothing of what was measured"):
        probes.take("answers", under("h2o(budget=900)"), CHOSEN)


def test_the_divergence_of_one_answer_by_hand(under: Under) -> None:
    """The plain model's greedy answer, read behind both prompts."""
    run = under("retrieval(keep=0.5)")
    value, *_ = probes.take("answers", run, CHOSEN).samples["answer_kl_nats_per_token"]
    ((segments, *_),) = divided(run, CHOSEN, 1)
    before, after = (run.data.encode_prompt(text.text()) for text in (segments, run.rewrite(segments)))
    assert len(after) < len(before) and after[-1] == before[-1]
    answer: list[int] = []
    stop = run.tokenizer.eos_token_id

    def read(ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return run.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)

    while len(answer) < 8 and stop not in answer:
        answer.append(int(read([*before, *answer])[-1].argmax()))
    p, q = (read([*prompt, *answer])[len(prompt) - 1 : -1] for prompt in (before, after))
    assert value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_evict_at_is_named_in_the_protocol_of_answers(under: Under) -> None:
    where = [{"evict_at": name} for name in ("prompt", "context")]
    found = [probes.take("answers", under("snapkv(keep=0.25)"), CHOSEN | one) for one in where]
    values = [reading.metrics["answer_kl_nats_per_token"].value for reading in found]
    protocols = [reading.protocols["answer_kl_nats_per_token"] for reading in found]
    assert values[0] != values[1] and protocols[0] != protocols[1] and "evict_at=context" in protocols[1]


@pytest.mark.parametrize("method", ["random_tokens(keep=0.35{})", "retrieval(keep=0.35{})"])
def test_refinement_keeps_more_until_the_bound_holds(under: Under, method: str) -> None:
    run = under("")
    segments = next(iter(divided(run, CHOSEN, 1)))[0]
    whole = run.data.encode_prompt(segments.text())

    def shorten(options: str) -> Segments:
        return rewrite(run, parse(method.format(options)).steps[0], segments)

    def diverge(short: Segments) -> float:
        stops = {run.tokenizer.eos_token_id}
        return answer_kl(open_engine(run), open_engine(run), [whole], [run.data.encode_prompt(short.text())], stops)[0]

    assert shorten(",bound=0.0") == segments
    assert shorten(",bound=1000.0") == shorten("") != segments
    steps = [
        parse(method.format("").replace("0.35", str(min(1.0, round(0.35 + i / 10, 6))))).steps[0].rewrite(segments, run)
        for i in range(8)
    ]
    for bound in (0.2, 2.0):
        assert shorten(f",bound={bound}") == next(short for short in steps if diverge(short) <= bound)


# Prompts


def test_what_shortening_takes_and_leaves_is_of_prompt_recipes_only(under: Under) -> None:
    run = under("retrieval(keep=0.5)")
    metrics = probes.take("compression", run, CHOSEN).metrics
    cost = {"compressor_ms_per_prompt", "prompt_saved_ms"}
    assert set(metrics) == cost | {"prompt_kept", "prompt_asked", "prompt_over_asked"}
    assert metrics["compressor_ms_per_prompt"].value > 0 and all(metrics[name].n == 6 for name in cost)
    assert metrics["prompt_asked"].value == 0.5
    (items,) = divided(run, CHOSEN, 6)
    sizes = [
        (len(run.data.encode_prompt(parts.text())), len(run.data.encode_prompt(run.rewrite(parts).text())))
        for parts in items
    ]
    before, after = map(sum, zip(*sizes, strict=True))
    assert metrics["prompt_kept"].value == pytest.approx(after / before)
    over = [short > 0.55 * whole for whole, short in sizes]
    assert metrics["prompt_over_asked"].value == pytest.approx(sum(over) / 6)
    quick = probes.take("quality", run, CHOSEN).metrics
    assert quick[f"{CONTEXTS}_prompt_kept"].value == pytest.approx(after / before)
    for steps in ("", "h2o(keep=0.5)", "speculative()"):
        assert not probes.take("compression", under(steps), CHOSEN).metrics


def test_time_is_saved_where_reading_takes_longer_than_shortening(
    under: Under, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a clock that counts 10 a token read and 100 for what shortens: 100 less than the reading of what went."""
    run = under("random_tokens(keep=0.5)")
    spent: list[float] = []

    def timed(work: Callable[[], object], device: Any) -> Any:
        fed: list[Any] = []
        monkeypatch.setattr(Engine, "read", lambda self, prompts: fed.extend(prompts[0]))
        work()
        spent.append(10.0 * len(fed) or 100.0)
        return Span(spent[-1], spent[-1])

    monkeypatch.setattr(compression, "timed", timed)
    found = probes.take("compression", run, CHOSEN).samples["prompt_saved_ms"]
    rounds = [spent[i : i + 3] for i in range(3, len(spent), 3)]
    assert found == [1000 * (whole - short - 100) for _, whole, short in rounds] and len(found) == 6
    assert all(whole > 1.8 * short for _, whole, short in rounds)


def test_what_is_forced_shows_as_more_than_was_asked(under: Under, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "In 1999 Zisk and Bo of Krox saw 34 and 35 in Gloxi. "
    given = [Segments("", "Notes: ", (text,), "The code") for text in (told, told.lower().replace("1999", "fog") * 3)]
    monkeypatch.setattr(compression, "divided", lambda *_: [given])
    metrics = probes.take("compression", under("attention_pruning(keep=0.4, force=True)"), CHOSEN).metrics
    assert metrics["prompt_asked"].value == 0.4 and metrics["prompt_over_asked"].value == 0.5
    metrics = probes.take("compression", under("attention_pruning(keep=0.4)"), CHOSEN).metrics
    assert metrics["prompt_over_asked"].value == 0
    metrics = probes.take("compression", under("attention_pruning(), random_tokens(keep=0.6)"), CHOSEN).metrics
    assert metrics["prompt_asked"].value == 0.3


@pytest.mark.parametrize("steps", ["retrieval(keep=0.5)", "random_tokens(keep=0.3)"])
@pytest.mark.parametrize("opens", [False, True])
def test_choices_are_the_same_behind_a_shortened_prompt(
    under: Under, monkeypatch: pytest.MonkeyPatch, steps: str, opens: bool
) -> None:
    """And the prompt's last token is, and there is at most one BOS."""
    pairs: dict[str, list[tuple[list[int], list[int]]]] = {}
    for name in ("", steps):
        run = under(name)
        if opens:
            open_with_bos(run)
        lm = quality.EngineLM(run, {})
        original = lm.engine.score

        def score(given: Any, block: Any = None, hold: Any = None, name: str = name, original: Any = original) -> Any:
            pairs[name] = list(given)
            return original(given, block=block, hold=hold)

        monkeypatch.setattr(lm.engine, "score", score)
        lm.loglikelihood(requests(lm, run, [CONTEXTS, NEEDLE], 4))
    first = run.tokenizer.bos_token_id
    for (before, choice), (after, same) in zip(pairs[""], pairs[steps], strict=True):
        assert choice == same and after[-1] == before[-1] and len(after) < len(before)
        for ids in (before, after):
            assert ids.count(first) == opens and (ids[0] == first) == opens


def open_with_bos(run: Any) -> None:
    """Have the tokenizer put BOS before every text."""
    from tokenizers import processors

    run.tokenizer = copy.deepcopy(run.tokenizer)
    bos = run.tokenizer.bos_token
    run.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, run.tokenizer.bos_token_id)]
    )


def requests(lm: Any, run: Any, names: list[str], limit: int) -> list[Any]:
    """What lm-eval asks of the first items of tasks."""
    with quiet():
        tasks, _ = load(names, run.data.task_paths)
        lm.tasks = tasks["tasks"]
        for task in lm.tasks.values():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
    return [instance for task in lm.tasks.values() for instance in task.instances]


# Items that are cut


def test_all_choices_of_an_item_are_cut_alike(under: Under, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the longest of them, whatever each takes."""
    run = under("")
    lm, asked = quality.EngineLM(run, {}), []
    monkeypatch.setattr(type(lm.engine), "max_length", 40)
    monkeypatch.setattr(lm.engine, "score", lambda pairs, **options: asked.extend(pairs) or [])
    given = requests(lm, run, [CONTEXTS], 2)
    for number, request in enumerate(given):
        prompt, choice = request.arguments
        request.arguments = (prompt, choice + " the king" * number)
    lm.loglikelihood(given)
    for place in (0, 4):
        item = asked[place : place + 4]
        longest = max(len(choice) for _, choice in item)
        assert len({len(choice) for _, choice in item}) == 4
        assert {len(prompt) for prompt, _ in item} == {40 - longest + 1}
        assert len({tuple(prompt) for prompt, _ in item}) == 1
    assert lm.met[CONTEXTS].cut == {0, 1}


def test_cut_items_are_counted_and_listed(under: Under, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose prompt has more tokens than there are positions, before the room of the longest choice."""
    run = under("")
    (asks,) = ask_tasks(run, {"tasks": [CONTEXTS]}, 12)
    sizes = sorted(len(ask.ids) for ask in asks)
    room = sizes[5]
    monkeypatch.setattr(run.model.config, "max_position_embeddings", room)
    reading = probes.take("quality", run, {"tasks": [CONTEXTS], "limit": 12})
    cut = reading.samples[f"{CONTEXTS}_cut"]
    assert len(cut) == 12 and [size > room for size in (len(ask.ids) for ask in asks)] == [bool(one) for one in cut]
    assert reading.metrics[f"{CONTEXTS}_acc"].findings["cut_contexts"] == sum(cut) > 0


@pytest.mark.parametrize("evict_at", ["", "_evict_at_context"])
def test_cut_items_are_out_of_paired_differences(evict_at: str) -> None:
    """Whichever side cut them."""
    name = f"recall_acc{evict_at}"
    right = {"baseline": [1, 1, 1, 1, 0, 0, 0, 1], "h2o()": [0, 1, 1, 0, 0, 1, 0, 0]}
    cut = {"baseline": [1, 0, 0, 0, 0, 0, 0, 0], "h2o()": [0, 0, 0, 1, 0, 0, 0, 0]}
    before, after = (
        [
            make(
                recipe,
                metrics={name: Metric(np.mean(values), n=8)},
                samples={name: values, "recall_cut": cut[recipe]},
                protocols={name: "task recall"},
            )
        ]
        for recipe, values in right.items()
    )
    (pair,) = Pairs(Side(before), Side(after)).find(name)
    assert pair.before.tolist() == [1, 1, 0, 0, 0, 1] and pair.after.tolist() == [1, 1, 0, 1, 0, 0]
    estimate = estimate_difference(before, after, name)
    assert estimate is not None and estimate.value == 0 and math.isfinite(estimate.p)
