"""The tokenizer of the tiny model: byte-level BPE trained on generated text, one token per word."""

from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from effbench.tiny.world import stream

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 1664
#: a word, a single digit or a run of marks, each with the space before it
PIECES = r" ?\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"


def build() -> PreTrainedTokenizerFast:
    """Train the tokenizer (seconds); the same text gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(stream(256, "tokenizer"), 8000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def save(folder: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer and write it where ``AutoTokenizer.from_pretrained`` finds it."""
    tokenizer = build()
    tokenizer.save_pretrained(folder)
    return tokenizer
