"""What the authors' code of gist tokens, AutoCompressors and ICAE computes on a toy Llama with random weights."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import torch
import transformers
from golden import clone, write
from peft import LoraConfig
from torch import Tensor
from transformers.models.llama import modeling_llama

GISTING = ("jayelm/gisting", "3be0d062b6bdfd3caf51843bbc60261a0855f876")
AUTO = ("princeton-nlp/AutoCompressors", "80352a4233c4a70504c75bf95c5f3e6d2533a863")
ICAE = ("getao/icae", "469a46886a92dd5e76b2d12a8bac0fb7ed7d4cdd")
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GIST = SHAPE["vocab_size"]  # the id of the gist token
SUMMARIES, LENGTHS = 3, ((5, 4), (6, 2))  # summary tokens, and lengths of the segments of each substep
SLOTS, RATE, RANK, ALPHA, CONTEXT = 2, 2, 3, 6, 11  # slots of a span, tokens of it to a slot; tokens of the context


def build(**more: object) -> transformers.LlamaConfig:
    """Weights wide enough that all that is computed counts."""
    return transformers.LlamaConfig(**SHAPE, initializer_range=0.3, **more)


def make_masks() -> dict[str, Tensor]:
    clone(*GISTING, "src/data/gist.py")
    from src.data.gist import make_gist_mask

    rows = [
        [1, 2, 3, GIST, GIST, 4, 5],  # a task, two gists, an input
        [GIST, 1, 2, 3, 4, 5, 6],  # no task
        [1, 2, 3, 4, 5, 6, GIST],  # nothing behind
        [1, 2, 3, 4, 5, 6, 7],  # no gist
    ]
    ids = torch.tensor(rows)
    return {"gist.ids": ids, "gist.mask": make_gist_mask(ids, GIST)}


def make_summaries(model: transformers.LlamaForCausalLM) -> dict[str, Tensor]:
    """Logits of two substeps of two segments each, summaries, and gradients of a sum of logits by `weights`."""
    sys.modules["modeling_flash_llama"] = modeling_llama  # the same model, by a kernel that is not here
    clone(*AUTO, "auto_compressor.py")
    from auto_compressor import LlamaAutoCompressorModel

    config = build(summary_length=SUMMARIES, accumulate_summary=True)
    compressor = LlamaAutoCompressorModel(config)
    rows = torch.randn(SUMMARIES, SHAPE["hidden_size"])
    compressor.load_state_dict(model.state_dict() | {"embed_summary.weight": rows})
    first, second = map(sum, LENGTHS)
    ids = torch.randint(1, SHAPE["vocab_size"], (2, first + second))
    parts = ids.split([first, second], 1)
    one = compressor(parts[0], segment_lengths=list(LENGTHS[0]), output_softprompt=True, use_cache=False)
    two = compressor(
        parts[1],
        segment_lengths=list(LENGTHS[1]),
        softprompt=one.softprompt.detach(),
        output_softprompt=True,
        use_cache=False,
    )
    logits = torch.cat([one.logits, two.logits], 1)
    weights = torch.randn_like(logits)
    (weights * logits).sum().backward()
    return {
        "auto.rows": rows,
        "auto.ids": ids,
        "auto.logits": logits.detach(),
        "auto.summaries": two.softprompt.detach(),
        "auto.weights": weights,
        "auto.grad.rows": compressor.embed_summary.weight.grad,
        "auto.grad.table": compressor.model.embed_tokens.weight.grad,
    }


def make_slots(model: transformers.LlamaForCausalLM) -> dict[str, Tensor]:
    """Losses and gradients of a context that is reconstructed, and of one that is gone on with."""
    folder = clone(*ICAE, "code/icae_v2/modeling_icae_multi_span.py")
    sys.path.insert(0, str(folder / "code" / "icae_v2"))
    import modeling_icae_multi_span as authors

    authors.AutoModelForCausalLM = SimpleNamespace(from_pretrained=lambda *_, **__: copy.deepcopy(model))
    authors.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], bias="none")
    named = SimpleNamespace(model_name_or_path="", train=True)
    settings = SimpleNamespace(bf16=True, mean_compression_rate=RATE, fixed_mem_size=SLOTS, restore_from=None)
    icae = authors.ICAE(named, settings, lora)
    found: dict[str, Tensor] = {}
    for name, parameter in icae.icae.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
            short = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".a")
            found[f"icae.lora.{short.replace('.lora_B.default.weight', '.b')}"] = parameter
    slot = icae.vocab_size  # behind a token for padding
    context = torch.randint(1, SHAPE["vocab_size"], (1, CONTEXT)).tolist()[0]
    after = torch.randint(1, SHAPE["vocab_size"], (1, 6)).tolist()[0]
    held = [slot] * (SLOTS * icae.compute_num_segments(CONTEXT))
    forms = {"ae": ([*held, icae.ae_token_id], [*context, 0]), "lm": ([*held, icae.lm_token_id], after)}
    for form, (front, answer) in forms.items():
        icae.zero_grad()
        labels = torch.tensor([[-100] * len(front) + answer])
        out = icae(torch.tensor([context]), torch.tensor([[*front, *answer]]), labels)
        out["loss"].backward()
        grads = {name: parameter.grad.clone() for name, parameter in found.items() if name.startswith("icae.lora")}
        found |= {f"{form}.{name}": grad for name, grad in grads.items()}
        found |= {
            f"icae.{form}.loss": out["loss"].detach(),
            f"icae.{form}.logits": out["logits"].detach(),
            f"icae.{form}.grad.rows": icae.memory_token_embed.weight.grad.clone()[: SLOTS + 2],
        }
    return found | {
        "icae.rows": icae.memory_token_embed.weight[: SLOTS + 2],
        "icae.context": torch.tensor(context),
        "icae.after": torch.tensor(after),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(build()).eval()
    tensors = {f"model.{name}": tensor for name, tensor in llama.state_dict().items()}
    tensors |= make_masks() | make_summaries(llama) | make_slots(llama)
    sources = {"gisting": GISTING, "auto_compressor": AUTO, "icae": ICAE}
    write("memory", __file__, ["transformers", "peft"], {k: v.detach().clone() for k, v in tensors.items()}, **sources)
