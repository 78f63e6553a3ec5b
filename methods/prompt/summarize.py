"""Summarize: a model writes a shorter context (RECOMP's abstractive compressor; Xu et al., 2024)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

from effbench.core.errors import Unsupported
from effbench.core.run import Run
from effbench.core.views import Segments
from effbench.methods.prompt._common import (
    COMMON,
    WORD,
    Judge,
    Judged,
    count_text,
    count_tokens,
    cut,
    is_context,
    is_named,
    measure_room,
    note_chunks,
    open_judge,
    round_down,
)
from effbench.nn.embedders import cut_text
from effbench.nn.infer.sampling import Sampling

REQUEST = (  # the words with which the paper asks for the summaries that its compressor learns, but for their length
    "Compress the information in the retrieved documents into a short summary that could be used to answer the "
    "question:\nQuestion: {question}\nRetrieved documents: {documents}\nCompressed documents:"
)
MARGIN = 8  # tokens


@dataclass(frozen=True)
class Summarize(Judged):
    """The compressor is asked for a summary of all contexts for the question, which takes their place.

    Its first line counts, and no more whole words of it than have room in the budget; where it ends sooner, or writes
    nothing, fewer are left. With `force` digits, names and words of the question that it leaves out follow it, whatever
    room there is, and those that the prompt does not have are taken out. Contexts that are longer than its window are
    summarized in chunks.
    """

    paper = "arXiv:2310.04408"
    caveats = (
        "the paper trains its compressor, T5-large, on summaries of GPT-3.5; here a model is asked as GPT-3.5 was",
        "the paper's summaries have two sentences or so; here `keep` bounds their length",
    )
    type = "prompt compression"
    identity = {"keep": 1.0}
    asks = True

    temperature: float = 0.0  # 0: the likeliest token each time; else drawn by the run's seed

    def check(self) -> None:
        super().check()
        Sampling(self.temperature)

    def rewrite(self, segments: Segments, run: Run) -> Segments:
        text = "".join(segments.contexts)
        if self.keep >= 1 or not text.strip():
            return segments
        budget, size = measure_room(self, segments, cut(segments, run.tokenizer))
        judge = open_judge(run, self.compressor)
        words = self.write(segments, budget / size, judge, run).split()
        missing: list[str] = []
        if self.force:
            there = find_words(segments.text())
            words = [word for word in words if not any(map(is_named, WORD.findall(word))) or find_words(word) <= there]
        end = text[len(text.rstrip()) :]
        while True:
            if self.force:
                missing = find_missing(segments, " ".join(words))
            summary = " ".join((*words, *missing))
            short = replace(segments, contexts=(summary + end,) if summary else ())
            pieces = cut(short, run.tokenizer)
            if not words or count_tokens(piece for piece in pieces if is_context(piece, short)) <= round_down(budget):
                return short
            words.pop()

    def write(self, segments: Segments, share: float, judge: Judge, run: Run) -> str:
        """What the compressor writes of all contexts, of whose tokens it has a share at most."""
        encode, question = judge.tokenizer, segments.question.strip()
        # A chunk and its summary have room behind the request; some tokens may be others where the two meet.
        asked = len(encode(REQUEST.format(question=question, documents=""))["input_ids"]) + MARGIN
        window = int((judge.window - asked) / (1 + share))
        if window < 1:
            raise Unsupported(f"{self}: the request for a summary has {asked} tokens, in {judge.window} positions")
        chunks = cut_text("".join(segments.contexts), encode, window)
        note_chunks(run, self, len(chunks))
        sampling = Sampling(self.temperature, seed=run.seed) if self.temperature else None
        stops = set() if encode.eos_token_id is None else {int(encode.eos_token_id)}
        written = []
        for chunk in chunks:
            request = encode(REQUEST.format(question=question, documents=chunk.strip()), verbose=False)["input_ids"]
            most, number = max(1, round_down(share * count_text(encode, chunk))), zlib.crc32(chunk.encode())
            (ids,) = judge.engine.generate([request], most, stops, sampling=sampling, numbers=[number])
            written.append(encode.decode(ids, skip_special_tokens=True).strip().partition("\n")[0].strip())
        return " ".join(filter(None, written))


def find_words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return {word.lower() for word in WORD.findall(text)}


def find_missing(segments: Segments, summary: str) -> list[str]:
    """Forced words of the contexts that a summary does not have, each once and in their order."""
    asked, there = find_words(segments.question), find_words(summary) | COMMON
    words = (word for context in segments.contexts for word in WORD.findall(context))
    missing = {word.lower(): word for word in words if is_named(word) or word.lower() in asked}
    return [word for name, word in missing.items() if name not in there]
