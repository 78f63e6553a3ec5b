"""Every instrument against a truth that is known beforehand."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import json
import math
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from effbench import probes
from effbench.cells.findings import Findings
from effbench.checks import FIT, toy, toy_run
from effbench.core.errors import Diverged, Refused, Unsupported, Usage
from effbench.core.recipe import parse
from effbench.core.run import InferPlan, Run, RunLog
from effbench.formats.sparse import PrunedLinear
from effbench.machine import clock, environment, nvml, peak
from effbench.machine.clock import Span
from effbench.nn.files import artifact
from effbench.nn.infer.engine import Engine, open_engine
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.flops import count_flops
from effbench.nn.model.linear import MaskedLinear, replace, stored_bytes, top_linears
from effbench.nn.model.sparsity import measure_sparsity
from effbench.nn.run import Original
from effbench.nn.train.fit import fit
from effbench.probes import distance, energy, flops, inputs, memory, perplexity, quality, speed, training
from effbench.sources import tasks as names
from effbench.stats import intervals

TEXT = " ".join(
    f"The {a} of {b} gave {c} to the {d}."
    for a in ("king", "baker", "fox", "child")
    for b in ("York", "Rome", "Oslo", "Bonn")
    for c in ("bread", "gold", "a song", "nothing")
    for d in ("queen", "town", "river", "birds")
)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def llama(vocabulary=320, tied=False, seed=0, positions=96):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


class Texts:
    """Held-out text, and tasks where a test brings some."""

    name = "text:test"
    protocol = "text:test, one document, no token added"
    tasks: tuple[str, ...] = ()
    task_paths: tuple[Path, ...] = ()
    window: int | None = None

    def __init__(self, tokenizer, text=TEXT):
        self.ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))

    def heldout_ids(self, limit=None):
        return self.ids[:limit]


def make_run(tokenizer, model=None, reference=None):
    reference = reference or llama()
    run = SimpleNamespace(
        model=model if model is not None else copy.deepcopy(reference),
        reference=reference,
        tokenizer=tokenizer,
        data=Texts(tokenizer),
        seed=0,
        device=torch.device("cpu"),
        storage=torch.bfloat16,
        original=Original(sum(stored_bytes(reference, torch.bfloat16)), sum(p.numel() for p in reference.parameters())),
        log=RunLog(),
        _shared={},
        source=SimpleNamespace(kind="folder"),
        infer=InferPlan(),
        progress=lambda unit, done, total: None,
    )
    run.share = functools.partial(Run.share, run)
    run.pad = 0
    return run


@pytest.fixture
def run(tokenizer):
    return make_run(tokenizer)


# Discovery


def test_probes_are_found_without_torch():
    code = (
        "import sys; from effbench import probes; assert 'torch' not in sys.modules; "
        "print(sorted(probes.names()), sorted(probes.EXCLUSIVE))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(list(probes.names())) + " ['compression', 'drafts', 'energy', 'speed']"
    assert {"quality", "perplexity", "distance", "memory", "speed", "flops", "energy", "cost"} <= set(probes.names())


def test_an_unknown_probe_is_named(run):
    with pytest.raises(Usage, match="did you mean 'memory'"):
        probes.take("memroy", run, {})


# Intervals


def test_wilson_interval_of_known_cases():
    metric = intervals.fraction([1] * 5 + [0] * 5)
    assert (metric.value, metric.n) == (0.5, 10)
    assert (metric.low, metric.high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    sure = intervals.fraction([1] * 10)
    assert sure.high == pytest.approx(1.0) and sure.low == pytest.approx(0.7225, abs=1e-4)


@pytest.mark.parametrize("n", [6, 11, 40])
def test_median_interval_covers(n):
    rng = random.Random(n)
    draws = [intervals.median([rng.lognormvariate(0, 1) for _ in range(n)]) for _ in range(1000)]
    assert statistics.fmean(m.low <= 1.0 <= m.high for m in draws) >= 0.94


def test_mean_and_quotient_intervals_cover():
    rng = random.Random(0)
    means, quotients = [], []
    for _ in range(2000):
        sizes = [rng.randint(1, 20) for _ in range(12)]
        means.append(intervals.mean([rng.gauss(3, 1) for _ in range(12)]))
        quotients.append(intervals.quotient([rng.gauss(3 * size, 2) for size in sizes], sizes))
    for found in (means, quotients):
        assert 0.92 <= statistics.fmean(m.low <= 3 <= m.high for m in found) <= 0.98


def test_too_few_values_have_no_interval():
    assert intervals.median([1.0] * 5).low is None
    assert intervals.mean([1.0]).low is None
    assert intervals.width(intervals.median([1.0] * 5)) == math.inf


# Perplexity and distance


def test_uniform_logits_have_the_vocabulary_as_perplexity(run):
    run.model.lm_head.weight.data.zero_()
    reading = perplexity.take(run, {"window": 32, "text_tokens": 320})
    metric = reading.metrics["token_ppl"]
    assert metric.value == pytest.approx(320, rel=1e-5)
    assert metric.n == 10 == len(reading.samples["token_ppl_window_nll"])
    name = reading.protocols["token_ppl"]
    for part in ("ppl.token", "window32", "stride32", "windows10", "first-of-window-unscored", "oneblock"):
        assert part in name
    assert run.data.protocol in name


def test_perplexity_is_the_transformers_loss(run):
    reading = perplexity.take(run, {"window": 48})
    windows = run.data.ids[: len(run.data.ids) // 48 * 48].view(-1, 48)
    with torch.no_grad():
        loss = float(run.model(input_ids=windows, labels=windows).loss)
    metric = reading.metrics["token_ppl"]
    assert metric.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert metric.low < metric.value < metric.high


@pytest.mark.parametrize("stride", [1, 7, 24, 47])
@pytest.mark.parametrize("block", [None, 1])
def test_overlapping_windows_score_every_token_once(run, stride, block):
    settings = {"window": 48, "stride": stride, "text_tokens": 140, "score_block": block}
    reading = perplexity.take(run, settings)
    ids = run.data.ids[:140]
    values = []
    with torch.no_grad():  # every token that has 48 - stride tokens before it, in the last whole window that holds it
        for end in range(48, 141, stride):
            logits = run.model(ids[None, end - 48 : end]).logits[0].float().log_softmax(-1)
            values += [-float(logits[i - 1, ids[end - 48 + i]]) for i in range(48 - stride, 48)]
    assert len(values) == len(range(48, 141, stride)) * stride
    metric = reading.metrics["token_ppl"]
    assert metric.value == pytest.approx(math.exp(statistics.fmean(values)), rel=1e-5)
    assert metric.n == len(range(48, 141, stride)) and metric.low < metric.value < metric.high
    assert f"window48.stride{stride}.windows{metric.n}.last{stride}-of-window-scored" in reading.protocols["token_ppl"]


def test_distance_of_overlapping_windows_is_that_of_what_is_scored(run):
    run.model.lm_head.weight.data[7] += 0.5
    settings = {"window": 48, "stride": 8, "text_tokens": 80}
    kl = distance.take(run, settings).samples["kl_nats_per_token"]
    ids = run.data.ids[:80]
    with torch.no_grad():
        for number, value in enumerate(kl):
            window = ids[None, 8 * number : 8 * number + 48]
            theirs, ours = (model(window).logits[0, 39:47].log_softmax(-1) for model in (run.reference, run.model))
            assert value == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)
    assert len(kl) == 5
    own = {"token_ppl_window_nll": perplexity.take(run, settings).samples["token_ppl_window_nll"]}
    run._shared.clear()
    assert perplexity.take(run, settings).samples == own


def test_a_stride_of_the_window_is_the_default_and_a_longer_one_is_unsupported(run):
    assert perplexity.take(run, {"window": 48, "stride": 48}).samples == perplexity.take(run, {"window": 48}).samples
    with pytest.raises(Unsupported, match="the stride is 49 tokens, the window 48"):
        perplexity.take(run, {"window": 48, "stride": 49})


def test_data_of_a_paper_bring_their_window_and_are_measured_whole(run, tokenizer):
    run.data = Texts(tokenizer, TEXT * 4)
    run.data.ids = run.data.ids.repeat(-(-inputs.TEXT_TOKENS // len(run.data.ids)) + 1)
    run.data.window = 2048
    whole = perplexity.take(run, {"window": None}).protocols["token_ppl"]
    assert f"window96.stride96.windows{len(run.data.ids) // 96}." in whole
    assert "window32" in perplexity.take(run, {"window": 32, "text_tokens": 320}).protocols["token_ppl"]
    run.data.window = 64
    assert f"window64.stride64.windows{len(run.data.ids) // 64}." in perplexity.take(run, {}).protocols["token_ppl"]


def test_text_shorter_than_the_window_is_unsupported(run):
    run.data.ids = run.data.ids[:20]
    with pytest.raises(Unsupported, match="held-out text has 20 tokens, the window 96: "):
        perplexity.take(run, {})
    with pytest.raises(Unsupported, match="the window is 200 tokens, the model takes 2 to 96"):
        perplexity.take(run, {"window": 200})
    with pytest.raises(Unsupported, match="text_tokens is 50, the window 96 tokens"):
        distance.take(run, {"text_tokens": 50})


def test_quality_of_random_shapes_is_refused_and_needs_a_tokenizer(run):
    for probe in (quality, perplexity, distance):
        run.source.kind = "shape"
        with pytest.raises(Refused, match="random weights"):
            probe.take(run, {})
        run.source.kind, run.tokenizer = "folder", None
        with pytest.raises(Unsupported, match="tokenizer"):
            probe.take(run, {})


def test_numbers_that_are_not_finite_are_diverged(run):
    run.model.lm_head.weight.data[0, 0] = math.nan
    for probe in (perplexity, distance):
        with pytest.raises(Diverged, match="windows"):
            probe.take(run, {"window": 32, "limit": 4})


@pytest.mark.parametrize("steps", ["h2o(budget=6)", "kv_quant(key_bits=2,value_bits=2)", "sliding_window(window=5)"])
def test_a_streaming_cache_is_scored_token_by_token(run, steps):
    """Both models read the second half of each window behind its first, which is a prompt."""
    run.infer = under(steps)
    assert inputs.score_block(run, {}) == (1, "block1")
    assert inputs.score_block(run, {"score_block": 8}) == (8, "block8")
    reading = distance.take(run, {"window": 32, "limit": 4})
    text = inputs.windows(run, {"window": 32, "limit": 4})
    pairs = [(ids[:16], ids[16:]) for ids in text.ids.tolist()]
    models = (Engine(run.reference, InferPlan()), Engine(run.model, run.infer))
    p, q = (torch.cat(engine.predict(pairs)).double().log_softmax(-1) for engine in models)
    truth = float((p.exp() * (p - q)).sum(-1).mean())
    assert reading.metrics["kl_nats_per_token"].value == pytest.approx(truth, rel=1e-3)
    assert {"block1", "last16-of-window-scored"} <= {*re.split(r"[. ]", reading.protocols["kl_nats_per_token"])}


def test_a_cache_that_met_nothing_is_refused(run):
    """Neither distance nor perplexity gives the plain model's number in the name of a method that never acted."""
    run.infer = under("h2o(budget=90)")
    for probe in (distance, perplexity):
        with pytest.raises(Refused, match="changed nothing of what was measured"):
            probe.take(run, {"window": 32, "limit": 4})


def under(steps):
    """The plan of inference under a recipe."""
    toy = toy_run()
    for step in parse(steps).steps:
        toy.apply(step)
    return toy.infer


def test_distance_of_a_model_to_itself_is_zero(run):
    reading = distance.take(run, {"window": 32, "limit": 20})
    assert reading.metrics["kl_nats_per_token"].value == 0.0
    assert reading.metrics["flips"].value == 0.0
    assert reading.metrics["top1_agreement"].value == 1.0


def test_distance_of_a_planted_shift_is_its_closed_form(run):
    run.reference.lm_head.weight.data.zero_()  # uniform
    bias = torch.linspace(-2, 2, 320)
    run.model.lm_head = nn.Linear(64, 320)
    run.model.lm_head.weight.data.zero_()
    run.model.lm_head.bias.data = bias
    reading = distance.take(run, {"window": 32, "limit": 20})
    truth = -math.log(320) - float(bias.double().log_softmax(0).mean())
    assert reading.metrics["kl_nats_per_token"].value == pytest.approx(truth, rel=1e-5)
    assert reading.metrics["flips"].value == 1.0  # from the first to the last token of the vocabulary


def test_perplexity_after_distance_is_the_same_without_another_pass(run, monkeypatch):
    settings = {"window": 32, "limit": 20}
    alone = perplexity.take(run, settings).samples
    again = distance.take(run, settings)  # in either order: the likelihoods are known already
    run._shared.clear()
    assert distance.take(run, settings).samples == again.samples
    monkeypatch.setattr(Engine, "hidden", None)
    assert perplexity.take(run, settings).samples == alone
    with pytest.raises(TypeError):  # other windows are other numbers
        perplexity.take(run, settings | {"window": 16})


def test_comparison_with_impossible_tokens():
    torch.manual_seed(0)
    p, q = torch.randn(50, 30), torch.randn(50, 30)
    p[:, 3] = q[:, 3] = -math.inf
    whole = distance.compare(p, q)
    keep = [i for i in range(30) if i != 3]
    truth = nn.functional.kl_div(
        q[:, keep].double().log_softmax(1), p[:, keep].double().softmax(1), reduction="none"
    ).sum(1)
    torch.testing.assert_close(whole[0], truth, rtol=1e-4, atol=1e-6)


# The lm-eval adapter


def requests(kind, arguments, name="t"):
    return [
        SimpleNamespace(args=args, task_name=name, request_type=kind, doc={}, doc_id=number)
        for number, args in enumerate(arguments)
    ]


PAIRS = [
    ("The king of York gave", " bread"),
    ("The", " fox of Rome gave gold to the river."),
    ("", "The child"),
    ("The baker of Oslo gave a song to ", "the birds"),  # the trailing space belongs to the continuation
    (TEXT[:900], " nothing to the town"),  # longer than the model: cut from the left
]


def test_adapter_scores_as_transformers_does(run):
    lm = quality.EngineLM(run, {})
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    alone = [lm.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)[0] for pair in PAIRS]
    for (context, continuation), (logprob, greedy), single in zip(PAIRS, found, alone, strict=True):
        ids = run.tokenizer.encode(context + continuation)
        start = len(run.tokenizer.encode(context.rstrip()))
        if not context:
            ids, start = [0, *ids], 1
        scored = len(ids) - start
        ids = torch.tensor([ids[-open_engine(run).max_length - 1 :]])
        with torch.no_grad():
            rows = run.model(input_ids=ids[:, :-1]).logits.log_softmax(-1)[0, -scored:]
        truth = float(rows.gather(1, ids[0, -scored:, None]).sum())
        assert logprob == pytest.approx(truth, abs=2e-4)
        assert greedy == bool((rows.argmax(-1) == ids[0, -scored:]).all())
        assert single[0] == pytest.approx(logprob, abs=2e-4)
    streamed = quality.EngineLM(run, {"score_block": 1})
    again = streamed.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [row[0] for row in again] == pytest.approx([row[0] for row in found], abs=2e-4)
    assert lm.met["t"].cut == {4, 0}  # in company and alone


def test_adapter_agrees_with_lm_evals_own_model(run):
    HFLM = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError).HFLM  # needs accelerate
    lm = quality.EngineLM(run, {})
    with quality.quiet():
        own = HFLM(pretrained=run.model, tokenizer=run.tokenizer, backend="causal", batch_size=2, max_length=96)
        args = requests("loglikelihood", PAIRS)
        scores = own.loglikelihood(args, disable_tqdm=True)
        texts = requests("loglikelihood_rolling", [(TEXT[:2000],), ("The fox",)])
        rolling = own.loglikelihood_rolling(texts, disable_tqdm=True)
        asked = [(context, {"until": ["."], "max_gen_toks": 24}) for context, _ in PAIRS if context]
        asked += [("The fox of", {"until": ["\n", " to"], "max_gen_toks": 7, "do_sample": False})]
        answers = own.generate_until(requests("generate_until", asked), disable_tqdm=True)
    ours = lm.loglikelihood(args, disable_tqdm=True)
    assert [row[0] for row in ours] == pytest.approx([row[0] for row in scores], abs=2e-4)
    assert [row[1] for row in ours] == [row[1] for row in scores]
    assert lm.loglikelihood_rolling(texts) == pytest.approx(rolling, rel=1e-5)
    assert lm.generate_until(requests("generate_until", asked)) == answers
    assert lm.generation["t"].startswith("greedy, at most")


def test_sampling_tasks_are_refused(run):
    lm = quality.EngineLM(run, {})
    with pytest.raises(Refused, match="greedy"):
        lm.generate_until(requests("generate_until", [("a", {"do_sample": True, "temperature": 1.0})]))


@pytest.fixture
def tasks(tmp_path):
    names = ("bread", "gold", "a song", "nothing")
    rows = [
        {"q": f"The {who} of {where} gave", "choices": [f" {name}" for name in names], "label": i % 4}
        for i, (who, where) in enumerate((a, b) for a in ("king", "baker", "fox") for b in ("York", "Rome", "Oslo"))
    ]
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.py").write_text(
        "import json\nfrom datasets import Dataset, DatasetDict\n\n\n"
        "def load(**options):\n"
        f"    rows = [json.loads(line) for line in open({str(data)!r})]\n"
        "    return DatasetDict(test=Dataset.from_list(rows))\n"
    )
    common = "custom_dataset: !function rows.load\ntest_split: test\nmetadata: {version: 2.0}\n"
    means = "  - metric: %s\n    aggregation: %s\n    higher_is_better: true\n"
    bodies = {
        "choice": 'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: label\ntarget_delimiter: ""\nmetric_list:\n' + means % ("acc", "mean"),
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'
        + "metric_list:\n"
        + means % ("word_perplexity", "weighted_perplexity")
        + means % ("bits_per_byte", "bits_per_byte"),
        "answer": 'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{choices[label]}}"\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 4}\nmetric_list:\n' + means % ("exact_match", "mean"),
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\ntag: few\n{common}{body}")
    return tmp_path, rows


def test_quality_keeps_every_item(run, tasks):
    folder, rows = tasks
    run.data.tasks, run.data.task_paths = ("few",), (folder,)
    reading = quality.take(run, {})
    hits, sums, sizes = [], [], []
    for row in rows:
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([run.tokenizer.encode(row["q"] + choice)])
            start = len(run.tokenizer.encode(row["q"]))
            with torch.no_grad():
                rows_ = run.model(input_ids=ids).logits.log_softmax(-1)[0, start - 1 : -1]
            scores.append(float(rows_.gather(1, ids[0, start:, None]).sum()))
        hits.append(int(max(range(4), key=scores.__getitem__) == row["label"]))
        ids = torch.tensor([[0, *run.tokenizer.encode(row["q"])]])
        with torch.no_grad():
            rows_ = run.model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        sums.append(float(rows_.gather(1, ids[0, 1:, None]).sum()))
        sizes.append(len(row["q"].split()))
    assert reading.samples["choice_acc"] == hits
    assert reading.metrics["choice_acc"] == intervals.fraction(hits)
    assert [pair[0] for pair in reading.samples["rolling_word_ppl"]] == pytest.approx(sums, abs=1e-3)
    ppl = reading.metrics["rolling_word_ppl"]
    assert ppl.value == pytest.approx(math.exp(-sum(sums) / sum(sizes)), rel=1e-4)
    assert ppl.low < ppl.value < ppl.high
    bits = reading.metrics["rolling_bits_per_byte"]
    assert bits.value == pytest.approx(-sum(sums) / math.log(2) / sum(len(row["q"]) for row in rows), rel=1e-4)
    both = (reading.metrics["choice_acc"].value + reading.metrics["answer_exact_match"].value) / 2
    assert reading.metrics["tasks_acc"].value == pytest.approx(both)
    assert reading.metrics["tasks_acc"].n == 18
    assert "choice v2.0, 0-shot" in reading.protocols["choice_acc"]
    assert "9 of 9 items" in reading.protocols["choice_acc"]
    assert "greedy, at most 4 tokens, until ['.'] or EOS" in reading.protocols["answer_exact_match"]
    assert json.dumps(reading.samples)

    few = quality.take(run, {"tasks": ["choice"], "limit": 4})
    assert few.samples == {"choice_acc": hits[:4]}


def test_an_unknown_task_is_named(tasks, monkeypatch):
    manager = names.TaskManager
    monkeypatch.setattr(names, "TaskManager", lambda include_path, **_: manager(None, include_path, False))
    with pytest.raises(Unsupported, match="did you mean 'choice'"):
        quality.load(["choise"], [tasks[0]])


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub"), "unavailable"),
        (ModuleNotFoundError("No module named 'sacrebleu'"), "unavailable"),
        (OSError(errno.ENOSPC, "No space left on device"), "crashed"),
        (FileNotFoundError("items.jsonl"), "unsupported"),
    ],
)
def test_a_task_out_of_reach_costs_itself_alone(run, tasks, monkeypatch, error, outcome):
    run.data.task_paths = [tasks[0]]
    alone = quality.take(run, {"tasks": ["choice"], "limit": 4})
    whole = names.TaskManager.load

    def load(manager, wanted):
        if wanted == ["answer"]:
            raise error
        return whole(manager, wanted)

    monkeypatch.setattr(names.TaskManager, "load", load)
    reading = quality.take(run, {"tasks": ["answer", "choice"], "limit": 4})
    assert reading.samples == alone.samples and set(reading.metrics) == {"choice_acc"}
    findings = Findings(lambda **_: None, "cpu")
    findings.enter("quality")
    findings.add(reading)
    assert findings.outcome == outcome and set(findings.metrics) == {"choice_acc"}
    assert "answer" in findings.reason or outcome == "crashed"
    nothing = quality.take(run, {"tasks": ["answer"]})
    assert not nothing.metrics and len(nothing.failures) == 1


def test_data_without_tasks_has_no_task_metrics(run):
    assert quality.take(run, {}).metrics == {}


# Memory


def test_a_planted_allocation_is_read():
    code = (
        "import torch; from effbench.machine.peak import PeakMemory\n"
        "found = []\n"
        "for mib in (100, 100, 25):\n"
        "    with PeakMemory(torch.device('cpu')) as peak:\n"
        "        torch.ones(mib * 2**18)\n"
        "    found.append(peak.bytes['rss'] / 2**20)\n"
        "print(*found)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for planted, read in zip((100, 100, 25), map(float, out.split()), strict=True):
        assert read == pytest.approx(planted, rel=0.15)


def test_where_the_mark_cannot_be_reset_nothing_is_read(monkeypatch):
    monkeypatch.setattr(peak, "_CLEAR", Path("/nowhere/clear_refs"))
    with peak.PeakMemory(torch.device("cpu")) as found:
        pass
    assert found.bytes == {}


@pytest.mark.parametrize("tied", [False, True])
def test_stored_bytes_are_those_of_the_file(tokenizer, tmp_path, tied):
    from safetensors.torch import load_file

    run = make_run(tokenizer, reference=llama(tied=tied))
    copy.deepcopy(run.model).bfloat16().save_pretrained(tmp_path)
    file = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values())
    reading = memory.take(run, {"memory_context": 32, "memory_batch": 2, "memory_new_tokens": 4})
    values = {name: metric.value for name, metric in reading.metrics.items()}
    assert values["stored_bytes"] == values["weight_bytes"] == values["reference_bytes"] == file
    assert values["metadata_bytes"] == 0 and values["compression"] == 1.0
    assert values["bits_per_weight"] == 16.0 and values["model_bits_per_weight"] == 16.0
    assert values["resident_bytes"] >= 2 * file
    assert {"score_peak_rss_bytes", "generate_peak_rss_bytes"} <= set(values)


def test_metadata_is_told_apart(run, tmp_path):
    for layer in run.model.model.layers:
        weight = layer.mlp.up_proj.weight.detach()
        layer.mlp.up_proj = MaskedLinear.of(weight, weight > 0)
    stored, plain = (stored_bytes(model, torch.bfloat16) for model in (run.model, run.reference))
    assert stored.weights == plain.weights
    assert stored.metadata == 2 * 128 * 64 // 8
    assert memory.bits_per_weight(run.model, torch.bfloat16) == (17.0, {"linears": 2, "compressed": True})
    assert sum(stored) == artifact.save(run.model, tmp_path / "saved", torch.bfloat16)


@pytest.mark.parametrize("tied", [False, True])
def test_zeros_are_counted_in_linears_and_in_all_parameters(tokenizer, tied):
    run = make_run(tokenizer, reference=llama(tied=tied))
    model, embedding = run.model, run.model.get_input_embeddings().weight
    assert measure_sparsity(model) == (0.0, 0.0)
    linears = [module for path, module in top_linears(model) if path != "lm_head"]
    for module in linears:
        module.weight.data[:, ::4] = 0
    embedding.data[:8] = 0
    model.model.norm.weight.data[0] = 0
    linear_zeros, size = (sum(m.weight.numel() for m in linears) // n for n in (4, 1))
    total = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
    assert measure_sparsity(model).linears == linear_zeros / size
    assert measure_sparsity(model).model == (linear_zeros + 8 * embedding.shape[1] + 1) / total
    module = linears[0]
    replace(
        model,
        next(iter(top_linears(model)))[0],
        PrunedLinear.of(module.weight, module.weight != 0).pack(torch.bfloat16),
    )
    assert measure_sparsity(model).linears == linear_zeros / size  # packed ones by what they compute with


@pytest.mark.parametrize(
    ("steps", "asked"),
    [("", None), ("rtn(bits=2)", None), ("wanda()", 0.5), ("magnitude(sparsity=0.3), wanda(), rtn(bits=8)", 0.5)],
)
def test_sparsity_is_measured_beside_what_was_asked_for(steps, asked):
    run = toy_run()
    for step in parse(steps).steps:
        run.apply(step)
    run.finish(recipe_is_empty=not steps)
    metrics = memory.take(run, {"memory_context": 8, "memory_batch": 1, "memory_new_tokens": 1}).metrics
    assert (metrics["sparsity_asked"].value if "sparsity_asked" in metrics else None) == asked
    found = metrics["sparsity"].value
    assert found == 0 if not steps else found > 0.2 if asked is None else abs(found - asked) < 0.01
    assert 0 <= metrics["model_sparsity"].value <= found


# Speed


class Sleepy(Engine):
    """An engine that takes as long as it says, by a planted clock; the reference takes twice that."""

    now: ClassVar[float] = 0.0

    def prefill(self, ids, padding=None):
        Sleepy.now += 0.03 if self.model.training else 0.06
        return SimpleNamespace(ids=ids[:, -1], length=ids.shape[1])

    def decode(self, state):
        Sleepy.now += 0.01 if self.model.training else 0.02
        return state

    @classmethod
    def timed(cls, work, device):
        begin = cls.now
        work()
        return Span(cls.now - begin, cls.now - begin)


def test_the_clock_measures_the_work_it_is_given():
    span = clock.timed(lambda: time.sleep(0.02), torch.device("cpu"))
    assert span.device == span.wall >= 0.02 and span.per(4).wall == span.wall / 4


def test_planted_delays_are_read(tokenizer, monkeypatch):
    monkeypatch.setattr(speed, "timed", Sleepy.timed)
    monkeypatch.setattr(
        speed, "open_engine", lambda run, model=None: Sleepy(run.model if model is None else model, InferPlan())
    )
    run = make_run(tokenizer)
    run.model.train()  # only to tell the two apart
    settings = {"speed_points": [[2, 16]], "speed_new_tokens": 3, "speed_seconds": 1.6}
    reading = speed.take(run, settings)
    values = {name: metric.value for name, metric in reading.metrics.items()}
    assert values["prefill_tok_per_s_b2_c16"] == pytest.approx(32 / 0.03)
    assert values["decode_tok_per_s_b2_c16"] == pytest.approx(2 / 0.01)
    assert values["decode_ms_per_token_b2_c16"] == pytest.approx(10)
    assert values["prefill_speedup_b2_c16"] == pytest.approx(2)
    assert values["decode_speedup_b2_c16"] == pytest.approx(2)
    rounds = len(reading.samples["prefill_seconds_b2_c16"])
    assert rounds == len(reading.samples["prefill_reference_seconds_b2_c16"]) >= 6
    speedup = reading.metrics["prefill_speedup_b2_c16"]
    assert speedup.n == rounds and speedup.findings["warm_up_calls"] == 2
    assert "within 2% or 0.8 s are over" in reading.protocols["prefill_speedup_b2_c16"]
    tail = values["decode_floor_ms_per_token_b2_c16"] / values["decode_ms_per_token_b2_c16"]
    assert values["decode_percent_of_bandwidth_b2_c16"] == pytest.approx(100 * tail)


def test_a_real_model_is_timed_and_default_points_fit_it(run):
    reading = speed.take(run, {"speed_seconds": 0.2, "speed_new_tokens": 8})
    assert {"prefill_speedup_b1_c88", "decode_speedup_b8_c88"} <= set(reading.metrics)
    with pytest.raises(Unsupported, match="96 positions"):
        speed.take(run, {"speed_points": [[1, 90]]})


def test_same_against_same_is_one():
    """The clock is planted too: noise, outliers and a drift that would fool measuring one after the other."""
    rng = random.Random(1)

    def trial() -> speed.Paired:
        now = 0.0

        def call() -> Span:
            nonlocal now
            took = 0.01 * (1 + 0.2 * now) * rng.lognormvariate(0, 0.1) * (3 if rng.random() < 0.05 else 1)
            now += took
            return Span(took, took)

        return speed.paired(call, call, 1.0, clock=lambda: now)

    ratios = [intervals.median(trial().ratios()) for _ in range(150)]
    assert statistics.fmean(m.low <= 1 <= m.high for m in ratios) >= 0.93
    assert statistics.fmean(m.value for m in ratios) == pytest.approx(1, abs=0.01)


def test_timing_stops_when_narrow_and_gives_up_when_slow():
    now = 0.0

    def call(seconds: float):
        def work() -> Span:
            nonlocal now
            now += seconds
            return Span(seconds, seconds)

        return work

    steady = speed.paired(call(0.01), call(0.02), 10.0, clock=lambda: now)
    assert len(steady.model) == speed.LEAST and not steady.findings["capped"]
    assert steady.findings["ratio_interval"] <= speed.NARROW
    slow = speed.paired(call(5.0), call(5.0), 1.0, clock=lambda: now)
    assert len(slow.model) == 2 and slow.findings["capped"] and "ratio_interval" not in slow.findings


def test_warm_up_lasts_until_calls_stop_getting_faster():
    times = [1.0, 0.5, 0.25, 0.12, 0.1, *[0.1] * 100]
    calls = iter(times)
    found = speed.paired(lambda: Span(next(calls), 9), lambda: Span(0.1, 9), 100.0, clock=lambda: 0.0)
    assert (found.findings["warm_up_calls"], found.findings["reference_warm_up_calls"]) == (6, 2)
    assert set(found.seconds()) == {0.1}


def test_tables_of_the_input_are_not_read_by_decoding():
    plain, tied = llama(), llama(tied=True)
    buffers = sum(b.numel() * b.element_size() for b in plain.buffers())
    linears = sum(m.weight.numel() for m in plain.modules() if isinstance(m, nn.Linear))
    norms = 5 * 64
    assert speed.decode_weight_bytes(plain) == speed.decode_weight_bytes(tied) == 4 * (linears + norms) + buffers
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=96, n_embd=64, n_layer=1, n_head=4))
    stored = sum(parameter.numel() for parameter in gpt2.parameters())
    assert speed.decode_weight_bytes(gpt2) == 4 * (stored - 96 * 64)


# FLOPs, energy, cost, environment


def test_flops_are_their_closed_form(run):
    metrics = flops.take(run, {"flops_context": 32}).metrics
    linears = sum(m.weight.numel() for m in run.model.modules() if isinstance(m, nn.Linear))
    attention = 2 * (2 * 2 * 32 * 64)  # layers x (QK^T, PV) x 2 x context x width, per token
    rotary = 2 * 16 // 2  # the outer product of positions and frequencies
    assert metrics["flops_2d"].value == 2 * linears
    assert metrics["score_flops_per_token_c32"].value == pytest.approx(2 * linears + attention, abs=2 * rotary)
    more = attention * 33 / 32
    assert metrics["decode_flops_per_token_c32"].value == pytest.approx(2 * linears + more, abs=2 * rotary)


def test_linear_part_is_counted_exactly():
    layer, x = nn.Linear(48, 24, bias=False), torch.randn(7, 48)
    with torch.inference_mode():
        assert count_flops(lambda: layer(x)) == 2 * 48 * 24 * 7


def test_an_op_without_a_formula_is_not_free():
    @torch.library.custom_op("probe_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with pytest.raises(Unsupported, match=r"probe_test\.double"):
        count_flops(lambda: double(torch.ones(3)))


def test_energy_of_a_planted_power():
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 0.7

    joules, seconds, calls = energy.window(lambda: 90 * now, work, lambda: None, 5.0, clock=lambda: now)
    assert seconds >= 5 and calls == 8
    assert joules / seconds == pytest.approx(90)


def test_without_a_counter_there_is_no_energy(run):
    assert nvml.energy_joules(torch.device("cpu")) is None
    assert energy.take(run, {}).metrics == {}


def test_cost_is_read_from_the_log(run):
    metrics = probes.take("cost", run, {}).metrics
    assert metrics["apply_seconds"].value == 0 and "apply_peak_rss_bytes" not in metrics
    run.log.calibration_tokens = 4096
    run.log.steps = [
        {"step": "gptq(bits=4)", "seconds": 2.5, "peaks": {"rss": 7_000}},
        {"step": "fit(steps=1)", "seconds": 1.0, "peaks": {"rss": 9_000}},
    ]
    reading = probes.take("cost", run, {})
    values = {name: metric.value for name, metric in reading.metrics.items()}
    assert values == {"apply_seconds": 3.5, "apply_peak_rss_bytes": 9_000, "calibration_tokens": 4096}
    assert "gptq" not in "".join(reading.protocols.values())


def test_environment_names_the_machine_but_not_the_host():
    facts = environment.describe()
    assert {"python", "platform", "cpu", "cores", "memory_bytes", "threads", "packages", "machine"} <= set(facts)
    assert {"torch", "transformers", "lm_eval", "numpy", "tokenizers", "datasets", "effbench"} <= set(facts["packages"])
    host = platform.node()
    assert not host or not re.search(rf"\b{re.escape(host)}\b", json.dumps(facts))
    assert facts["machine"].endswith(f"{facts['cores']}core")
    assert re.fullmatch(r"[0-9a-f]{12}", facts["host"])
    if "commit" in facts:
        assert len(facts["commit"]) == 40 and isinstance(facts["dirty"], bool)


@pytest.mark.parametrize(
    ("target", "value", "differs"),
    [
        ("platform.node", "elsewhere", True),
        ("platform.release", "9.9.9", True),
        ("effbench.machine.environment.cpu_model", "Other CPU", True),
        ("effbench.machine.environment.usable_cores", 77, True),
        ("effbench.machine.environment.memory_bytes", 2**50, True),
        ("effbench.machine.environment._content", "another id", True),
        ("platform.python_version", "3.99", False),  # what is installed is not the host
    ],
)
def test_hosts_are_told_apart(target, value, differs, monkeypatch):
    monkeypatch.setattr(environment, "CONTAINERS", ())
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    fingerprint = environment.host.__wrapped__
    here = fingerprint()
    assert here == fingerprint()
    monkeypatch.setattr(target, lambda *_: value)
    assert (fingerprint() != here) == differs


def test_a_container_that_starts_anew_is_the_same_host(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "CONTAINERS", (str(tmp_path),))
    here = environment.host.__wrapped__()
    monkeypatch.setattr("platform.node", lambda: "0f1e2d3c4b5a")
    assert environment.host.__wrapped__() == here


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC 2core", "amd-epyc-2core"),
        ("AMD EPYC 9654 96-Core Processor 8core", "amd-epyc-9654-8core"),
        ("Intel(R) Xeon(R) CPU E5-2690 v4 @ 2.60GHz 4core", "intel-xeon-e5-2690-v4-4core"),
        ("NVIDIA H200", "nvidia-h200"),
    ],
)
def test_machine_slugs(name, slug):
    assert environment.slug(name) == slug


# Training


@pytest.mark.parametrize(
    ("steps", "trained", "frozen"),
    [
        ("", "all", 0),
        ("nf4(), lora(rank=4)", "lora", "all"),  # its codes are no parameters
        ("prompt_tuning(length=4)", "soft", "all"),
        ("student(layers=1)", "all", 0),
    ],
)
def test_the_rule_counts_what_is_trained_and_what_is_frozen(steps, trained, frozen):
    run = toy_run()
    for step in parse(steps).steps:
        run.apply(step)
    shapes = toy(layers=len(Blocks(run.model)))
    whole = sum(parameter.numel() for parameter in shapes.parameters())
    linears = [(module.in_features, module.out_features) for _, module in Blocks(shapes).linears()]
    number = {"all": whole, "lora": sum(4 * sum(sides) for sides in linears), "soft": 4 * 128}[trained]
    fit(run, dataclasses.replace(FIT, steps=7))
    found = {name: metric.value for name, metric in training.take(run, {}).metrics.items()}
    assert found["fit_trained_parameters"] == number
    assert found["fit_trained_share"] == pytest.approx(number / sum(p.numel() for p in toy().parameters()))
    assert found["fit_flops_rule"] == 6 * number + 4 * (whole if frozen == "all" else 0)


def test_bytes_and_messages_of_a_process_are_shown() -> None:
    run = toy_run()
    fit(run, dataclasses.replace(FIT, steps=7))
    whole = sum(parameter.nbytes for parameter in run.model.parameters())
    cost = run.log.fits[-1]["cost"]
    assert cost["rule_bytes"] == 4 * whole and "collectives" not in cost
    cost["collectives"] = {"all_reduce": {"calls": 3, "bytes": 36}}
    found = {name: metric.value for name, metric in training.take(run, {}).metrics.items()}
    assert found["fit_rule_bytes"] == 4 * whole and found["fit_parameter_bytes"] == found["fit_gradient_bytes"] == whole
    assert found["fit_comm_all_reduce_calls"] == 3 and found["fit_comm_all_reduce_bytes"] == 36
