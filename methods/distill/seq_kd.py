"""Sequence-level knowledge distillation: learn the text that the teacher writes (Kim and Rush, 2016)."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from effbench.core.method import Method, Output
from effbench.core.run import Run
from effbench.nn.infer.engine import open_engine
from effbench.nn.train.samples import Asked, Text, answer, ask, keep_texts, sample, search
from effbench.nn.train.teacher import count_shared

AT_ONCE = 256  # texts that are written before they are kept


@dataclass(frozen=True)
class SeqKD(Method):
    """The teacher writes once behind every prompt of the train set; the fit learns that text by its cross-entropy.

    Its whole distribution over texts is approximated by its mode, which a beam search looks for (section 3.2).
    """

    paper = "arXiv:1606.07947"
    caveats = ("a setting for translation in the paper, with 5 beams; texts of at most 64 tokens here",)
    type = "distillation"
    weight_update = "training"
    trains = True
    trials = ({"new_tokens": 4, "prompt_tokens": 4, "beams": 2},)
    tuned = {"beams": (1, 4)}

    beams: int = 4  # of the search for the teacher's likeliest text
    temperature: float | None = None  # of the softmax that texts are drawn from instead; None: beam search
    new_tokens: int = 64  # of a text, its end included, at most
    prompt_tokens: int = 16  # first tokens of an example without a prompt, which stand for one
    teacher: str = "reference"  # role of the teacher: the unchanged model, or the name of a snapshot

    def check(self) -> None:
        for name in ("beams", "new_tokens", "prompt_tokens"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1")
        self.require(self.temperature is None or self.temperature > 0, "temperature must be above 0, or None")
        self.require_teacher(self.teacher)

    @property
    def reads(self) -> Mapping[str, Set[Output]]:
        return {self.teacher: frozenset()}

    def apply(self, run: Run) -> None:
        examples = [example for example in run.data.train if len(example.ids) > max(1, example.prompt)]
        asked = [ask(example, self.prompt_tokens, "seq_kd") for example in examples]
        engine = open_engine(run, run.role(self.teacher), count_shared(run, self.teacher))

        def write(part: list[Asked]) -> list[Text]:
            if self.temperature is None:
                return search(run, engine, part, self.new_tokens, self.beams)
            return sample(run, engine, part, self.new_tokens, self.temperature)

        how = f"{self.beams} beams" if self.temperature is None else f"{self.temperature} {run.seed}"
        texts: list[Text] = []
        for start in range(0, len(asked), AT_ONCE):
            part = asked[start : start + AT_ONCE]
            texts += keep_texts(run, self.teacher, f"{how} {self.new_tokens}", part, write)
            run.progress("text", len(texts), len(asked))
        run.data.train = [answer(*written) for written in zip(examples, asked, texts, strict=True)]
