"""LLM-QAT: train weights, activations and the key-value cache rounded, on what the model itself writes (Liu, 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from effbench import ops
from effbench.core.kinds import Swap
from effbench.core.method import Output
from effbench.core.run import Run
from effbench.core.views import Codec, Site
from effbench.formats.grid import WIDTHS
from effbench.methods.quant._fake import FakeQuantLinear, round_tokens, training_all
from effbench.methods.quant._generated import GREEDY, generate
from effbench.nn.model.adapters import add_part
from effbench.nn.model.attention import AttentionExtra
from effbench.nn.train.loss import learned_logits, mean_learned
from effbench.nn.train.teacher import count_shared


class KVQuantizer(AttentionExtra):
    """Keys and values are rounded token by token, each on one grid for all heads, before keys are rotated.

    In training and wherever else all tokens are read at once; a cache holds the codes of the same grid.
    """

    holds = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def hold(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self._round(key), self._round(value)

    def _round(self, states: Tensor) -> Tensor:
        together = states.transpose(1, 2)  # [B, T, Hkv, D]
        return round_tokens(together.flatten(2), self.bits).view(together.shape).transpose(1, 2)

    def codecs(self) -> tuple[Codec, Codec]:
        codec = Codec(self._encode, self._decode, joined=True, at_once=True)
        return codec, codec

    def _encode(self, units: Tensor) -> tuple[Tensor, ...]:
        words, scale, _ = ops.load("kv_quantize")(units, self.bits, True)
        return words, scale

    def _decode(self, stored: tuple[Tensor, ...], width: int) -> Tensor:
        words, scale = stored
        found: Tensor = ops.load("kv_dequantize")(words, scale, scale * -(2 ** (self.bits - 1)), self.bits, width)
        return found

    def config(self) -> dict[str, Any]:
        return {"bits": self.bits}


@dataclass(frozen=True)
class LLMQAT(Swap):
    """X_Q = alpha round(X_R / alpha) with alpha = max|X_R| / (2^(N-1) - 1): symmetric, and nothing is clipped, because
    outliers count (section 2.2 of the paper). Weights have an alpha for each output, activations and what is cached
    for each token. Gradients pass through the rounding as they are.

    The loss is the cross-entropy with the predictions of the full-precision model, less their entropy, which does not
    change; what is read are texts that this model has begun with a token drawn at random (section 2.1).
    Embeddings and the head are not rounded. After the fit weights are packed and caches hold `kv_bits`.
    """

    paper = "arXiv:2305.17888"
    published = "llm_qat(examples=96000, length=2048), fit(steps=12000, lr=2e-05, warmup=0.0, max_length=2048)"
    caveats = (
        "8-bit activations beside packed weights, rounded and not multiplied as integers",
        "gradients pass everywhere, as in the paper; its code stops those of numbers beyond 2",
    )
    type = "QAT"
    weight_update = "training"
    claims = ("train.loss",)
    trials = (
        {"data": "train", "activation_bits": 16},
        {"examples": 8, "length": 16},
        {"weight_bits": 8, "kv_bits": 16, "examples": 8, "length": 16},
    )

    weight_bits: int = 4  # of a weight: 2, 3, 4 or 8
    activation_bits: int = 8  # of the inputs of linears, 2 to 8; 16: as they come
    kv_bits: Literal[16, 8, 4, 2] = 4  # of cached keys and values; 16: as they come
    data: Literal["generated", "train"] = "generated"  # what is read: texts of the teacher, or the train set
    examples: int = 512  # texts that are generated
    length: int = 256  # their tokens, at most
    teacher: str = "reference"  # role of the full-precision model: the unchanged one, or the name of a snapshot

    def check(self) -> None:
        self.require(self.weight_bits in WIDTHS, f"weight_bits must be one of {WIDTHS}")
        self.require(2 <= self.activation_bits <= 8 or self.activation_bits == 16, "activation_bits is 2 to 8, or 16")
        self.require(self.examples > 0, "examples must be at least 1")
        self.require(self.length > 1 + max(GREEDY), f"length must be above {1 + max(GREEDY)}")
        self.require_teacher(self.teacher)

    @property
    def rounds_activations(self) -> bool:
        return self.activation_bits < 16

    @property
    def sites(self) -> Any:  # type: ignore[override]
        """Linears, and attention where what it caches is rounded."""
        return ("linear",) if self.kv_bits == 16 else ("linear", "attention")

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.teacher: {"logits"}}

    def slots(self) -> tuple[str, ...]:
        return super().slots() + (() if self.kv_bits == 16 else ("infer.encoder",))

    def codecs(self) -> tuple[Codec | None, Codec | None]:
        """How caches hold keys and values once this method has written the slot `encoder`."""
        return KVQuantizer(self.kv_bits).codecs()

    def apply(self, run: Run) -> None:
        count_shared(run, self.teacher)
        if self.data == "generated":
            before = run.data.train
            run.data.train = generate(run, self.teacher, self.examples, self.length)
            run.train.on_exit(lambda: setattr(run.data, "train", before))
        with training_all(run):
            super().apply(run)

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        if site.kind == "attention":
            add_part(module, "kv_quantizer", KVQuantizer(self.kv_bits))
            return module
        bits = {"bits": self.weight_bits, "activation_bits": self.activation_bits}
        return FakeQuantLinear.of(module, **bits, group_size=None, symmetric=True, grid="awq")

    def settle(self, module: nn.Module) -> nn.Module:
        return module.pack(module.base.weight.dtype) if isinstance(module, FakeQuantLinear) else module

    def loss(self, batch: dict[str, Tensor], out: Any, run: Run) -> dict[str, Tensor]:
        shared = count_shared(run, self.teacher)
        student, teacher = (
            learned_logits(logits, batch)[:, :shared] for logits in (out.logits, run.outputs(self.teacher).logits)
        )
        return {"divergence": mean_learned(ops.load("soft_kl")(student, teacher, 1.0), batch)}
