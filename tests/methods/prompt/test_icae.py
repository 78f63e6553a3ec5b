"""ICAE: the authors' losses and gradients, a decoder that stays as it is, and contexts that come back better."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys_cache import text
from toys_texts import at, golden
from toys_training import fit

from effbench.checks import VOCABULARY, probe, toy_run
from effbench.core.errors import Refused, Unsupported, Usage
from effbench.core.recipe import parse, parse_step
from effbench.core.views import Example
from effbench.methods.peft._lowrank import LoRALinear
from effbench.methods.prompt.icae import ICAE
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.memory import find_memory
from effbench.nn.run import ModelRun
from effbench.nn.train.batches import IGNORED, collate
from effbench.nn.train.loss import mean_cross_entropy

GOLDEN = golden("memory")
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
LORA = "lora(rank=3, alpha=6, targets=('q_proj', 'v_proj'), adapter='encoder')"


def opened(method: ICAE, architecture: str = "llama", lora: str = LORA, **shape: Any) -> ModelRun:
    run = toy_run(architecture, shape=shape)
    run.apply(parse_step(lora))
    run.apply(method)
    return at(run, 0)


def authors(method: ICAE) -> ModelRun:
    """The authors' model with their adapter and memory tokens."""
    run = opened(method, **SHAPE, vocab_size=32)
    for name, parameter in run.model.named_parameters():
        if name == "memory.rows":
            parameter.data = GOLDEN["icae.rows"]
        elif name.rpartition(".")[2] in ("a", "b"):
            parameter.data = GOLDEN[f"icae.lora.{name}"]
        else:
            parameter.data = GOLDEN[f"model.{name.replace('.base.', '.')}"]
    return run


@pytest.mark.parametrize("form", ["ae", "lm"])
def test_losses_and_gradients_are_the_authors(form):
    method = ICAE(tokens=2, rate=2, reconstruct=float(form == "ae"))
    run = authors(method)
    context, after = GOLDEN["icae.context"].tolist(), GOLDEN["icae.after"].tolist()
    # of a prompt that cannot be divided all but its last token is the context
    example = Example("a", (*context, *after), len(context) + 1)
    batch = method.batch(collate([example], 0, run.device), run)
    batch["labels"][0, -len(after)] = after[0] if form == "lm" else batch["labels"][0, -len(after)]
    out = method.forward(batch, run)
    assert torch.allclose(out.logits, GOLDEN[f"icae.{form}.logits"], atol=1e-5)
    loss = mean_cross_entropy(out.logits, batch)
    assert float(loss.detach()) == pytest.approx(float(GOLDEN[f"icae.{form}.loss"]), rel=1e-5)
    loss.backward()
    assert torch.allclose(find_memory(run.model).rows.grad, GOLDEN[f"icae.{form}.grad.rows"], atol=1e-6)
    graded = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    assert len(graded) == 9
    for name, grad in graded.items():
        if name != "memory.rows":
            assert torch.allclose(grad, GOLDEN[f"{form}.icae.lora.{name}"], atol=1e-6), name


def test_rows_hold_slots_a_sign_and_what_is_learned():
    """[AE] and the context with its end, or [LM] and what follows the context, of which the answer alone is learned."""
    first = [VOCABULARY] * 6
    for share, sign, behind, learned in (
        (1.0, 2, [*range(1, 12), 0], [*range(1, 12), 0]),
        (0.0, 3, [12, 13, 14], [13, 14]),
    ):
        method = ICAE(tokens=2, rate=2, reconstruct=share)
        run = opened(method)
        batch = method.batch(collate([Example("a", tuple(range(1, 15)), 12)], 0, run.device), run)
        assert batch["input_ids"][0].tolist() == [*first, VOCABULARY + sign, *behind]
        labels = batch["labels"][0]
        assert labels[labels != IGNORED].tolist() == learned
        spans = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
        slots = [VOCABULARY, VOCABULARY + 1]
        assert batch["spans"].tolist() == [[*spans[0], *slots], [*spans[1], *slots], [*spans[2], *slots, 0]]


def test_about_so_many_examples_are_reconstructed_as_is_asked():
    method = ICAE(tokens=1, reconstruct=0.3)
    run = opened(method)
    batch = method.batch(collate([Example(str(i), tuple(text(9, seed=i))) for i in range(200)], 0, run.device), run)
    share = float((batch["input_ids"] == VOCABULARY + 1).any(1).float().mean())
    assert 0.2 < share < 0.4


def test_slots_of_rows_of_unlike_length_stand_in_their_own_row():
    method = ICAE(tokens=2, rate=2, reconstruct=1.0)
    run = opened(method)
    rows = [Example(str(i), tuple(text(n + 1, seed=i)), n) for i, n in enumerate((13, 5, 9))]
    with torch.no_grad():
        together = method.batch(collate(rows, 0, run.device), run)
        logits = method.forward(together, run).logits
        for i, row in enumerate(rows):
            alone = method.batch(collate([row], 0, run.device), run)
            assert torch.allclose(
                method.forward(alone, run).logits[0], logits[i, : alone["labels"].shape[1]], atol=1e-5
            )


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt", "gpt2"])
def test_memory_that_is_read_is_memory_that_is_trained(architecture):
    """What follows a context scores as in a row of training, through the engine and its caches."""
    lora = LORA if architecture in ("llama", "opt") else "lora(rank=3, adapter='encoder')"
    method = ICAE(tokens=2, rate=2, reconstruct=0.0)
    run = opened(method, architecture, lora)
    for module in run.model.modules():
        if isinstance(module, LoRALinear):
            module.b.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    ids = text(16, seed=1)
    batch = method.batch(collate([Example("a", tuple(ids), 12)], 0, run.device), run)
    with torch.no_grad():
        logits = method.forward(batch, run).logits[0].log_softmax(-1)
    memory = method.remember(ids[:11], run)
    assert memory is not None and len(memory) == 7
    scored = open_engine(run).score([([*memory, ids[11]], ids[12:])])[0].token_logprobs
    assert scored == pytest.approx([float(logits[7 + i, token]) for i, token in enumerate(ids[12:])], abs=2e-5)
    assert method.remember(ids[:5], run) is None, "no shorter than what it stands for"


def test_the_decoder_stays_as_it_was_and_contexts_come_back_better():
    run = toy_run(shape={"initializer_range": 0.1})
    before = probe(run)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.apply(parse_step("lora(rank=8, adapter='encoder')"))
    method = ICAE(tokens=4, rate=2, reconstruct=1.0)
    run.apply(method)
    assert torch.equal(probe(run), before)
    run.data.pool = [Example(str(i), (*text(8, seed=i), 1), 8) for i in range(8)]

    def reconstruct(turned: int = 0) -> float:
        """From the slots of the same context, or of the next."""
        batch = method.batch(collate(run.data.pool, 0, run.device), at(run, 0))
        with torch.no_grad():
            logits = method.forward(batch | {"spans": batch["spans"].roll(turned, 0)}, run).logits
        run.step = None
        return float(mean_cross_entropy(logits, batch))

    start = reconstruct()
    fit(run, steps=60, lr=1e-2, batch_size=8, clip=1.0)
    assert reconstruct() < 0.1 * start
    assert reconstruct(turned=1) > 0.8 * start, "what comes back is not what is in the slots"
    run.finish()
    assert torch.equal(probe(run), before)
    after = {name.replace(".base.", "."): value for name, value in run.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    moved = [name for name in after if name not in weights]
    assert {name.rpartition(".")[2] for name in moved} == {"a", "b", "rows"}


def test_the_adapter_counts_while_a_context_is_encoded_and_at_no_other_time():
    method = ICAE(tokens=2, rate=2)
    run = opened(method)
    parts = [module for module in run.model.modules() if isinstance(module, LoRALinear)]
    states: list[set[bool]] = []
    handle = run.model.base_model.register_forward_pre_hook(lambda *_: states.append({part.active for part in parts}))
    probe(run)
    method.remember(text(20), run)
    probe(run)
    handle.remove()
    assert states == [{False}, {True}, {False}]
    ids: Tensor = torch.tensor([text(6)])
    run.adapter("encoder")
    for part in parts:
        part.b.data += 0.1
    assert not torch.equal(run.model(ids).logits, toy_run().model(ids).logits), "the adapter would count"


def test_without_an_encoder_memory_tokens_alone_are_trained():
    run = toy_run()
    run.apply(ICAE(tokens=2, encoder=""))
    assert [name for name, value in run.model.named_parameters() if value.requires_grad] == ["memory.rows"]


def test_what_it_cannot_do_without_is_asked_for():
    run = toy_run()
    with pytest.raises(Refused, match="put lora\\(adapter='encoder'\\) before icae"):
        run.apply(ICAE())
    with pytest.raises(Usage, match="reconstruct is a share"):
        ICAE(reconstruct=1.5)
    with pytest.raises(Unsupported, match="a span with its slots takes 640 positions"):
        method = ICAE()
        method.remember(text(512), opened(method))
    with pytest.raises(Unsupported, match="computes again"):
        run = opened(ICAE(tokens=2))
        run.apply(parse_step("checkpointing()"))
        fit(run, steps=1)
    assert [step.key for step in parse(ICAE.published).steps] == ["lora", "icae", "fit"]
