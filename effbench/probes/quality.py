"""Quality by lm-eval, through the inference plan: tasks see the model with the cache it really has.

lm-eval's response cache is never used: its key does not name the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from effbench.core.errors import Diverged, Refused, Unsupported, first_line
from effbench.core.usage import nearest
from effbench.core.views import Segments
from effbench.nn.files.checkpoint import stop_ids
from effbench.nn.infer.engine import open_engine
from effbench.probes import Reading
from effbench.probes.inputs import require_quality, score_block
from effbench.records.metric import Metric
from effbench.sources.tasks import index_tasks
from effbench.stats import intervals

if TYPE_CHECKING:
    from effbench.nn.infer.engine import Engine
    from effbench.nn.run import ModelRun


FEWSHOT_SEED = 1234  # lm-eval's own default
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


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`<task>_<metric>` for every task of the setting `tasks` (default: the data's own), and `tasks_acc`.

    The setting `limit` takes the first items of every task, so that recipes stay comparable item by item; the
    samples hold the results in the order of the items. A task whose data cannot be had is a failure of the reading, and
    costs its own numbers and `tasks_acc`.
    """
    require_quality(run)
    wanted = list(settings.get("tasks") or run.data.tasks)
    reading = Reading()
    if not wanted:
        return reading
    engine = open_engine(run)
    lm = EngineLM(engine, run.tokenizer, *score_block(run, settings))
    lm.rewrite = run.rewrite if run.infer.chain("prompt") else None
    lm.chats = bool(settings.get("chat_template"))
    if lm.chats and run.tokenizer.chat_template is None:
        raise Unsupported("chat_template: the model's tokenizer has none")
    with quiet():
        tasks, reading.failures = load(wanted, run.data.task_paths)
        if not tasks["tasks"]:
            return reading
        limit = settings.get("limit")
        evaluated = evaluator.evaluate(
            lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True, apply_chat_template=lm.chats
        )
    engine.verify()
    width = str(next(run.model.parameters()).dtype).removeprefix("torch.")
    findings = {"cut_contexts": lm.truncated} if lm.truncated else {}  # of all tasks together
    for name, task in sorted(tasks["tasks"].items()):
        how = f"lm-eval {metadata.version('lm_eval')}, {width}, {lm.protocol(task)}"
        _report(reading, name, task, evaluated["samples"][name], evaluated["results"][name], how, findings)
    if not reading.failures:
        _mean(reading, sorted(tasks["tasks"]))
    if lm.rewrites:
        before, after = (
            sum(len(lm.tok_encode(text)) for text in part) for part in zip(*lm.rewrites.items(), strict=True)
        )
        reading.add(
            "prompt_kept",
            Metric(after / before, n=len(lm.rewrites)),
            "tokens of all prompts after over before",
        )
    return reading


class EngineLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of an engine. Tokens are cut as lm-eval's own Hugging Face model cuts them."""

    def __init__(self, engine: Engine, tokenizer: Any, block: int | None, spelled: str) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = tokenizer
        self.block, self.spelled = block, spelled
        self.truncated = 0  # contexts that lost their beginning
        self.generation: dict[str, str] = {}  # task: resolved settings of its generations
        self.chats = False  # whether prompts are put as a user's turn, by the model's own template
        self.rewrite: Callable[[Segments], Segments] | None = None
        self.rewrites: dict[str, str] = {}  # prompt: what prompt methods made of it
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise Unsupported("the tokenizer has neither a BOS nor an EOS token to begin a text with")

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
        scores: list[tuple[float, bool]] = super().loglikelihood(list(map(self._rewritten, requests)), True)
        return scores

    def _rewritten(self, request: Any) -> Any:
        """The request with its prompt shortened by the plan's prompt methods."""
        if self.rewrite is None:
            return request
        prompt, *rest = request.args
        if prompt not in self.rewrites:
            self.rewrites[prompt] = self.rewrite(Segments.of(request.doc, prompt)).text()
        return dataclasses.replace(request, arguments=(self.rewrites[prompt], *rest))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, continuation in requests:
            room = self.engine.max_length + 1 - len(continuation)
            if room < 1 or not continuation:
                raise Unsupported(
                    f"a continuation of {len(continuation)} tokens in {self.engine.max_length} "
                    f"positions cannot be scored: {texts!r:.80}"
                )
            self.truncated += len(context) > room
            pairs.append((context[-room:], continuation))
        return [(scored.logprob, scored.greedy) for scored in self.engine.score(pairs, block=self.block)]

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
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuation up to the first stop string."""
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[tuple[int, list[int]]]] = defaultdict(list)
        for index, request in enumerate(map(self._rewritten, requests)):
            context, options = request.args
            options = normalize_gen_kwargs(options)
            if options["do_sample"]:
                raise Refused(f"task {request.task_name} samples its answers; only greedy decoding is repeatable")
            stops, longest = tuple(options["until"]), int(options["max_gen_toks"])
            room = self.engine.max_length - longest
            if room < 1:
                raise Unsupported(f"{longest} tokens to generate, the model has {self.engine.max_length} positions")
            ids = self.tok_encode(context)
            self.truncated += len(ids) > room
            groups[longest, stops].append((index, ids[-room:]))
            how = f"greedy, at most {longest} tokens, until {list(stops)} or EOS{self._left_out}"
            self.generation[request.task_name] = how
        for (longest, stops), members in groups.items():
            members.sort(key=lambda member: len(member[1]))
            for start in range(0, len(members), GENERATED):
                part = members[start : start + GENERATED]
                made = self.engine.generate([ids for _, ids in part], longest, self._stop_ids(stops))
                for (index, _), ids in zip(part, made, strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    texts[index] = postprocess_generated_text(text, list(stops), None)
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


def load(wanted: list[str], folders: Sequence[Path]) -> tuple[dict[str, Any], list[Exception]]:
    """Tasks by name, as lm-eval takes them, and why others cannot be had. Raises `Unsupported` for unknown names."""
    manager = index_tasks(wanted, folders)
    for name in wanted:
        if name not in manager.all_tasks:
            raise Unsupported(f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}")
    tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    failures: list[Exception] = []
    for name in wanted:
        try:
            loaded = manager.load([name])
        except (OSError, ImportError) as error:
            failure = Unsupported(f"task {name} cannot be loaded: {first_line(error)}")
            failure.__cause__ = error  # says whether it is to be tried again
            failures.append(failure)
        else:
            for kind, entries in loaded.items():
                tasks[kind] |= entries
    for task in tasks["tasks"].values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks, failures


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's progress bars and messages off the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _report(
    reading: Reading,
    name: str,
    task: Any,
    items: list[dict[str, Any]],
    results: dict[str, Any],
    how: str,
    findings: Mapping[str, int],
) -> None:
    """Add every metric of a task, with its results per item, from what lm-eval says of the items and of the task."""
    filters = list(dict.fromkeys(item["filter"] for item in items))
    for chosen in filters:
        kept = sorted((item for item in items if item["filter"] == chosen), key=lambda item: int(item["doc_id"]))
        for metric in kept[0]["metrics"]:
            values = [item[metric] for item in kept]
            ours, scale = PERPLEXITIES.get(metric, (metric if metric in OWN else f"lm_eval_{metric}", None))
            key = f"{name}_{ours}" + ("" if chosen == filters[0] else f"_{chosen}")
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


def _mean(reading: Reading, tasks: Sequence[str]) -> None:
    """The plain mean of the tasks' accuracies, its variance from the items of each."""
    keys = [
        next(key for metric in HEADLINE if (key := f"{task}_{metric}") in reading.samples)
        for task in tasks
        if any(f"{task}_{metric}" in reading.samples for metric in HEADLINE)
    ]
    if not keys:
        return
    values = [reading.metrics[key] for key in keys]
    middle = sum(metric.value for metric in values) / len(keys)
    variance = sum(m.value * (1 - m.value) / (m.n or 1) for m in values) / len(keys) ** 2
    reach = intervals.Z * math.sqrt(variance)
    items = sum(metric.n or 0 for metric in values)
    mean = Metric(middle, max(0.0, middle - reach), min(1.0, middle + reach), items)
    reading.add("tasks_acc", mean, f"mean, each task alike, of {', '.join(keys)}; normal interval over items")
