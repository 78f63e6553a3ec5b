"""What methods are given to look at: data, prompts, linears, blocks and caches, as seen by a method.

Plain dataclasses where there is nothing to compute, protocols where `effbench.nn` computes with torch. This is the one
file of core that names torch, and only for annotations: the other files take `Tensor`, `Module` and so on from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor as Tensor
    from torch import device as Device
    from torch import dtype as DType
    from torch.nn import Module as Module

    __all__ = ["DType", "Device", "Module", "Tensor"]


SiteKind = Literal["linear", "attention", "mlp", "embedding", "norm"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One training example; tokens before `prompt` are read but not learned."""

    id: str
    ids: tuple[int, ...]
    prompt: int = 0
    text: str = ""  # of the document that it is, or that it is cut from
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what its source says: skill, planted truth ...
    weight: float = 1.0  # how much it counts in the loss
    segments: Segments | None = None  # of its prompt


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in the model where a module stands that may be replaced."""

    path: str  # in the model
    kind: SiteKind
    role: str  # q, k, v, qkv, o, gate, up, down; else its kind
    block: int | None  # number of its block; None: in none
    seed: int  # of this run and this place; no two places share one
    prepared: Any = None  # what the method's `prepare` returned


@dataclasses.dataclass(frozen=True)
class Segments:
    """A prompt by its parts, so that compression knows what it may shorten; joined as they are they are the prompt.

    A part ends with the white space that stands behind it, and begins with words of the template that lead to it.
    """

    system: str = ""
    instruction: str = ""
    contexts: tuple[str, ...] = ()  # documents, or examples of the task with their answers
    question: str = ""
    whole: bool = False  # the prompt could not be divided: all of it is the one context

    @classmethod
    def divide(cls, prompt: str, named: Mapping[str, Any], examples: Sequence[str] = ()) -> Segments:
        """A prompt by its named parts, found in it in the order `system, instruction, contexts` or `context, question`.

        `examples` stand in front of all but the system prompt and are contexts, too. What stands between two parts
        belongs to the second, if it is more than white space, and what stands behind the question to it.
        """
        contexts = named.get("contexts") or named.get("context") or ()
        contexts = [contexts] if isinstance(contexts, str) else list(contexts)
        # behind examples an instruction leads to the context that follows it
        own = [
            ("instruction", None if examples else named.get("instruction")),
            *(("contexts", text) for text in contexts),
        ]
        order = [("system", named.get("system")), *(("contexts", text) for text in examples), *own]
        wanted = [(role, str(text or "").strip()) for role, text in (*order, ("question", named.get("question")))]
        found: list[tuple[str, int]] = []  # role and where the part ends
        place = 0
        for role, text in wanted:
            if not text:
                continue
            begin = prompt.find(text, place)
            if begin < 0:
                return cls(contexts=(prompt,), whole=True)
            place = begin + len(text)
            found.append((role, place))
        if not found or (prompt[place:].strip() and found[-1][0] != "question"):
            return cls(contexts=(prompt,), whole=True)
        parts: dict[str, list[str]] = {}
        start = 0
        for i, (role, end) in enumerate(found):
            while end < len(prompt) and prompt[end].isspace():
                end += 1
            parts.setdefault(role, []).append(prompt[start : end if i + 1 < len(found) else len(prompt)])
            start = end
        system, instruction, question = ("".join(parts.get(role, ())) for role in ("system", "instruction", "question"))
        return cls(system, instruction, tuple(parts.get("contexts", ())), question)

    def text(self) -> str:
        """The prompt as the model reads it."""
        return "".join((self.system, self.instruction, *self.contexts, self.question))

    def with_contexts(self, contexts: Sequence[str]) -> Segments:
        """The same with other contexts, one for each; each keeps the white space that stood behind the old one.

        An empty one goes, with its white space.
        """
        pairs = zip(self.contexts, contexts, strict=True)
        kept = tuple(new.strip() + old[len(old.rstrip()) :] for old, new in pairs if new.strip())
        return dataclasses.replace(self, contexts=kept)


class Data(Protocol):
    """What a run trains on, calibrates on and is measured on. The three never share a document."""

    name: str
    protocol: str  # how documents become one stream of tokens
    tasks: tuple[str, ...]  # lm-eval tasks that belong to the data
    task_paths: tuple[Path, ...]  # folders that define them
    window: int | None  # tokens per window of perplexity that belong to the data, all of which is then measured
    pool: list[Example]  # everything that may be trained on
    train: list[Example]  # what the next fit sees: the pool, or what selections have left of it
    reserve: list[Example]  # what selections have ranked behind it, best first
    asked: int | None  # answers that are bought now; None: the pool is open

    @property
    def validation(self) -> list[Example]:
        """Examples by which rates and settings are chosen."""

    @property
    def target(self) -> list[Example]:
        """Examples of what the model is to become good at; selectors may look at them."""

    @property
    def unseen(self) -> list[Example]:
        """Held-out examples of what is trained on, for probes alone."""

    def documents(self, part: str) -> list[str]:
        """The texts of a part, see `effbench.sources.text.PARTS`."""

    def ids(self, part: str, limit: int | None = None) -> Tensor:
        """[N] tokens of a part, documents joined, at most `limit`; no more text than that takes is tokenised."""

    def encode_prompt(self, text: str) -> list[int]:
        """What the tokenizer puts in front, and the text."""

    def closed(self, *parts: str) -> AbstractContextManager[None]:
        """Have whoever looks at held-out text inside be refused, or at what else is named of `PARTS`."""

    def teaching(self, examples: list[Example]) -> AbstractContextManager[None]:
        """Have `train` hold these examples inside."""

    def asking(self, number: int, labelled: list[Example] | None = None) -> AbstractContextManager[None]:
        """Have whoever looks at answers of the pool inside be refused; `train` holds those that are known, if any.

        `number` are to be bought, which is what is `asked` then.
        """

    def count_near_duplicates(self) -> int | None:
        """How many held-out documents share most of their words with one that is learned or chosen by."""

    def extend(self, tokens: int) -> int:
        """Have the pool hold so many tokens, if there is so much text, and say how many documents are left over."""

    def heldout_ids(self, limit: int | None = None) -> Tensor:
        """[N] tokens of the held-out part, at most `limit`."""

    def calibration(self, sequences: int, length: int, seed: int) -> Tensor:
        """[sequences, length]: windows of the calibration part, drawn by `seed`."""


class Inputs(Protocol):
    """Statistics of what a linear receives during calibration.

    Only what the method `needs` is gathered; reading anything else raises `AttributeError`. Padding never counts.
    """

    count: int  # tokens seen
    grad: Tensor  # [out, in] mean over sequences of the loss's gradient in the weight; need `grad`
    grad_abs: Tensor  # [out, in] the same of the gradient's magnitude; need `grad_abs`
    grad2: Tensor  # [out, in] the same of the gradient's square; need `grad2`

    @property
    def norm(self) -> Tensor:
        """[in]: L2 norm over all tokens; need `norm`."""

    @property
    def mean_abs(self) -> Tensor:
        """[in]: mean of |x| over all tokens; need `norm`."""

    @property
    def second_moment(self) -> Tensor:
        """[in, in] float64: mean of x x^T over all tokens; need `hessian`."""

    @property
    def hessian(self) -> Tensor:
        """[in, in] float32: 2 E[x x^T], the Hessian of the squared error of one output; need `hessian`."""

    @property
    def raw(self) -> Tensor:
        """[N, in]: an evenly spaced sample of at most about 4096 tokens; need `raw`."""


@dataclasses.dataclass
class Layer:
    """One linear as `Weights.compress` sees it."""

    name: str  # path in the model
    module: Module  # what stands there now
    inputs: Inputs
    seed: int  # of this run and this layer
    weight: Tensor  # dense float32 [out, in], a copy that may be changed
    bias: Tensor | None = None  # [out]
    kept: Tensor | None = None  # bool [out, in]: False must stay zero
    prepared: Any = None  # what the method's `prepare` returned


@dataclasses.dataclass(frozen=True)
class SharedInput:
    """Linears of a block that read the same input, and hence share its statistics."""

    names: tuple[str, ...]  # paths inside the block
    previous: Module | None  # what produces the input and can absorb a scale per channel, if anything can
    inspect: Module  # module on whose output a change of these linears is judged


class Block(Protocol):
    """One transformer block with the calibration set's hidden states at its input."""

    index: int
    module: Module
    hidden: list[Tensor]  # one [1, T, H] per sequence
    outputs: list[Tensor]  # what the next block is to receive

    def forward(self) -> list[Tensor]:
        """Outputs of the block as it is now, one per sequence."""

    def replay(self, module: Module) -> Callable[[], list[Tensor]]:
        """A function that runs a submodule on what it is now given on every sequence; the submodule may change."""

    def layers(self, shared: Sequence[SharedInput]) -> list[Layer]:
        """The linears named by `shared` that may be compressed."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """How keys, or values, are stored in fewer bytes. Its functions look at units, each by itself: [N, K, unit, D].

    A row's tokens are encoded in their order, `flush` at a time, when there are more than `retain` of them in front.
    A row is a head of a sequence, or a sequence, whose D is that of all heads together, where `joined` says so.
    """

    encode: Callable[[Tensor], tuple[Tensor, ...]]  # units to tensors [N, K, ...], of which all are counted
    decode: Callable[[tuple[Tensor, ...], int], Tensor]  # and back, to entries of that width D
    unit: int = 1  # tokens that are encoded together
    flush: int = 1  # tokens that are encoded at a time, a multiple of `unit`
    retain: int = 0  # newest tokens that stay as they are
    joined: bool = False  # whether the heads of a token are encoded together; nothing can be evicted then
    at_once: bool = False  # whether tokens are encoded as they come, so that their own pass reads what is stored


@dataclasses.dataclass
class Slots:
    """What one layer's cache holds, as a method that evicts sees it; a slot is a token of a head of keys and values.

    Tensors are [B, Hkv, S] and float32 unless said otherwise; rows may hold unlike numbers of slots, and slots that
    are not `valid` mean nothing.
    """

    layer: int
    position: Tensor  # where the token stands among those of its row, int
    valid: Tensor  # bool
    seen: Tensor  # [B] tokens ever offered, padding not counted, int
    capacity: Tensor  # [B] slots that are to be left, int
    mass: Tensor | None = None  # attention received so far, where the method `observes` it
    votes: Tensor | None = None  # [B, Hkv, W, S] attention that the last W queries of the prompt pay, oldest first
