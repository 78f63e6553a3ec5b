"""What the last fit of the recipe cost, and what tuning has tried: read from the log that the run kept."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effbench.probes import Reading
from effbench.stats.best import expect_least

if TYPE_CHECKING:
    from effbench.core.run import TuningPoint
    from effbench.nn.run import ModelRun


SEES = {"weights", "cache", "attention", "prompt", "decoder"}


def take(run: ModelRun, settings: Mapping[str, Any]) -> Reading:
    """`fit_trained_*`, `fit_tokens`, `fit_seconds`, `fit_tok_per_s`, `fit_step_ms`, bytes, operations and collectives,
    `merge_lost` and `tuned_*`; nothing where nothing fits."""
    reading = Reading()
    if run.log.tuning:
        _add_tuning(reading, run.log.tuning)
    if not run.log.fits:
        return reading
    report = run.log.fits[-1]
    cost = report["cost"]
    last = "the last fit of the recipe"
    trained = sum(group["parameters"] for group in report["groups"])
    reading.add("fit_trained_parameters", trained, f"{last}; numbers in the tensors of its optimizer")
    reading.add("fit_trained_share", trained / run.original.parameters, "over all parameters of the original model")
    if run.log.merge_lost:
        how = "norm of what rounding took over that of the product, worst step of the recipe"
        reading.add("merge_lost", max(run.log.merge_lost.values()), how)
    for when, where in (("first", "of its first step"), ("mean", "mean over its steps"), ("last", "of its last step")):
        loss = report[f"loss_{when}"]  # type: ignore[literal-required]
        reading.add(f"fit_loss_{when}", loss, f"{last}; {where}, all terms, of what was learned in that step")
    for number, loss in enumerate(report["loss_quarters"], 1):
        reading.add(f"fit_loss_quarter_{number}", loss, f"{last}; mean over that quarter of its steps, all terms")
    if "skipped" in report:
        reading.add("fit_skipped", report["skipped"], f"{last}; each was taken again with the same examples")
    reading.add("fit_tokens", report["tokens"], f"{last}; tokens that were learned")
    reading.add("fit_seconds", cost["seconds"], f"{last}; wall clock, beside other cells")
    for part in ("parameter", "buffer", "gradient", "optimizer"):
        size = float(cost[f"{part}_bytes"])  # type: ignore[literal-required]
        reading.add(f"fit_{part}_bytes", size, f"{last}; between steps, of the first process, each storage once")
    if "gathered_bytes" in cost:
        reading.add("fit_gathered_bytes", cost["gathered_bytes"], f"{last}; seen when each module is entered")
    if "rule_bytes" in cost:
        how = "parameters, gradients and AdamW's two states, divided as the engine says, in the types of this fit"
        reading.add("fit_rule_bytes", cost["rule_bytes"], how)
    for kind, told in cost.get("collectives", {}).items():
        how = f"{last}; calls of torch's collectives in one step, those of bookkeeping too"
        reading.add(f"fit_comm_{kind}_calls", told["calls"], how)
        reading.add(f"fit_comm_{kind}_bytes", told["bytes"], how)
    if "activation_bytes" in cost:
        how = "by torch's allocator" if run.device.type == "cuda" else "by hooks on saved tensors, each storage once"
        reading.add("fit_activation_bytes", cost["activation_bytes"], f"{last}; saved by one forward pass, {how}")
    if "step_peak_bytes" in cost:
        how = "most of what forward and backward passes of one step made and held at a time, gradients too"
        reading.add("fit_step_peak_bytes", cost["step_peak_bytes"], f"{last}; {how}, each storage once")
    if "step_ms" in cost:
        timed = f"{last}; with the machine to itself"
        reading.add("fit_step_ms", cost["step_ms"], f"{timed}, median of {len(cost['timed_ms'])} steps")
        per_step = report["tokens"] / report["steps"]
        reading.add("fit_tok_per_s", 1000 * per_step / cost["step_ms"], f"{timed}; learned tokens of a mean step")
        reading.samples["fit_step_ms"] = list(cost["timed_ms"])
    if "flops_per_token" in cost:
        counter = "torch FlopCounterMode, a multiply-add is 2, with what is computed again"
        reading.add(
            "fit_flops_per_token",
            cost["flops_per_token"],
            f"{last}; {counter}, of one step over the tokens that it reads",
        )
        reading.add("fit_flops_rule", 6 * trained + 4 * (cost["parameters"] - trained), RULE)
    if "joules" in cost:
        reading.add("fit_energy_j", cost["joules"], f"{last}; NVML total energy, idle included")
    return reading


def _add_tuning(reading: Reading, points: Sequence[TuningPoint]) -> None:
    """What was tried: the first point is the row's own setting. One that diverged counts as the worst that did not."""
    worst = max(point["loss"] for point in points if point["loss"] is not None)
    losses = [worst if point["loss"] is None else point["loss"] for point in points]
    how = f"mean over the tokens of the validation part; {len(points)} settings"
    if points[0]["loss"] is not None:
        reading.add("tuned_own_nll", losses[0], how)
    reading.add("tuned_nll", min(losses), how)
    drawn = f"{how}, drawn with replacement; one that diverged counts as the worst that did not"
    for draws in itertools.takewhile(lambda draws: draws < len(points), (2**i for i in itertools.count())):
        reading.add(f"tuned_best_of_{draws}_nll", expect_least(losses, draws), drawn)
    reading.add("tuned_points", len(points), "the row's own setting and those that its methods name")
    reading.add("tuned_seconds", sum(point["seconds"] for point in points), "wall clock, beside other cells")
    reading.add("tuned_tokens", sum(point["tokens"] for point in points), "learned tokens of all fits")


RULE = "6 operations a token for each parameter that is trained, 4 for each that is frozen"
