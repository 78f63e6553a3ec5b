"""Cases of engines whose processes hold parts of tensors, or of rows: fsdp, tp and sp."""

from __future__ import annotations

from typing import Any

import torch
from ranks import DROPOUT, TIED, Case, Masking, Program, Skipping, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from effbench.nn.train.shards import clip, find_norm

FREE = {"clip": None, "lr": 0.05}  # clipping hides a factor common to all gradients, and shows one in their norm
UNLEARNED = FREE | {"batch_size": 2, "accumulate": 2}
FSDP = {
    "fsdp-1": Case("fsdp(stage=1)", changes={"accumulate": 2}, adam=True),
    "fsdp-2": Case("fsdp(stage=2)", "gpt_neox", changes=FREE | {"validate": 1}),
    "fsdp-3": Case("fsdp()", changes={"accumulate": 2}),
    "fsdp-3-single": Case("fsdp()", changes=FREE, single=True),
    "fsdp-3-tied": Case("fsdp()", "qwen2", shape=TIED),
    "fsdp-3-opt": Case("fsdp()", "opt"),
    "fsdp-2-unlearned": Case("fsdp(stage=2)", methods=(Masking(),), changes=UNLEARNED),
    "fsdp-3-few": Case("fsdp()", changes={"batch_size": 3, "accumulate": 2}),
    "fsdp-3-packed": Case("fsdp()", changes={"layout": "packed"}),
    "fsdp-3-masks": Case("magnitude(sparsity=0.5), fsdp()", changes=FREE),
    "fsdp-3-lora": Case("lora(), checkpointing(), fsdp()"),
    "fsdp-1-lora": Case("lora(), fsdp(stage=1)"),
    "fsdp-3-shared": Case("prefix_tuning(length=4), fsdp()", changes=FREE),  # one network feeds all blocks
    "fsdp-3-kd": Case("kd(), fsdp()"),
    "fsdp-3-overflow": Case("fsdp()", changes=FREE, methods=(Skipping(),), overflows={0: "loss"}),
    "fsdp-3-fp16": Case("fp16(scale=1024.0), fsdp()", single=True, coarse=True),
    "fsdp-2-fp8": Case("fp8(), fsdp(stage=2)", single=True, coarse=True),
    "fsdp-3-rates": Case("fsdp()", changes={"lr": (0.5, 0.1)}),
}
TP = {
    "tp-llama": Case("tp()", changes=FREE),
    "tp-single": Case("tp()", single=True),
    "tp-neox": Case("tp()", "gpt_neox", changes={"layout": "packed"}),
    "tp-opt": Case("tp()", "opt", changes=FREE),
    "tp-qwen3": Case("kd(), checkpointing(), tp()", "qwen3"),
    "tp-neox-grouped": Case("gqa(kv_heads=2), tp()", "gpt_neox", changes=FREE),
    "tp-tied": Case("tp()", "qwen2", changes=FREE, shape=TIED),
    "tp-fp16": Case("fp16(scale=1024.0), tp()", single=True, coarse=True),
    "tp-overflow": Case("tp()", methods=(Skipping(),), overflows={0: "loss"}),
}
SP = {
    "megatron-llama": Case("sp()", changes=FREE | {"validate": 1}),
    "megatron-single": Case("sp()", single=True),
    "megatron-opt": Case("sp()", "opt", changes=FREE),
    "megatron-qwen3": Case("sp()", "qwen3", shape=TIED),
    "megatron-neox": Case("checkpointing(), sp()", "gpt_neox"),
    "megatron-bf16": Case("bf16(), sp()", single=True, coarse=True),
    "megatron-overflow": Case("sp()", methods=(Skipping(),), overflows={0: "loss"}),
    "ulysses-llama": Case("kd(), sp(kind='ulysses')", changes=FREE),
    "ulysses-single": Case("sp(kind='ulysses')", single=True),
    "ulysses-gpt2": Case("sp(kind='ulysses')", "gpt2", changes=FREE | {"layout": "packed"}),
    "ulysses-gpt2-grouped": Case("gqa(kv_heads=2), sp(kind='ulysses')", "gpt2", changes=FREE),
    "ulysses-opt": Case("checkpointing(policy='sqrt'), sp(kind='ulysses')", "opt"),
    "ulysses-lora": Case("lora(), sp(kind='ulysses')", "qwen3", changes=FREE, shape=TIED),
    "ulysses-fp8": Case("fp8(), sp(kind='ulysses')", "opt", single=True, coarse=True),
    "ulysses-masks": Case("magnitude(sparsity=0.5), sp(kind='ulysses')", "gpt_neox"),
}
FSDP_REFUSED = {  # and what is said
    "fsdp texts": (
        Case("fsdp(), gkd(lmbda=0.5, new_tokens=4, prompt_tokens=3)"),
        "passes its own examples through the model",
    ),
    "fsdp matrices": (Case("fsdp(stage=3), galore(rank=4)"), "keeps states of whole matrices"),
    "fsdp gradients": (Case("fsdp(stage=2), adalora(initial_rank=4, rank=2)"), "reads whole gradients after each step"),
    "fsdp soft prompt": (Case("fsdp(), prompt_tuning(length=4)"), "soft prompt reads the table"),
}
TP_REFUSED = {
    "tp lora": (Case("tp(), lora()"), "LoRALinear: only plain linears"),
    "tp prefix": (Case("tp(), prefix_tuning(length=4)"), "whole activations of a block"),
}
SP_REFUSED = {
    "sp masks": (Case("sp(), magnitude(sparsity=0.5)"), "PrunedLinear: only plain linears"),
    "sp fp8": (Case("sp(), fp8()"), "changes how linears compute"),
    "sp hidden": (Case("sp(kind='ulysses'), feature_kd()"), "each rank has some tokens of it"),
}
KILLED = ("fsdp(stage=1)", "fsdp(stage=2)", "fsdp()", "tp()", "sp()")
COST = ("ddp()", "fsdp(stage=1)", "fsdp(stage=2)", "fsdp()", "tp()", "sp()", "sp(kind='ulysses')")


def measure(ranks: int) -> dict[str, Any]:
    """The norm of mixed gradients, and what one of two ranks spends on each engine."""
    cases = {engine: Case(engine, single=True, adam=True, changes={"steps": 7}) for engine in COST if ranks == 2}
    costs = {engine: train(case, ranks).report["cost"] for engine, case in cases.items()}
    return {"mixed": measure_mixed(ranks), "costs": costs}


def measure_mixed(ranks: int) -> tuple[float, list[Tensor]]:
    """The norm of gradients in parts (some uneven), replicated and plain, and what clipping to 1 leaves of them."""
    mesh = init_device_mesh("cpu", (ranks,))
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(4)]
    placed = [
        distribute_tensor(wholes[0], mesh, [Shard(0)], src_data_rank=None),
        distribute_tensor(wholes[1], mesh, [Shard(1)], src_data_rank=None),
        distribute_tensor(wholes[2], mesh, [Replicate()], src_data_rank=None),
        wholes[3],
    ]
    parameters = [nn.Parameter(torch.zeros_like(tensor)) for tensor in placed]
    for parameter, gradient in zip(parameters, placed, strict=True):
        parameter.grad = gradient.clone()
    norm = float(find_norm(parameters))
    clip(parameters, 1.0)
    grads: list[Any] = [parameter.grad for parameter in parameters]
    return norm, [getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads]


PROGRAM = Program(
    "sharded",
    cases=FSDP | TP | SP,
    killed={e: Case(e, "opt", shape=DROPOUT, changes={"steps": 4}, single=True, adam=True) for e in KILLED},
    four=("fsdp-2-unlearned", "fsdp-3-few", "tp-neox", "megatron-opt", "ulysses-gpt2"),
    refused=FSDP_REFUSED | TP_REFUSED | SP_REFUSED,
    measure=measure,
)
