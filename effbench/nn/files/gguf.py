"""GGUF files: tensors by transformers' reader, everything else by the file's own metadata.

transformers reads the tokenizer of such a file wrongly (stop token, padding, the cutting of text into words), and
leaves out without a word what it does not know, so both are done here: the tokenizer is built from what the file says,
and a file that says more than is read is `Unsupported`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from effbench.core.errors import Unsupported
from effbench.nn.files.headers import Header, read_gguf

CONTROL, USER_DEFINED = 3, 4  # types of tokens that are never cut
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


class Cut(NamedTuple):
    """How the authors of a byte-level vocabulary cut text into words before any merge."""

    patterns: tuple[str, ...]  # applied one after the other
    whole: bool = False  # a word that is in the vocabulary is one token, whatever the merges
    opens: bool = False  # a text begins with BOS, where the file does not say
    composed: bool = False  # characters are composed (NFC) first


CUTS = {  # by `tokenizer.ggml.pre`
    "gpt-2": Cut((GPT2,)),
    "smollm": Cut((r"\p{N}", GPT2)),
    "llama-bpe": Cut(
        (CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + LINES,),
        whole=True,
        opens=True,
    ),
    "qwen2": Cut((CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + LINES,), composed=True),
    "tekken": Cut(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        whole=True,
        opens=True,
    ),
}


class Gguf:
    """A GGUF file. Raises `Unsupported` if it cannot be read as one."""

    headers: dict[str, Header]  # type and shape of every tensor

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata, self.headers = read_gguf(path)
        self.architecture = self.find("general.architecture")

    def find(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key, `default` where the file has none."""
        return self._metadata.get(key, default)

    def config(self) -> Any:
        """The configuration of the model. Raises `Unsupported` where the file says what transformers does not read."""
        scaling = self.find(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self.headers:
            raise Unsupported(f"{self.path.name} scales its rotary positions, which transformers' reader leaves out")
        return AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True)

    def check_tensors(self, model: Any) -> None:
        """Raise `Unsupported` unless the file has the tensors of the model, maybe transposed, and no others."""
        kind: Any = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)
        processor = kind(config=model.config.to_dict())
        state = model.state_dict()
        for name, path in get_gguf_hf_weights_map(model, processor).items():
            asked = tuple(state[path].shape)
            there = self.headers[name].shape if name in self.headers else None
            if there is None and path not in model.all_tied_weights_keys:
                raise Unsupported(f"{self.path.name} lacks the tensor {name}")
            if there is not None and there not in (asked, asked[::-1]):
                raise Unsupported(f"{name} is {list(there)}, the metadata asks for {list(asked)}")
        read = len(list(model.parameters()))
        if read != len(self.headers):
            raise Unsupported(f"{self.path.name} holds {len(self.headers)} tensors, of which {read} are read")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that the metadata describes, with its special tokens and chat template.

        Raises `Unsupported` for a kind that is not known here.
        """
        kind, pre = self.find("tokenizer.ggml.model"), self.find("tokenizer.ggml.pre")
        tokens = self.find("tokenizer.ggml.tokens")
        mend = "; name the authors' own with tokenizer="
        if kind is None or tokens is None:
            raise Unsupported(f"{self.path.name} holds no tokenizer{mend}")
        if kind == "llama":
            tokenizer, opens = self._sentence_pieces(tokens), True
        elif kind == "gpt2" and pre in CUTS:
            tokenizer, opens = self._byte_pairs(tokens, CUTS[pre]), CUTS[pre].opens
        else:
            known = f"gpt2 with tokenizer.ggml.pre {', '.join(CUTS)}, and llama"
            raise Unsupported(f"{self.path.name}: its tokenizer is {kind} with pre {pre!r}, known are {known}{mend}")
        types = self.find("tokenizer.ggml.token_type", [])
        for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
            added = [token for token, sort in zip(tokens, types, strict=False) if sort == wanted]
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
        named = {name: self._special(tokens, key) for name, key in SPECIAL.items()}
        self._frame(tokenizer, named["bos_token"], named["eos_token"], opens)
        said = {name: token for name, token in named.items() if token is not None}
        template = self.find("tokenizer.chat_template")
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            model_max_length=self.find(f"{self.architecture}.context_length"),
            clean_up_tokenization_spaces=False,
            **(said if template is None else said | {"chat_template": template}),
        )

    def stop_ids(self) -> list[int]:
        """Tokens at which the file says that a text or a turn ends."""
        found = [self.find(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        return list(dict.fromkeys(int(token) for token in found if token is not None))

    def _special(self, tokens: list[str], key: str) -> str | None:
        number = self.find(f"tokenizer.ggml.{key}_token_id")
        return None if number is None else tokens[number]

    def _byte_pairs(self, tokens: list[str], cut: Cut) -> Tokenizer:
        merges = [tuple(merge.split(" ")) for merge in self.find("tokenizer.ggml.merges")]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut.whole))
        if cut.composed:
            tokenizer.normalizer = normalizers.NFC()
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in cut.patterns]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _sentence_pieces(self, tokens: list[str]) -> Tokenizer:
        """As SentencePiece merges: of all neighbours that make a token those of the best score, the first of them."""
        scores = self.find("tokenizer.ggml.scores")
        vocabulary = {token: number for number, token in enumerate(tokens)}
        pairs = [
            (-scores[number], vocabulary[token[:cut]], vocabulary[token[cut:]])
            for number, token in enumerate(tokens)
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
        merges = [(tokens[left], tokens[right]) for _, left, right in sorted(pairs)]
        unknown = self._special(tokens, "unknown")
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        spaced = self.find("tokenizer.ggml.add_space_prefix", True)
        prepend = [normalizers.Prepend("▁")] if spaced else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if spaced else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer

    def _frame(self, tokenizer: Tokenizer, bos: str | None, eos: str | None, opens: bool) -> None:
        """Put BOS before and EOS after every text, if the file says so; where it does not say, BOS if it `opens`."""
        first = bos if self.find("tokenizer.ggml.add_bos_token", opens) else None
        last = eos if self.find("tokenizer.ggml.add_eos_token", False) else None
        around = [token for token in (first, last) if token is not None]
        if around:
            single = " ".join(filter(None, [first, "$A", last]))
            numbers = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(around)]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=numbers
            )


SPECIAL = {  # of transformers' tokenizers: their names in metadata
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}


@functools.lru_cache(maxsize=1)  # a cell asks three times
def open_gguf(path: Path, digest: str) -> Gguf:
    """The file of this digest, read once."""
    return Gguf(path)
