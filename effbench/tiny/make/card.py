"""Measure the model in ``model/`` and write ``card.json`` and the marked block of ``README.md``.

python -m effbench.tiny.make.card
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from effbench.tiny import MODEL, TASKS, documents
from effbench.tiny.make.learn import BATCH, STEPS, measure_task

HERE = MODEL.parent
BEGIN, END = "<!-- card: written by python -m effbench.tiny.make.card -->", "<!-- /card -->"
GROUP = 128
Change = Callable[[Tensor], Tensor]


def manager() -> TaskManager:
    """The tasks of the tiny model, and no others."""
    return TaskManager(include_path=str(TASKS), include_defaults=False)


def load() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer."""
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32), AutoTokenizer.from_pretrained(MODEL)


def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Per token, each document by itself after the mark of a beginning, which is not scored."""
    total = count = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


class Scorer(LM):  # type: ignore[misc]
    """The model as lm-eval asks it: prompts as they are, rolled texts after the mark of a beginning."""

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the likeliest, in batches."""
        scores = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0] + pairs[i][1]))
        for start in range(0, len(order), 16):
            chunk = order[start : start + 16]
            rows = [torch.tensor(pairs[i][0] + pairs[i][1]) for i in chunk]
            with torch.no_grad():
                logits = self.model(input_ids=pad_sequence(rows, batch_first=True), use_cache=False).logits
            for i, row, logit in zip(chunk, rows, logits, strict=True):
                begin = len(pairs[i][0])
                told = logit[begin - 1 : len(row) - 1].log_softmax(-1)
                goal = row[begin:]
                picked = told.gather(-1, goal[:, None]).sum().item()
                scores[i] = (picked, bool((told.argmax(-1) == goal).all()))
        return scores

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        encode = self.tokenizer.encode
        pairs = [(encode(context), encode(answer)) for context, answer in (r.args for r in requests)]
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        start = [self.tokenizer.bos_token_id]
        return [score for score, _ in self._score([(start, self.tokenizer.encode(*r.args)) for r in requests])]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, settings: dict[str, Any]) -> str:
        """The likeliest text after a prompt, up to the first of the marks that end it."""
        ids = torch.tensor([self.tokenizer.encode(prompt)])
        out = self.model.generate(  # type: ignore[misc]
            ids,
            max_new_tokens=settings["max_gen_toks"],
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        text = str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        for end in settings["until"]:
            text = text.partition(end)[0]
        return text


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest on an affine grid from the smallest to the largest weight of each 128 inputs."""
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / ((1 << bits) - 1)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def pruned(weight: Tensor, share: float) -> Tensor:
    """The smallest magnitudes of a matrix set to zero."""
    threshold = weight.abs().flatten().kthvalue(int(share * weight.numel())).values
    return weight.masked_fill(weight.abs() <= threshold, 0.0)


def changed(model: LlamaForCausalLM, change: Change) -> LlamaForCausalLM:
    """A copy with every linear of the blocks changed; embeddings stay."""
    other = deepcopy(model)
    with torch.no_grad():
        for module in other.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(change(module.weight))
    return other


def accuracies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, tasks: list[str], limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """Accuracy of each task by lm-eval, with its standard error, number of items, and by kind of item.

    Of each task the first ``limit`` items count, or all.
    """
    lm = Scorer(model, tokenizer)
    evaluated = simple_evaluate(lm, tasks=tasks, task_manager=manager(), limit=limit, bootstrap_iters=0)
    scores: dict[str, dict[str, Any]] = {}
    for task in tasks:
        if task == "tiny_ppl":
            results = evaluated["results"][task]
            scores[task] = {name: results[f"{name},none"] for name in ("word_perplexity", "byte_perplexity")}
            continue
        kinds = defaultdict(list)
        for sample in evaluated["samples"][task]:
            kinds[sample["doc"]["kind"]].append(sample[sample["metrics"][0]])
        hits = [hit for kind in kinds.values() for hit in kind]
        mean, n = sum(hits) / len(hits), len(hits)
        scores[task] = {
            "accuracy": mean,
            "standard_error": math.sqrt(mean * (1 - mean) / (n - 1)),
            "n": n,
            "chance": evaluated["configs"][task]["metadata"]["chance"],
            "kinds": {name: sum(kind) / len(kind) for name, kind in sorted(kinds.items())},
        }
    return scores


def measure() -> dict[str, Any]:
    """Everything the card says."""
    model, tokenizer = load()
    texts = documents("heldout", 200)
    tasks = accuracies(model, tokenizer, sorted(manager().load(["tiny"])["tasks"]))
    variants: dict[str, Any] = {}
    changes: dict[str, Change] = {
        "as trained": lambda weight: weight,
        **{f"rounded to {bits} bits": partial(rounded, bits=bits) for bits in (4, 3, 2)},
        "60 % pruned by magnitude": partial(pruned, share=0.6),
    }
    for name, change in changes.items():
        other = changed(model, change)
        facts = accuracies(other, tokenizer, ["tiny_facts"])["tiny_facts"]["accuracy"]
        variants[name] = {"perplexity": perplexity(other, tokenizer, texts), "facts": facts}
    return {
        "parameters": model.num_parameters(),
        "training": json.loads((MODEL / "training.json").read_text()),
        "perplexity_of_20": perplexity(model, tokenizer, documents("heldout", 20)),
        "tasks": tasks,
        "variants": variants,
        "new_task": measure_task(model, tokenizer),
    }


def table(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    training, ppl = card["training"], card["tasks"]["tiny_ppl"]
    lines = [
        f"{card['parameters']:,} parameters, {training['tokens']:,} tokens seen "
        f"({training['tokens'] / card['parameters']:.0f} per parameter), "
        f"the last {training['decay_tokens']:,} while the learning rate fell to zero.",
        "",
        f"`tiny_ppl`: perplexity {ppl['word_perplexity']:.3f} a word, {ppl['byte_perplexity']:.4f} a byte.",
        "",
        "| task | accuracy | chance | items | by kind of item |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, score in card["tasks"].items():
        if "accuracy" in score:
            kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in score["kinds"].items())
            lines.append(
                f"| `{name}` | {score['accuracy']:.3f} ± {score['standard_error']:.3f} | {score['chance']} "
                f"| {score['n']} | {kinds} |"
            )
    lines += [
        "",
        "| weights of the blocks | held-out perplexity a token | `tiny_facts` |",
        "| --- | --- | --- |",
    ]
    dense = card["variants"]["as trained"]["perplexity"]
    for name, row in card["variants"].items():
        cost = 100 * (row["perplexity"] / dense - 1)
        lines.append(f"| {name} | {row['perplexity']:.3f} ({cost:+.1f} %) | {row['facts']:.3f} |")
    lines += [
        "",
        f"The new task (`data=tiny:task`), {STEPS} steps of {BATCH} examples:",
        "",
        "| | loss of unseen answers, nats a token |",
        "| --- | --- |",
    ]
    lines += [f"| {name} | {value:.3f} |" for name, value in card["new_task"].items()]
    return "\n".join(lines)


def main() -> None:
    card = measure()
    (HERE / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    readme = HERE / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{table(card)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
