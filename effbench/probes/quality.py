"""Quality by lm-eval, through the inference plan: tasks see the model with the cache it really has.

lm-eval's response cache is never used: its key does not name the model.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from effbench.core.errors import Diverged, Refused, Unsupported
from effbench.core.method import Part
from effbench.nn.files.checkpoint import stop_ids
from effbench.nn.infer.engine import Use, open_engine
from effbench.nn.infer.memory import Tokens
from effbench.probes import Reading
from effbench.probes.inputs import require_effect, require_quality, score_block
from effbench.probes.lm_tasks import load, quiet
from effbench.probes.prompts import Ask, EvictAt, open_asker
from effbench.records.metric import Finding, Metric
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.infer.engine import Engine
    from effbench.nn.run import ModelRun


GENERATED = 16  # prompts in one batch
PERPLEXITIES = {  # metric of lm-eval: our name, what its mean becomes
    "word_perplexity": ("word_ppl", lambda mean: intervals.exp(-mean)),
    "byte_perplexity": ("byte_ppl", lambda mean: intervals.exp(-mean)),
    "bits_per_byte": ("bits_per_byte", lambda mean: -mean / math.log(2)),
    "perplexity": ("ppl", lambda mean: intervals.exp(-mean)),
}
PENALTIES = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens")
OWN = ("acc", "acc_norm", "exact_match", "f1", "mcc")  # of lm-eval, under its name; others are said to be lm-eval's
HEADLINE = ("acc", "exact_match")  # what counts as a task's accuracy, first found

QUALITY = True
TASK = True
SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`<task>_<metric>` for every task of the setting `tasks` (default: the data's own), and `tasks_acc`.

    The setting `limit` takes the first items of every task, so that recipes stay comparable item by item; the
    samples hold the results in the order of the items. A task whose data cannot be had is a failure of the reading, and
    costs its own numbers and `tasks_acc`. So is a task in which nothing that was scored met what the plan changes; it
    keeps its numbers, is marked, and counts for no mean. Where that is so of all, raises `Refused`.
    """
    require_quality(run)
    wanted = list(settings.get("tasks") or run.data.tasks)
    reading = Reading()
    if not wanted:
        return reading
    lm, evaluated, failures = score_tasks(run, settings, wanted)
    reading.failures = [*failures]
    if not lm.tasks:
        return reading
    width = str(next(run.model.parameters()).dtype).removeprefix("torch.")
    require_effect(run, run.infer.touches)
    exercised = [name for name in sorted(lm.tasks) if lm.met[name].exercised(run.infer.touches)]
    for name, task in sorted(lm.tasks.items()):
        how = f"lm-eval {metadata.version('lm_eval')}, {width}, {lm.protocol(task)}"
        items, met = evaluated["samples"][name], lm.met[name]
        findings: dict[str, Finding] = {"cut_contexts": len(met.cut)} if met.cut else {}
        if name not in exercised:
            findings["not_exercised"] = True
        _report(reading, name, task, items, evaluated["results"][name], how, findings, lm.suffix)
        _report_met(reading, name, met, how, through_cache=lm.block is not None)
        if met.cut:
            documents = sorted({int(item["doc_id"]) for item in items})
            reading.samples[f"{name}_cut"] = [int(number in met.cut) for number in documents]
    for part in ("cache_kept", "cache_bytes_per_token"):
        values = [reading.metrics[key].value for name in exercised if (key := f"{name}_{part}") in reading.metrics]
        if values:
            reading.add(part, statistics.fmean(values), f"mean over the tasks {', '.join(exercised)}, each alike")
    if not reading.failures:
        _mean(reading, exercised, lm.suffix, unmet=len(exercised) < len(lm.tasks))
    return reading


class Scored(NamedTuple):
    """What was made of tasks."""

    lm: EngineLM  # by which they were scored; knows what their items met
    evaluated: Mapping[str, Any]  # as lm-eval gives it; empty where no task is to be had
    failures: list[Exception]  # of tasks that are not


def score_tasks(run: ModelRun, settings: Mapping[str, Any], wanted: list[str]) -> Scored:
    """Tasks with the model of a run under its plan, once for all probes."""
    ways = map(settings.get, ("limit", "evict_at", "score_block", "chat_template"))
    return run.share(("tasks", *wanted, *ways), lambda: score_by(EngineLM(run, settings), run, settings, wanted))


def score_by(lm: EngineLM, run: ModelRun, settings: Mapping[str, Any], wanted: list[str]) -> Scored:
    """The first items of tasks, as many as the setting `limit` says."""
    with quiet():
        tasks, failures = load(wanted, run.data.task_paths)
        lm.tasks = tasks["tasks"]
        if not lm.tasks:
            return Scored(lm, {}, failures)
        limit = settings.get("limit")
        evaluated = evaluator.evaluate(
            lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True, apply_chat_template=lm.chats
        )
    return Scored(lm, evaluated, failures)


@dataclasses.dataclass
class Met:
    """What the items of one task met of a plan."""

    asks: dict[int, Ask] = dataclasses.field(default_factory=dict)  # prompts by document
    uses: list[Use] = dataclasses.field(default_factory=list)  # what scored and generated tokens were read from
    cut: set[int] = dataclasses.field(default_factory=set)  # documents whose prompt lost its beginning
    generated: bool = False

    def exercised(self, touched: frozenset[Part]) -> bool:
        """Whether anything that was scored or generated met one of the parts that a plan touches, if it touches any."""
        met = {
            "cache": any(use.changed for use in self.uses),
            "prompt": any(ask.shortened for ask in self.asks.values()),
            "decoder": self.generated,
        }
        met["attention"] = met["cache"]  # where keys are rotated to shows once some of them are gone
        return not touched or any(met[part] for part in touched)


class EngineLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of the engine of a run. Tokens are cut as lm-eval's own Hugging Face model cuts them."""

    def __init__(self, run: ModelRun, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.engine: Engine = open_engine(run)
        self.tokenizer = run.tokenizer
        self.block, self.spelled = score_block(run, settings)
        self.evict_at: EvictAt = settings.get("evict_at") or "prompt"
        self.tasks: Mapping[str, Any] = {}  # of lm-eval, by name
        self.met: dict[str, Met] = defaultdict(Met)
        self.generation: dict[str, str] = {}  # task: resolved settings of its generations
        self.chats = bool(settings.get("chat_template"))  # prompts are a user's turn, by the model's own template
        if self.chats and self.tokenizer.chat_template is None:
            raise Unsupported("chat_template: the model's tokenizer has none")
        if self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            raise Unsupported("the tokenizer has neither a BOS nor an EOS token to begin a text with")
        self.asker = open_asker(run, self.tok_encode, self.evict_at)

    @property
    def suffix(self) -> str:
        """What ends the names of metrics of another protocol than the usual one."""
        return "" if self.evict_at == "prompt" else f"_evict_at_{self.evict_at}"

    @property
    def eot_token_id(self) -> int:
        last = self.tokenizer.eos_token_id
        return int(self.tokenizer.bos_token_id if last is None else last)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if first is None else first)

    def protocol(self, task: Any) -> str:
        """How the items of a task were scored."""
        config = task.config
        words = [
            f"task {config.task} v{task.VERSION}",
            f"{config.num_fewshot}-shot",
            f"prefix token {self.tokenizer.convert_ids_to_tokens(self.prefix_token_id)}",
        ]
        if config.output_type == "generate_until":
            words.append(self.generation[config.task])
        else:
            words.append(self.spelled)
        if self.evict_at != "prompt":
            words.append(f"caches settle before the question (evict_at={self.evict_at})")
        if config.task in self.asker.whole:
            words.append("segments=whole")
        if config.output_type == "loglikelihood_rolling":
            words.append(f"windows of {self.engine.max_length}, one token of context, each text apart")
            words.append("every token of the text scored once, the prefix token never")
        elif self.chats:
            words.append("chat template of the model, prompts as a user's turn")
        return ", ".join(words)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as one prompt, by the model's own template."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        if add_special_tokens is None:
            opening = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not (opening and string.startswith(opening))
        # verbose=False: texts longer than the model are cut into windows, which needs no warning
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Scores of continuations, whose tokens are those behind the unchanged prompt."""
        asks: list[Ask] = []
        continuations: list[list[int]] = []
        for request in requests:
            prompt, continuation = request.args
            if prompt:
                asks.append(self._ask(request, prompt.rstrip()))  # white space goes to the continuation
                continuations.append(self._encode_pair(prompt, continuation)[1])
            else:
                first, *rest = self.tok_encode(continuation, add_special_tokens=False)
                begins = first == self.prefix_token_id
                asks.append(Ask([self.prefix_token_id], [self.prefix_token_id]))
                continuations.append(rest if begins else [first, *rest])
        longest: dict[tuple[str, int], int] = defaultdict(int)  # all choices of an item are cut alike
        owners = [(str(request.task_name), int(request.doc_id or 0)) for request in requests]
        for owner, ids in zip(owners, continuations, strict=True):
            longest[owner] = max(longest[owner], len(ids))
        pairs: list[tuple[Tokens, list[int]]] = []
        for owner, ask, ids in zip(owners, asks, continuations, strict=True):
            if not ids:
                raise Unsupported(f"{owner[0]}: a continuation of no tokens cannot be scored")
            pairs.append((self._cut(ask, longest[owner] - 1, *owner), ids))
        hold = [min(ask.hold, len(context)) for ask, (context, _) in zip(asks, pairs, strict=True)]
        scores = self.engine.score(pairs, block=self.block, hold=hold)
        for (name, _), use in zip(owners, self.engine.uses, strict=False):
            self.met[name].uses.append(use)
        return [(scored.logprob, scored.greedy) for scored in scores]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, **options: Any) -> Any:
        """Never asked: `loglikelihood` is overridden."""
        raise NotImplementedError

    def _ask(self, request: Any, prompt: str) -> Ask:
        """The prompt of a request as it is fed."""
        name = str(request.task_name)
        ask = self.asker.ask(name, self.tasks.get(name), request.doc, prompt)
        self.met[name].asks[int(request.doc_id or 0)] = ask
        return ask

    def _cut(self, ask: Ask, more: int, name: str, document: int) -> Tokens:
        """The last tokens of a prompt for which there are positions before `more` tokens."""
        if self.engine.room is None:
            return ask.ids
        room = self.engine.room - more
        if room < 1:
            raise Unsupported(f"{name}: {more + 1} tokens behind a prompt, the model has {self.engine.room} positions")
        if len(ask.ids) > room:
            self.met[name].cut.add(document)
        return ask.ids[-room:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Every token once, from windows of the model's full length; each text by itself.

        Where the tokenizer opens texts with the prefix token, it is context and not scored: lm-eval's own model scores
        it, as a token that follows itself.
        """
        pairs: list[tuple[list[int], list[int]]] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            if ids[:1] == [self.prefix_token_id]:
                del ids[0]
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.engine.max_length, 1)
            windows = [make_disjoint_window(window) for window in rolling]
            pairs += windows
            owner += [index] * len(windows)
        totals = [0.0] * len(requests)
        for index, scored in zip(owner, self.engine.score(pairs, block=self.block), strict=True):
            totals[index] += scored.logprob
        for index, use in zip(owner, self.engine.uses, strict=False):
            self.met[requests[index].task_name].uses.append(use)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuation up to the first stop string."""
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[tuple[int, Tokens, int]]] = defaultdict(list)
        for index, request in enumerate(requests):
            prompt, options = request.args
            options = normalize_gen_kwargs(options)
            if options["do_sample"]:
                raise Refused(f"task {request.task_name} samples its answers; only greedy decoding is repeatable")
            stops, longest = tuple(options["until"]), int(options["max_gen_toks"])
            ask = self._ask(request, prompt)
            ids = self._cut(ask, longest, request.task_name, int(request.doc_id or 0))
            groups[longest, stops].append((index, ids, min(ask.hold, len(ids))))
            how = f"greedy, at most {longest} tokens, until {list(stops)} or EOS{self._left_out}"
            self.generation[request.task_name] = how
            self.met[request.task_name].generated = True
        for (longest, stops), members in groups.items():
            members.sort(key=lambda member: len(member[1]))
            for start in range(0, len(members), GENERATED):
                part = members[start : start + GENERATED]
                hold = [held for _, _, held in part]
                made = self.engine.generate([ids for _, ids, _ in part], longest, self._stop_ids(stops), hold)
                for (index, _, _), ids in zip(part, made, strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    texts[index] = postprocess_generated_text(text, list(stops), None)
                for (index, _, _), use in zip(part, self.engine.uses, strict=False):
                    self.met[requests[index].task_name].uses.append(use)
                self.engine.progress("answer", start + len(part), len(members))
        return texts

    @property
    def _left_out(self) -> str:
        """What the checkpoint asks of generation beside sampling and is not done here, in words."""
        wanted = {name: getattr(self.engine.model.generation_config, name, None) for name in PENALTIES}
        given = [f"{name}={value}" for name, value in wanted.items() if value not in (None, 0, 1, [])]
        return f", without {', '.join(given)} of the checkpoint" if given else ""

    def _stop_ids(self, stops: Sequence[str]) -> set[int]:
        """EOS of tokenizer and checkpoint, and every token that by itself is a stop string."""
        ids = {self.eot_token_id} | stop_ids(self.engine.model)
        for stop in stops:
            single = self.tokenizer.encode(stop, add_special_tokens=False)
            if len(single) == 1 and self.tokenizer.decode(single) == stop:
                ids.add(single[0])
        return ids


def _report(
    reading: Reading,
    name: str,
    task: Any,
    items: list[dict[str, Any]],
    results: dict[str, Any],
    how: str,
    findings: Mapping[str, Finding],
    suffix: str,
) -> None:
    """Add every metric of a task, with its results per item, from what lm-eval says of the items and of the task."""
    filters = list(dict.fromkeys(item["filter"] for item in items))
    for chosen in filters:
        kept = sorted((item for item in items if item["filter"] == chosen), key=lambda item: int(item["doc_id"]))
        for metric in kept[0]["metrics"]:
            values = [item[metric] for item in kept]
            ours, scale = PERPLEXITIES.get(metric, (metric if metric in OWN else f"lm_eval_{metric}", None))
            key = f"{name}_{ours}" + ("" if chosen == filters[0] else f"_{chosen}") + suffix
            protocol = f"{how}, {len(kept)} of {len(task.eval_docs)} items, {metric}, filter {chosen}"
            plain = all(isinstance(value, (int, float)) for value in values)
            if scale is not None:
                sums = [value[0] if isinstance(value, tuple) else value for value in values]
                sizes = [value[1] if isinstance(value, tuple) else 1 for value in values]
                _finite(key, sums)
                reading.samples[key] = [list(pair) for pair in zip(sums, sizes, strict=True)]
                reading.add(key, intervals.quotient(sums, sizes, scale), protocol, findings)
            elif plain and task.aggregation()[metric].__name__ in ("mean", "nanmean"):
                numbers = [float(value) for value in values]
                _finite(key, numbers)
                reading.samples[key] = [int(value) if value in (0, 1) else value for value in numbers]
                binary = set(numbers) <= {0.0, 1.0}
                share = intervals.fraction(numbers) if binary else intervals.mean(numbers)
                reading.add(key, share, protocol, findings)
            elif isinstance(value := results.get(f"{metric},{chosen}"), (int, float)):
                # an aggregate that is no mean of its items: lm-eval's own value, without an interval
                reading.add(key, Metric(float(value), n=len(kept)), protocol, findings)


def _finite(key: str, values: Sequence[float]) -> None:
    lost = sum(not math.isfinite(value) for value in values)
    if lost:
        raise Diverged(f"{key} is not finite on {lost} of {len(values)} items")


def _report_met(reading: Reading, name: str, met: Met, how: str, through_cache: bool) -> None:
    """Add what the items of a task met: how much of prompts and caches was left."""
    asks = list(met.asks.values())
    if any(ask.shortened for ask in asks):
        kept = sum(ask.kept for ask in asks) / sum(len(ask.given) for ask in asks)
        reading.add(f"{name}_prompt_kept", Metric(kept, n=len(asks)), f"tokens of the prompts after over before; {how}")
    if met.uses and through_cache:
        what = f"where the last token was read, mean over what was scored; {how}"
        seen = sum(use.seen for use in met.uses)
        kept = sum(use.kept for use in met.uses) / len(met.uses)
        reading.add(f"{name}_cache_kept", Metric(kept, n=len(met.uses)), what)
        if seen:
            each = sum(use.nbytes for use in met.uses) / seen
            reading.add(f"{name}_cache_bytes_per_token", Metric(each, n=len(met.uses)), what)


def _mean(reading: Reading, tasks: Sequence[str], suffix: str, unmet: bool) -> None:
    """The plain mean of the tasks' accuracies, its variance from the items of each; `unmet` others are left out."""
    keys = [
        next(key for metric in HEADLINE if (key := f"{task}_{metric}{suffix}") in reading.samples)
        for task in tasks
        if any(f"{task}_{metric}{suffix}" in reading.samples for metric in HEADLINE)
    ]
    if not keys:
        return
    values = [reading.metrics[key] for key in keys]
    middle = sum(metric.value for metric in values) / len(keys)
    variance = sum(m.value * (1 - m.value) / (m.n or 1) for m in values) / len(keys) ** 2
    reach = intervals.Z * math.sqrt(variance)
    items = sum(metric.n or 0 for metric in values)
    mean = Metric(middle, max(0.0, middle - reach), min(1.0, middle + reach), items)
    reading.add(
        f"tasks_acc{suffix}",
        mean,
        f"mean, each task alike, of {', '.join(keys)}; normal interval over items",
        {"not_exercised": True} if unmet else {},
    )
