"""GGUF files: tensors decoded, and everything else as the file's own metadata says."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gguf import TEMPLATE, TEXT, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from effbench import sources
from effbench.core.errors import Unavailable, Unsupported, Usage
from effbench.core.recipe import parse_step
from effbench.nn.files import artifact
from effbench.nn.files.checkpoint import keep_beside
from effbench.nn.files.gguf import CUTS, Gguf
from effbench.nn.files.load import open_run
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.linear import Storage


def opened(path: Path, tokenizer: str | None = None):
    settings = {"calibration_sequences": 2, "calibration_length": 16}
    return open_run(sources.model(f"gguf:{path}", tokenizer), sources.data(None), "cpu", None, 0, settings)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "toy.gguf")


def test_tensors_are_those_of_the_file_and_its_types_are_in_the_log(file: Path) -> None:
    from gguf import GGUFReader, dequantize

    run = opened(file)
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    weight = run.model.model.layers[1].mlp.down_proj.weight.detach()
    tensor = tensors["blk.1.ffn_down.weight"]
    assert torch.equal(weight, torch.tensor(dequantize(tensor.data, tensor.tensor_type)).half().float())
    assert run.storage == Storage(torch.float16, torch.float32)
    norm = run.model.model.norm.weight.detach()
    assert torch.equal(norm, torch.tensor(tensors["output_norm.weight"].data)) and not torch.equal(norm, norm.half())
    assert run.log.to_json()["model_types"] == (
        "Q4_1 linears, Q8_0 embedding and head, F32 norms; matrices are measured in float16"
    )


@pytest.mark.parametrize(
    ("types", "storage", "words"),
    [
        ({"token_embd.weight": "F16", "blk": "F16"}, Storage(torch.float16, torch.float32), "F16 linears, F16 emb"),
        ({"token_embd.weight": "BF16", "blk": "BF16"}, Storage(torch.bfloat16, torch.float32), "BF16 linears"),
        ({"token_embd.weight": "F32", "blk": "F32"}, torch.bfloat16, "F32"),
    ],
)
def test_files_that_are_not_quantized(types: Any, storage: Any, words: str, tmp_path: Path) -> None:
    run = opened(write(tmp_path / "a.gguf", types))
    assert run.storage == storage and run.log.model_types.startswith(words)


def test_the_tokenizer_is_that_of_the_metadata(file: Path) -> None:
    tokenizer = opened(file).tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128 and tokenizer.chat_template == TEMPLATE
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT  # no space is taken for a mark of SentencePiece
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if any(map(str.isdigit, token))] == list(
        "196112345122"
    )
    assert tokenizer.encode("<|im_start|>a")[0] == 1
    assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == TEXT


# Words as the authors' own tokenizers cut this text.
WORDS = {
    "gpt-2": ["a", "Ġ1234", "Ġx", "'s", "'", "S", "Ċ", "Ċ", "b", "!!"],
    "smollm": ["a", "Ġ", "1", "2", "3", "4", "Ġx", "'s", "'", "S", "Ċ", "Ċ", "b", "!!"],
    "qwen2": ["a", "Ġ", "1", "2", "3", "4", "Ġx", "'s", "'S", "ĊĊ", "b", "!!"],
    "llama-bpe": ["a", "Ġ", "123", "4", "Ġx", "'s", "'S", "ĊĊ", "b", "!!"],
    "tekken": ["a", "Ġ", "1", "2", "3", "4", "Ġx", "'s", "'S", "ĊĊ", "b", "!!"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_authors_cut_it(pre: str, tmp_path: Path) -> None:
    tokenizer = Gguf(write(tmp_path / "a.gguf", **{"tokenizer.ggml.pre": pre})).tokenizer()
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 1234 x's'S\n\nb!!")
    assert [word for word, _ in words] == WORDS[pre]
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == (
        TEXT.replace("e\u0301", "é") if CUTS[pre].composed else TEXT
    )


@pytest.mark.parametrize(
    ("pre", "said", "first", "last"),
    [
        ("smollm", {}, False, False),
        ("llama-bpe", {}, True, False),  # what the file does not say is as the authors have it
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("smollm", {"add_bos_token": True}, True, False),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    pre: str, said: dict[str, bool], first: bool, last: bool, tmp_path: Path
) -> None:
    said = {f"tokenizer.ggml.{name}": value for name, value in ({"add_bos_token": None} | said).items()}
    ids = Gguf(write(tmp_path / "a.gguf", **{"tokenizer.ggml.pre": pre} | said)).tokenizer().encode("men")
    assert ((ids[0] == 1), (ids[-1] == 2)) == (first, last)


def test_sentence_pieces_merge_the_best_score_first(tmp_path: Path) -> None:
    """Against the algorithm itself, on random words of a random vocabulary."""
    rng = random.Random(0)
    letters = ["▁", "a", "b", "c"]
    made = sorted({"".join(rng.choices(letters, k=rng.randint(2, 4))) for _ in range(60)})
    rng.shuffle(made)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *made]
    scores = [0.0] * 259 + [-1e6] * len(letters) + [-float(rank) for rank in range(len(made))]
    path = write(
        tmp_path / "a.gguf",
        **{
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": scores, "tokenizer.ggml.merges": None, "tokenizer.ggml.add_bos_token": None,
            "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259),
        },
    )  # fmt: skip
    tokenizer = Gguf(path).tokenizer()

    def merge(text: str) -> list[str]:
        parts = list("▁" + text.replace(" ", "▁"))
        while True:
            pairs = [
                (scores[pieces.index(a + b)], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in made
            ]
            if not pairs:
                return parts
            place = -max(pairs)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]

    for _ in range(200):
        text = "".join(rng.choices("abc ", k=12)).strip() or "a"
        ids = tokenizer.encode(text)
        assert ids[0] == 1 and tokenizer.convert_ids_to_tokens(ids[1:]) == merge(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode("é"), skip_special_tokens=True) == "é"  # of bytes


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"tokenizer.ggml.pre": "poro-chat"}, "gpt2 with pre 'poro-chat'.*tokenizer="),
        ({"tokenizer.ggml.pre": None}, "gpt2 with pre None"),
        ({"tokenizer.ggml.model": "t5"}, "its tokenizer is t5"),
        ({"tokenizer.ggml.tokens": None, "tokenizer.ggml.model": None}, "holds no tokenizer"),
        ({"llama.rope.scaling.type": "linear"}, "scales its rotary positions"),
    ],
)
def test_what_is_not_known_is_named(metadata: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=words):
        opened(write(tmp_path / "a.gguf", **metadata))


def test_tensors_that_the_reader_would_drop_are_named(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="scales its rotary positions"):
        opened(write(tmp_path / "a.gguf", extra=("rope_freqs.weight",)))
    with pytest.raises(Unsupported, match="holds 21 tensors, of which 20 are read"):
        opened(write(tmp_path / "b.gguf", extra=("blk.0.attn_sinks.weight",)))


def test_files_that_are_none(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Usage, match="no such file"):
        sources.model(f"gguf:{tmp_path}/absent.gguf")
    for content in (b"", b"GGUF", b"text", file.read_bytes()[:5000]):
        (tmp_path / "damaged.gguf").write_bytes(content)
        with pytest.raises(Unsupported, match=r"damaged\.gguf"):
            opened(tmp_path / "damaged.gguf")
    source = sources.model(f"gguf:{file}")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Usage, match=r"GGUF files need the package gguf: pip install 'effbench\[gguf\]'"):
        sources.model(f"gguf:{file}")
    with pytest.raises(Unavailable, match="pip install"):
        sources.open_file(source)


def test_models_of_one_name_are_told_apart(tmp_path: Path, file: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
    first, second = tmp_path / "a" / "toy.gguf", tmp_path / "b" / "toy.gguf"
    first.write_bytes(file.read_bytes())
    write(second, {"token_embd.weight": "Q8_0", "blk": "Q8_0"})
    names = [sources.model(f"gguf:{path}").name for path in (first, second)]
    assert names[0] != names[1] and all(name.startswith("gguf:toy.gguf@") for name in names)
    assert sources.model(f"gguf:{file}").name == names[0]  # the same file, wherever it lies
    assert sources.model(f"gguf:{file}", "tiny").name == f"{names[0]} with tokenizer tiny"


def test_what_is_exported_says_all_that_the_file_says(tmp_path: Path, file: Path) -> None:
    run = opened(file)
    run.apply(parse_step("rtn(bits=8, group_size=32)"))
    run.finish()
    stored = run.storage
    artifact.save_dense(run.model, tmp_path / "out", stored)
    keep_beside(tmp_path / "out", None, run.model, run.tokenizer)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode(TEXT) == run.tokenizer.encode(TEXT) and tokenizer.chat_template == TEMPLATE
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert plain.generation_config.eos_token_id == 2 and plain.generation_config.pad_token_id == 2
    ids = torch.tensor([tokenizer.encode("In 1961")])
    made = plain.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert [token for token in made if token != 2] == open_engine(run).generate([ids[0].tolist()], 8, {2})[0]
