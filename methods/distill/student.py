"""A smaller model of the same family, to be trained in the place of the model; `reference` stays what it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from effbench.core.errors import Unsupported
from effbench.core.method import Method
from effbench.core.run import Run
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.structure import keep_blocks


@dataclass(frozen=True)
class Student(Method):
    """Fewer layers, taken from the model at even distances, or a new model, which may be narrower as well."""

    paper = "unpublished"
    settles = True
    type = "distillation"
    trials = ({"layers": 1}, {"layers": 1, "start": "random", "hidden": 64})

    layers: int | None = None  # of the student; None: half of them
    hidden: int | None = None  # width of the student; None: that of the model
    start: Literal["layers", "random"] = "layers"  # what the student's weights are at first

    def check(self) -> None:
        self.require(self.layers is None or self.layers > 0, "layers must be at least 1")
        self.require(self.hidden is None or self.hidden > 0, "hidden must be at least 1")
        self.require(
            self.hidden is None or self.start == "random", "a narrower student cannot start from layers: start='random'"
        )

    def apply(self, run: Run) -> None:
        teacher = Blocks(run.model)
        number = self.layers or max(1, len(teacher) // 2)
        if number > len(teacher):
            raise Unsupported(f"the student would have {number} layers, the model has {len(teacher)}")
        chosen = [round(i * (len(teacher) - 1) / max(1, number - 1)) for i in range(number)]
        if self.start == "layers":
            model = copy.deepcopy(run.model)
            keep_blocks(Blocks(model), chosen)
        else:
            model = self._draw(run, chosen)
        run.model = model.to(run.device).eval().requires_grad_(True)

    def _draw(self, run: Run, chosen: list[int]) -> nn.Module:
        """A model of the same configuration but for its size, with the family's own random weights."""
        config = copy.deepcopy(run.model.config)
        view = Blocks(run.model)
        config.num_hidden_layers = len(chosen)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [config.layer_types[index] for index in chosen]
        if self.hidden is not None:
            heads = config.num_attention_heads
            if self.hidden % heads:
                raise Unsupported(f"hidden={self.hidden} is no multiple of the {heads} heads")
            if self.hidden // heads % 2 and getattr(config, "rope_parameters", None):
                raise Unsupported(f"hidden={self.hidden} gives heads of {self.hidden // heads}: rotation takes pairs")
            inner = getattr(config, view.names.width, None)
            if inner is not None:  # GPT-2 may leave it to be four times the width
                setattr(config, view.names.width, inner * self.hidden // config.hidden_size)
            if getattr(config, "head_dim", None) is not None:
                config.head_dim = self.hidden // heads
            if getattr(config, "word_embed_proj_dim", None) is not None:
                config.word_embed_proj_dim = self.hidden
            config.hidden_size = self.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            model: nn.Module = type(run.model)(config)
        return model.to(run.model.dtype)
