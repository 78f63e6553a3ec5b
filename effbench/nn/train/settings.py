"""The hyper-parameters of a fit, spelled once for all methods that fit."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, Self


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """The hyper-parameters of a fit."""

    steps: int = 200  # of the optimizer
    lr: float | tuple[float, ...] = 1e-4  # peak of the learning rate; of several, that of the least validation loss
    batch_size: int = 8  # examples per step, over all ranks
    accumulate: int = 1  # forward passes that they are read in
    layout: Literal["padded", "by_length", "packed"] = "padded"  # one example a row; rows of one step alike in length;
    # or several examples in a row, which do not see each other
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the learning rate after the warm-up
    warmup: float = 0.03  # fraction of the steps
    clip: float | None = 1.0  # largest gradient norm
    weight_decay: float = 0.0  # of AdamW, on matrices; vectors, embeddings and what a module excepts have none
    max_length: int = 512  # tokens of a window of the train set, at most as many as the model has positions
    train: str = "all"  # what of the trainable model is trained: all of it, or last:N blocks
    validate: int | None = None  # steps between measurements of the validation loss, for the log of the fit

    def with_steps(self, steps: int) -> FitSettings:
        """The same hyper-parameters, and no more than these, for a fit of so many steps."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(FitSettings)}
        return FitSettings(**own | {"steps": steps})

    def shorten(self, steps: int, batch_size: int, max_length: int) -> Self:
        """The same step with fits that are as long as it takes to see what they hold, at one learning rate.

        What else of it goes by how long fits are, or by how many examples there are, has to be cut to that.
        """
        return dataclasses.replace(
            self,
            steps=steps,
            lr=self.rates[0],
            batch_size=batch_size,
            accumulate=min(self.accumulate, batch_size),
            max_length=max_length,
            validate=None,
        )

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)

    def find_fault(self) -> str:
        """What no data and no model can make right; empty if nothing is wrong."""
        counts = {name: getattr(self, name) for name in ("steps", "batch_size", "accumulate", "validate", "max_length")}
        least = {name: 2 if name == "max_length" else 1 for name in counts}
        low = [name for name, count in counts.items() if count is not None and count < least[name]]
        faults = {
            f"{', '.join(low)} must be at least {least[low[0]] if low else 1}": bool(low),
            "lr is one number or several different ones": len(set(self.rates)) < len(self.rates)
            or (isinstance(self.lr, tuple) and len(self.rates) < 2),
            "lr must be above 0": min(self.rates, default=1.0) <= 0,
            "accumulate must not be more than batch_size": self.accumulate > self.batch_size,
            "warmup is a fraction of the steps, in [0, 1)": not 0 <= self.warmup < 1,
            "clip must be above 0, or None": self.clip is not None and self.clip <= 0,
            "train must be all, or last:N for the last N blocks": not re.fullmatch(r"all|last:[1-9]\d*", self.train),
            "weight_decay must not be negative": self.weight_decay < 0,
        }
        return next((fault for fault, holds in faults.items() if holds), "")
