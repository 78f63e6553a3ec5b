"""What every metric means: the one place that tables, listings and pages take units and definitions from.

Metrics of points, tasks and kinds of memory are named by patterns: `{batch}`, `{context}`, `{draws}` and `{place}`
are numbers, `{task}` is a task of lm-eval, `{peak}` a way to count memory, `{collective}` a kind of message between
processes.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Literal

Better = Literal["higher", "lower", "neither"]
Family = Literal[
    "perplexity", "accuracy", "distance", "quality", "size", "memory", "speed", "compute", "energy", "cost", "data"
]

PEAKS = {  # ways to count memory
    "rss": "main memory of the process, as the operating system counts it",
    "allocated": "memory of the GPU that tensors take, as torch counts it",
    "reserved": "memory of the GPU that torch holds for tensors, taken or not",
    "process": "memory of the GPU that the process holds, with CUDA's context and libraries, as NVML counts it",
}
FIELDS = {
    "batch": r"\d+",
    "context": r"\d+",
    "draws": r"\d+",
    "place": r"\d+",
    "task": r"\w[\w.:+-]*",
    "filter": r"[\w.+-]+",
    "metric": r"[\w./-]+",
    "peak": "|".join(PEAKS),
    "phase": "prefill|decode",
    "collective": "all_reduce|all_gather|reduce_scatter|all_to_all|broadcast|send",
    "percent": r"\d+",
    "moment": "first|mean|last",  # of a fit
}

SELECTED = {"kept": "that are kept", "pool": "of the pool"}
QUARTERS = ("first", "second", "third", "last")  # of the steps of a fit
FORETOLD = {  # by `effbench plan`
    "weights": "weights of the model in the last fit",
    "gathered": "weights in parts that were whole at a time in the last fit",
    "gradients": "gradients of the last fit",
    "optimizer": "optimizer's states of the last fit",
    "activations": "activations that the last fit saved",
    "training": "weights, gathered or not, gradients, states and activations of the last fit together",
    "resident": "model as it is computed with",
    "stored": "model as it is stored",
}
PLANTED = {  # in a pool to select from
    "in": "that are like the target",
    "off": "that are off its domain",
    "noise": "as noise",
    "duplicate": "as near-duplicates",
}


@dataclasses.dataclass(frozen=True)
class Definition:
    """What a metric, or all of a pattern, means."""

    pattern: str
    family: Family
    unit: str  # of the number as it is recorded
    better: Better
    meaning: str  # one sentence
    signed: bool = False  # whether it may be below zero

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """Matches the names of the pattern; its groups are the fields."""
        parts = re.split(r"\{(\w+)\}", self.pattern)
        return re.compile(
            "".join(f"(?P<{part}>{FIELDS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        )


DEFINITIONS: tuple[Definition, ...] = (
    # Quality on held-out text
    Definition(
        "token_ppl", "perplexity", "", "lower",
        "The exponential of the mean negative log-likelihood per token of the held-out text.",
    ),
    Definition(
        "kl_nats_per_token", "distance", "nats", "lower",
        "The mean KL divergence of the model's next-token distribution from that of the unchanged model.",
    ),
    Definition(
        "top1_agreement", "distance", "fraction", "higher",
        "The share of tokens for which the most likely next token is that of the unchanged model.",
    ),
    Definition(
        "flips", "distance", "fraction", "lower",
        "The share of tokens for which the most likely next token is not that of the unchanged model.",
    ),
    Definition(
        "acceptance", "distance", "fraction", "higher",
        "The chance that a token the model drafts is taken by its teacher: the sum of the smaller of their two "
        "probabilities over all tokens, mean over the held-out text.",
    ),
    Definition(
        "answer_acceptance", "distance", "fraction", "higher",
        "The chance that a token the model drafts is taken by its teacher, mean over held-out answers.",
    ),
    Definition(
        "block_tokens_k{place}", "distance", "tokens", "higher",
        "Tokens to be expected of one pass of the teacher over so many drafted ones, were all taken with the same "
        "chance, the acceptance on held-out text.",
    ),
    Definition(
        "answer_block_tokens_k{place}", "distance", "tokens", "higher",
        "Tokens to be expected of one pass of the teacher over so many drafted ones, were all taken with the same "
        "chance, the acceptance on held-out answers.",
    ),
    # Quality on tasks
    Definition(
        "tasks_acc", "accuracy", "fraction", "higher",
        "The mean of the accuracies of all tasks, each task with the same weight.",
    ),
    Definition(
        "tasks_acc_evict_at_context", "accuracy", "fraction", "higher",
        "The mean of the accuracies of all tasks where caches settle before the question.",
    ),
    Definition(
        "cache_kept", "memory", "fraction", "neither",
        "The share of the tokens offered that the cache of keys and values holds when answers of tasks are read.",
    ),
    Definition(
        "cache_bytes_per_token", "memory", "bytes", "lower",
        "The bytes that the cache of keys and values holds when answers of tasks are read, per token offered.",
    ),
    Definition(
        "answer_kl_nats_per_token", "distance", "nats", "lower",
        "The mean KL divergence, at the tokens of the unchanged model's answer, of what the model would say there.",
    ),
    Definition(
        "prompt_kept", "quality", "fraction", "neither",
        "The tokens of prompts with a context after prompt compression over those before.",
    ),
    Definition(
        "prompt_asked", "quality", "fraction", "neither",
        "The share of the tokens of a prompt that is to stay, as the methods of the recipe say by `keep`.",
    ),
    Definition(
        "prompt_over_asked", "quality", "fraction", "lower",
        "The share of prompts of which more than a twentieth of their tokens stays beyond what was asked.",
    ),
    Definition(
        "compressor_ms_per_prompt", "cost", "ms", "lower",
        "Time in which prompt compression shortens one prompt, with the machine to itself.",
    ),
    Definition(
        "prompt_saved_ms", "cost", "ms", "higher",
        "Time in which the model reads a prompt less that in which it is shortened and what is left is read.",
        signed=True,
    ),
    *(
        Definition(
            f"{task}_over_random{suffix}", "quality", "fraction", "higher",
            f"By how much {what} is above that with random tokens in the contexts, as many of each prompt{where}.",
            signed=True,
        )
        for task, what in (("tasks", "the mean of the accuracies of all tasks"), ("{task}", "the accuracy of a task"))
        for suffix, where in (("", ""), ("_evict_at_context", ", where caches settle before the question"))
    ),
    Definition(
        "{task}_prompt_kept", "quality", "fraction", "neither",
        "The tokens of a task's prompts after prompt compression over those before.",
    ),
    Definition(
        "{task}_cache_kept", "memory", "fraction", "neither",
        "The share of the tokens offered that the cache of keys and values holds when a task's answer is read.",
    ),
    Definition(
        "{task}_cache_bytes_per_token", "memory", "bytes", "lower",
        "The bytes that the cache of keys and values holds when a task's answer is read, per token offered.",
    ),
    Definition(
        "{task}_acc", "accuracy", "fraction", "higher",
        "The share of items for which the right choice has the highest log-likelihood.",
    ),
    *(
        Definition(
            f"{{task}}_{metric}_evict_at_context", "accuracy", "fraction", "higher",
            f"The share of items for which {what}, where caches settle before the question.",
        )
        for metric, what in (
            ("acc", "the right choice has the highest log-likelihood"),
            ("exact_match", "the generated answer is the reference answer"),
        )
    ),
    Definition(
        "{task}_acc_norm", "quality", "fraction", "higher",
        "The share of items for which the right choice has the highest log-likelihood per byte.",
    ),
    Definition(
        "{task}_exact_match", "accuracy", "fraction", "higher",
        "The share of items whose generated answer is the reference answer.",
    ),
    Definition(
        "{task}_f1", "quality", "fraction", "higher",
        "The F1 score of the answers of a task, as lm-eval computes it.",
    ),
    Definition(
        "{task}_mcc", "quality", "", "higher",
        "Matthews' correlation of the answers of a task with the labels.",
    ),
    Definition(
        "{task}_word_ppl", "perplexity", "", "lower",
        "The exponential of the negative log-likelihood of the texts of a task per word.",
    ),
    Definition(
        "{task}_byte_ppl", "perplexity", "", "lower",
        "The exponential of the negative log-likelihood of the texts of a task per byte.",
    ),
    Definition(
        "{task}_bits_per_byte", "quality", "bits", "lower",
        "The negative log-likelihood of the texts of a task per byte, in bits.",
    ),
    Definition(
        "{task}_ppl", "perplexity", "", "lower",
        "The exponential of the mean negative log-likelihood of the continuations of a task.",
    ),
    Definition(
        "{task}_lm_eval_{metric}", "quality", "", "neither",
        "A metric of a task as lm-eval computes it, under lm-eval's name.",
    ),
    # Quality on a task that was trained on
    Definition(
        "completion_nll", "quality", "nats", "lower",
        "The mean negative log-likelihood per token of the held-out answers to prompts of the task trained on.",
    ),
    Definition(
        "completion_exact", "quality", "fraction", "higher",
        "The share of held-out prompts of the task trained on whose greedy answer is right to the last token.",
    ),
    Definition(
        "completion_gain_nats", "quality", "nats", "higher",
        "By how much held-out answers are likelier, per token, than to who knows the training answers and no prompt.",
        signed=True,
    ),
    Definition(
        "completion_constant_exact", "quality", "fraction", "neither",
        "The share of held-out prompts for which the most frequent answer of the training examples is right.",
    ),
    # Size
    Definition("weight_bytes", "size", "bytes", "lower", "The bytes of all weights as saved, without their metadata."),
    Definition(
        "metadata_bytes", "size", "bytes", "lower",
        "The bytes of scales, zero-points, indices and masks as saved.",
    ),
    Definition("stored_bytes", "size", "bytes", "lower", "The bytes of the saved model: weights and metadata."),
    Definition("reference_bytes", "size", "bytes", "neither", "The bytes of the unchanged model as saved."),
    Definition("compression", "size", "ratio", "higher", "The bytes of the unchanged model over those of this one."),
    Definition(
        "bits_per_weight", "size", "bits", "lower",
        "The stored bits, with metadata, per weight of the compressed linears.",
    ),
    Definition(
        "model_bits_per_weight", "size", "bits", "lower",
        "All stored bits over the number of parameters of the unchanged model.",
    ),
    Definition(
        "sparsity", "size", "fraction", "neither",
        "The share of exact zeros in the matrices of all linears but the head.",
    ),
    Definition(
        "model_sparsity", "size", "fraction", "neither",
        "The share of exact zeros among all parameters of the model.",
    ),
    Definition(
        "sparsity_asked", "size", "fraction", "neither",
        "The share of zeros among the weights that the recipe asked for.",
    ),
    Definition("resident_bytes", "memory", "bytes", "lower", "The bytes of all tensors as held for computing."),
    Definition(
        "decode_weight_bytes", "memory", "bytes", "lower",
        "The bytes of weights, as resident, that one decoding step reads.",
    ),
    Definition(
        "score_peak_{peak}_bytes", "memory", "bytes", "lower",
        "The most memory held while scoring a text, above what was held before.",
    ),
    Definition(
        "generate_peak_{peak}_bytes", "memory", "bytes", "lower",
        "The most memory held while generating, above what was held before.",
    ),
    # Of runs of other tools that were imported
    Definition(
        "run_peak_{peak}_bytes", "memory", "bytes", "lower",
        "The most memory held at any time of an imported run, counted from nothing.",
    ),
    Definition(
        "checkpoint_bytes", "size", "bytes", "lower",
        "The size of the file in which an imported run saved what it trained.",
    ),
    # Speed
    Definition(
        "{phase}_speedup_b{batch}_c{context}", "speed", "ratio", "higher",
        "How many times faster than the unchanged model, timed in turns with it in one process.",
    ),
    Definition(
        "{phase}_tok_per_s_b{batch}_c{context}", "speed", "tokens/s", "higher",
        "Tokens of all sequences of a batch per second.",
    ),
    Definition(
        "decode_ms_per_token_b{batch}_c{context}", "speed", "ms", "lower",
        "Time of one decoding step of the whole batch.",
    ),
    Definition(
        "prefill_launch_overhead_ms_b{batch}_c{context}", "speed", "ms", "lower",
        "Time of a prefill in which the host works and the GPU waits.",
    ),
    Definition(
        "decode_launch_overhead_ms_per_token_b{batch}_c{context}", "speed", "ms", "lower",
        "Time of a decoding step in which the host works and the GPU waits.",
    ),
    Definition(
        "decode_floor_ms_per_token_b{batch}_c{context}", "speed", "ms", "lower",
        "The time in which the device could read the weights of one decoding step.",
    ),
    Definition(
        "decode_percent_of_bandwidth_b{batch}_c{context}", "speed", "%", "higher",
        "The share of the device's memory bandwidth that decoding attains.",
    ),
    Definition(
        "prefill_percent_of_matmul_b{batch}_c{context}", "speed", "%", "higher",
        "The share of the device's 16- or 32-bit matrix throughput that prefill attains.",
    ),
    Definition(
        "memory_bandwidth_bytes_per_s", "speed", "bytes/s", "neither",
        "The larger of the device's rates of copying and of reading memory.",
    ),
    Definition(
        "memory_copy_bytes_per_s", "speed", "bytes/s", "neither",
        "Bytes read and written per second of copying.",
    ),
    Definition("memory_read_bytes_per_s", "speed", "bytes/s", "neither", "Bytes read per second of summing."),
    Definition("matmul_flop_per_s", "speed", "FLOP/s", "neither", "Operations per second of a large dense product."),
    Definition("graph_node_us", "speed", "µs", "neither", "Time of one almost empty kernel within a CUDA graph."),
    Definition(
        "drafted_tok_per_s", "speed", "tokens/s", "higher",
        "Tokens of a text per second where a draft proposes them and the model checks them, its prompt included.",
    ),
    Definition(
        "drafted_speedup", "speed", "ratio", "higher",
        "How many times faster a text is made with drafts than by the model that checks them alone.",
    ),
    Definition(
        "accepted_per_pass", "speed", "tokens", "higher",
        "Drafted tokens that the model takes in each of its passes.",
    ),
    Definition(
        "accepted_at_{place}", "speed", "fraction", "higher",
        "The share of drafts whose token at this place is taken, of those that were taken up to there.",
    ),
    Definition(
        "tokens_per_pass", "speed", "tokens", "higher",
        "Tokens of a text for each pass of the model that checks drafts, its own token included and the prompt's pass "
        "left out.",
    ),
    Definition(
        "sampled_drafted_tok_per_s", "speed", "tokens/s", "higher",
        "Tokens of a sampled text per second where a draft proposes them and the model checks them, its prompt "
        "included.",
    ),
    Definition(
        "sampled_drafted_speedup", "speed", "ratio", "higher",
        "How many times faster a text is sampled with drafts than by the model that checks them alone.",
    ),
    Definition(
        "sampled_accepted_per_pass", "speed", "tokens", "higher",
        "Drafted tokens that the model takes in each of its passes over a sampled text.",
    ),
    Definition(
        "sampled_accepted_at_{place}", "speed", "fraction", "higher",
        "The share of drafts of sampled text whose token at this place is taken, of those that were taken up to there.",
    ),
    Definition(
        "sampled_tokens_per_pass", "speed", "tokens", "higher",
        "Tokens of a sampled text for each pass of the model that checks drafts, its own token included and the "
        "prompt's pass left out.",
    ),
    # Operations and energy
    Definition(
        "score_flops_per_token_c{context}", "compute", "FLOP", "lower",
        "Floating-point operations per token of scoring a text of this length.",
    ),
    Definition(
        "decode_flops_per_token_c{context}", "compute", "FLOP", "lower",
        "Floating-point operations of decoding one token after this many.",
    ),
    Definition("flops_2d", "compute", "FLOP", "lower", "Two operations for every entry of every linear, per token."),
    Definition(
        "{phase}_energy_j_per_token_b{batch}_c{context}", "energy", "J", "lower",
        "Energy of the whole GPU per token, idle power included.",
    ),
    Definition(
        "idle_power_w", "energy", "W", "neither",
        "Power of the GPU with the model resident and nothing running.",
    ),
    # What applying the recipe costs
    Definition("apply_seconds", "cost", "s", "lower", "Time that all steps of the recipe took."),
    Definition(
        "apply_peak_{peak}_bytes", "cost", "bytes", "lower",
        "The most memory that a step of the recipe held above what was held before it.",
    ),
    Definition(
        "calibration_tokens", "cost", "tokens", "lower",
        "The tokens of calibration text that statistics were taken from.",
    ),
    Definition(
        "fit_loss_{moment}", "cost", "nats", "lower",
        "The loss of the last fit, of its first or last step or their mean: what it learned from, not held-out text.",
    ),
    *(
        Definition(
            f"fit_loss_quarter_{number}", "cost", "nats", "lower",
            f"The mean loss of the {quarter} quarter of the last fit's steps.",
        )
        for number, quarter in enumerate(QUARTERS, 1)
    ),
    Definition("fit_skipped", "cost", "", "lower", "How often a step of the last fit was skipped and taken again."),
    Definition("fit_tokens", "cost", "tokens", "lower", "The tokens that the last fit learned, in all its epochs."),
    Definition("fit_seconds", "cost", "s", "lower", "Time of the last fit, beside other cells but not waiting."),
    Definition("fit_step_ms", "cost", "ms", "lower", "Time of one step of training, with the machine to itself."),
    Definition("fit_tok_per_s", "cost", "tokens/s", "higher", "Tokens learned per second, with the machine to itself."),
    Definition("fit_trained_parameters", "cost", "", "lower", "How many numbers the last fit trained."),
    Definition(
        "fit_trained_share", "cost", "fraction", "lower",
        "How many numbers the last fit trained, over the parameters of the original model.",
    ),
    Definition(
        "merge_lost", "cost", "fraction", "lower",
        "The share of a trained product, by norms, that rounding took where it was merged into stored weights.",
    ),
    Definition("fit_parameter_bytes", "cost", "bytes", "lower", "The bytes of parameters in one process of a fit."),
    Definition(
        "fit_buffer_bytes", "cost", "bytes", "lower",
        "The bytes of buffers in one process of a fit, such as codes, scales and masks of packed weights.",
    ),
    Definition("fit_gradient_bytes", "cost", "bytes", "lower", "The bytes of gradients in one process of a fit."),
    Definition("fit_optimizer_bytes", "cost", "bytes", "lower", "The bytes of the optimizer's states in one process."),
    Definition(
        "fit_gathered_bytes", "cost", "bytes", "lower",
        "The most bytes of weights that lie in parts and are whole at one time of a forward pass, in one process.",
    ),
    Definition(
        "fit_rule_bytes", "cost", "bytes", "lower",
        "The bytes of parameters, gradients and two states a trained number in one process, by the engine's formula.",
    ),
    *(
        Definition(
            f"plan_{part}_off", "cost", "fraction", "lower",
            f"By which share of the bytes that were held the prediction of `effbench plan` is off: the {what}.",
        )
        for part, what in FORETOLD.items()
    ),
    Definition(
        "fit_comm_{collective}_calls", "cost", "", "lower",
        "How many collectives of a kind one process takes part in, in one step of training.",
    ),
    Definition(
        "fit_comm_{collective}_bytes", "cost", "bytes", "lower",
        "The bytes of what these collectives reduce, gather, scatter or send as a whole, in one step of training.",
    ),
    Definition(
        "fit_activation_bytes", "cost", "bytes", "lower",
        "The bytes that a forward pass of training saves for its backward pass.",
    ),
    Definition(
        "fit_step_peak_bytes", "cost", "bytes", "lower",
        "The most bytes that the passes of one step of training make and hold at a time: activations and gradients.",
    ),
    Definition(
        "fit_flops_per_token", "cost", "FLOP", "lower",
        "Floating-point operations of a step of training per token read, with those of recomputing and of padding.",
    ),
    Definition(
        "fit_flops_rule", "cost", "FLOP", "lower",
        "Six operations per token read for every parameter that is trained, four for every one that is frozen.",
    ),
    Definition("tuned_points", "cost", "", "neither", "How many settings were tried, the row's own among them."),
    Definition(
        "tuned_own_nll", "quality", "nats", "lower",
        "Loss of the validation part at the setting that the row has by itself, per token.",
    ),
    Definition(
        "tuned_nll", "quality", "nats", "lower",
        "Loss of the validation part at the best of the settings tried, per token.",
    ),
    Definition(
        "tuned_best_of_{draws}_nll", "quality", "nats", "lower",
        "The least loss to be expected of so many settings drawn at random from those tried (Dodge et al., 2019).",
    ),
    Definition("tuned_seconds", "cost", "s", "lower", "Time that all settings tried took, with other cells beside."),
    Definition("tuned_tokens", "cost", "tokens", "lower", "The tokens that all settings tried have learned."),
    # What selections keep
    Definition("select_kept", "data", "", "neither", "Training examples that selections have left."),
    Definition("select_seconds", "cost", "s", "lower", "Time that all selections took, beside other cells."),
    Definition(
        "select_s_per_1000", "cost", "s", "lower",
        "Time that all selections took per 1,000 examples of the pool, beside other cells.",
    ),
    Definition(
        "select_forward_s_per_1000", "cost", "s", "lower",
        "Time of one forward pass over 1,000 examples of the pool, beside other cells.",
    ),
    *(
        Definition(
            f"select_{field}s_covered", "data", "fraction", "neither",
            f"The share of the {field}s of the pool that the examples kept are of.",
        )
        for field in ("source", "skill")
    ),
    *(
        Definition(
            f"select_{part}_length_q{{percent}}", "data", "tokens", "neither",
            f"The length that so many percent of the examples {what} do not exceed.",
        )
        for part, what in SELECTED.items()
    ),
    *(
        Definition(
            f"select_{part}_topics_nats", "data", "nats", "neither",
            f"How evenly the examples {what} spread over the clusters of the pool: the entropy.",
        )
        for part, what in SELECTED.items()
    ),
    *(
        Definition(
            f"select_{part}_label_balance", "data", "fraction", "neither",
            f"Entropy of the labels of the examples {what}, over the largest that the labels of the pool can have.",
        )
        for part, what in SELECTED.items()
    ),
    *(
        Definition(
            f"select_{kind}_kept", "data", "fraction", "neither",
            f"The share that is kept of the examples planted in the pool {what}.",
        )
        for kind, what in PLANTED.items()
    ),
    Definition(
        "select_noise_last", "data", "fraction", "higher",
        "Of those ranked last, as many as there is noise, the share that is noise: precision and recall in one.",
    ),
    Definition("select_turned_away", "data", "", "neither", "Examples that were judged one by one and not let in."),
    Definition(
        "select_rightly", "data", "fraction", "higher",
        "Precision: of the examples turned away, the share that is noise or nearly the same as one kept.",
    ),
    Definition(
        "select_pairs_kept", "data", "fraction", "lower",
        "Of the pairs of near-duplicates that were planted, the share of which both are kept.",
    ),
    Definition("fit_energy_j", "cost", "J", "lower", "Energy of the whole GPU over the last fit, idle power included."),
)  # fmt: skip

# What a listing shows of a record.
HEADLINES = ("stored_bytes", "bits_per_weight", "token_ppl", "kl_nats_per_token", "top1_agreement", "tasks_acc")


class Undefined(KeyError):
    """A metric that nobody has defined."""


@functools.cache
def describe(name: str) -> Definition:
    """The definition of a metric by its name. Raises `Undefined`.

    A name that is no pattern's counts before patterns, and of patterns the first. A task of lm-eval may have several
    filters: the metrics of all but the first have the filter's name at their end.
    """
    exact = next((one for one in DEFINITIONS if one.pattern == name), None)
    if exact is not None:
        return exact
    for definition in DEFINITIONS:
        if definition.regex.fullmatch(name):
            return definition
    for definition in DEFINITIONS:
        if "{task}" in definition.pattern and re.fullmatch(f"{definition.regex.pattern}_{FIELDS['filter']}", name):
            return definition
    raise Undefined(f"metric {name!r} has no definition in effbench/records/definitions.py")
