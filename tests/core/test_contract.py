"""What broke when unlike methods met the contract: every break is a test that passes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from effbench.checks import VOCABULARY, fit_two_steps, probe, toy, toy_run
from effbench.core.errors import Conflict, Refused, Unsupported, Usage
from effbench.core.kinds import Cache, Prompt, Select, Swap, Train, Weights
from effbench.core.recipe import Recipe, parse, parse_step
from effbench.core.run import FitReport
from effbench.core.views import Codec, Segments
from effbench.nn.files import artifact
from effbench.nn.infer.cache import SlotCache
from effbench.nn.infer.engine import open_engine
from effbench.nn.model.attention import AttentionExtra, own_attention
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import MaskedLinear, Replaced, dense_weight, kept, rebuilt, stored_bytes
from effbench.nn.train.fit import fit
from effbench.nn.train.settings import FitSettings
from effbench.nn.train.slots import Precision as PrecisionSlot
from effbench.probes.inputs import Windows, nll, predict


@dataclasses.dataclass(frozen=True)
class Prune(Weights):
    """Row-wise |weight| x input norm: a private pruning method."""

    needs: ClassVar = {"norm"}
    sparsity: float = 0.5

    def compress(self, layer):
        score = layer.weight.abs() * layer.inputs.norm
        cut = score.kthvalue(int(score.shape[1] * self.sparsity), dim=1, keepdim=True).values
        keep = score > cut if layer.kept is None else (score > cut) & layer.kept
        return MaskedLinear.of(layer.weight, keep, layer.bias)


class LowRank(Replaced):
    """A trainable low-rank addition around whatever linear stood there."""

    def __init__(self, base: nn.Module, rank: int) -> None:
        weight = dense_weight(base)
        super().__init__(weight.shape[1], weight.shape[0])
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) * 0.02)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def dense_weight(self) -> Tensor:
        return dense_weight(self.base) + (self.b @ self.a).detach()

    def kept(self) -> Tensor | None:
        return None

    def config(self) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@dataclasses.dataclass(frozen=True)
class Adapter(Swap):
    """A private Swap with a loss term and an on_step hook of its own, as AdaLoRA has."""

    rank: int = 4
    penalty: float = 0.0

    def replace(self, module, site):
        return LowRank(module, self.rank)

    def settle(self, module):
        mask = kept(module.base)
        weight = dense_weight(module)
        return rebuilt(module.base, weight if mask is None else weight * mask)

    def loss(self, batch, out, run):
        terms = [p.square().sum() for n, p in run.model.named_parameters() if n.endswith(".b")]
        return {"penalty": self.penalty * torch.stack(terms).sum()}

    def on_step(self, run):
        run.log.notes.setdefault("adapter_steps", []).append((run.step.index, run.step.total))


@dataclasses.dataclass(frozen=True)
class Precision(Train, PrecisionSlot):
    """Claims the slot that bf16 and fp8 claim."""

    claims: ClassVar = ("train.precision",)
    name: str = "a"

    def forward(self, run, batch=None):
        return torch.autocast("cpu", torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Extra(Train):
    """A loss term that must not outlive its fit."""

    def loss(self, batch, out, run):
        run.log.notes["extra"] = run.log.notes.get("extra", 0) + 1
        return {"extra": out.logits.float().mean() * 0}


@dataclasses.dataclass(frozen=True)
class Recent(Cache):
    """Keeps the most recent tokens and those with the most attention mass."""

    observes: ClassVar = True

    budget: int = 8

    def capacity(self, prompt):
        return prompt * 0 + self.budget

    def recents(self, capacity):
        return capacity // 2

    def score(self, slots, state):
        return slots.mass


@dataclasses.dataclass(frozen=True)
class Half(Cache):
    """Stores keys and values in half precision."""

    def codecs(self):
        codec = Codec(lambda units: (units.half(),), lambda stored, width: stored[0].float())
        return codec, codec


@dataclasses.dataclass(frozen=True)
class DropWords(Prompt):
    """Keeps the first words of each context."""

    keep: float = 0.5

    def rewrite(self, segments, run):
        words = [context.split() for context in segments.contexts]
        return segments.with_contexts([" ".join(part[: round(len(part) * self.keep)]) for part in words])


@dataclasses.dataclass(frozen=True)
class Shortest(Select):
    """Prefers examples that begin with a small token."""

    def order(self, examples, run):
        return sorted(range(len(examples)), key=lambda i: examples[i].ids)


def zeros(run) -> float:
    linears = [module for _, module in Blocks(run.model).linears()]
    return sum(int((dense_weight(m) == 0).sum()) for m in linears) / sum(dense_weight(m).numel() for m in linears)


def fitted(run, **changes: Any) -> FitReport:
    settings = FitSettings(steps=3, lr=1e-2, batch_size=4, schedule="constant", warmup=0.0, max_length=32)
    return fit(run, dataclasses.replace(settings, **changes))


# 1. The linear protocol


def test_pruned_weights_stay_zero_through_fit_and_through_a_merged_adapter():
    run = toy_run()
    run.apply(Prune())
    assert zeros(run) >= 0.5
    fitted(run)
    assert zeros(run) >= 0.5
    run.apply(Adapter())
    fitted(run)
    run.finish()
    assert zeros(run) >= 0.5
    assert not any(isinstance(m, LowRank) for m in run.model.modules())


def test_weights_method_reads_through_replaced_linears_and_visits_only_the_outermost():
    run = toy_run()
    run.apply(Prune(sparsity=0.25))
    run.apply(Prune(sparsity=0.5))
    assert zeros(run) >= 0.5
    run = toy_run()
    run.apply(Adapter())
    paths = [path for path, _ in Blocks(run.model).linears()]
    assert len(paths) == len(set(paths)) == 14
    assert not any(path.endswith("base") for path in paths)


@pytest.mark.parametrize("later", ["rtn()", "gptq()", "nf4()"])
def test_later_quantization_keeps_the_zeros_of_pruning(later):
    run = toy_run()
    run.apply(Prune())
    holes = {path: dense_weight(m) == 0 for path, m in Blocks(run.model).linears()}
    run.apply(parse_step(later))
    for path, module in Blocks(run.model).linears():
        assert not dense_weight(module)[holes[path]].any(), path


# 2. Settling and the life of plans


def test_fit_may_come_several_times_and_settling_waits_for_the_end():
    run = toy_run()
    run.apply(Adapter())
    fitted(run)
    assert any(isinstance(m, LowRank) for m in run.model.modules()), "settled inside fit"
    fitted(run)
    run.finish()
    assert not any(isinstance(m, LowRank) for m in run.model.modules())


def test_an_adapter_that_was_never_trained_is_not_settled():
    run = toy_run()
    run.apply(Adapter())
    run.finish()
    assert any(isinstance(m, LowRank) for m in run.model.modules())


def test_a_weights_method_finds_settled_linears():
    run = toy_run()
    run.apply(Adapter())
    fitted(run)
    run.apply(Prune())
    assert all(isinstance(m, MaskedLinear) for _, m in Blocks(run.model).linears())


def test_slots_have_one_writer_per_fit():
    run = toy_run()
    run.apply(Precision(name="a"))
    with pytest.raises(Conflict, match=r"train\.precision is already set by .*cannot also set it"):
        run.apply(Precision(name="b"))
    fitted(run)
    run.apply(Precision(name="b"))  # the first fit used its plan up
    fitted(run)


def test_a_conflict_is_seen_before_anything_runs():
    fit = parse_step("fit()")
    Recipe("legal", (Precision(name="a"), fit, Precision(name="b"), fit)).check()
    with pytest.raises(Conflict):
        Recipe("clash", (Precision(name="a"), Precision(name="b"), fit)).check()
    with pytest.raises(Conflict, match="encoder"):
        Recipe("two encoders", (Half(), Half())).check()


def test_hooks_do_not_leak_into_the_next_fit():
    run = toy_run()
    run.apply(Extra())
    fitted(run)
    calls = run.log.notes["extra"]
    fitted(run)
    assert run.log.notes["extra"] == calls == 3


# 3. Hooks on every kind


def test_a_swap_may_bring_loss_terms_and_step_hooks():
    run = toy_run()
    run.apply(Adapter(penalty=1.0))
    fitted(run)
    assert run.log.notes["adapter_steps"] == [(0, 3), (1, 3), (2, 3)]


def test_on_step_sees_gradients_after_the_step_and_before_they_are_cleared():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        def on_step(self, run):
            seen.append(sum(p.grad is not None for p in run.model.parameters()))

    run = toy_run()
    run.apply(Watch())
    fitted(run)
    assert len(seen) == 3 and min(seen) > 0


# 4. One owner of attention


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt2", "gpt_neox"])
def test_owned_attention_equals_the_models_own(architecture):
    run = toy_run(architecture)
    ids = torch.arange(1, 21).view(2, 10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, :4] = False
    plain = open_engine(run).logits(ids, mask)[mask]
    run.infer.chain("attend_observe").append(lambda module, weights: None)
    assert torch.allclose(open_engine(run).logits(ids, mask)[mask], plain, atol=1e-5)
    run.infer.close()
    assert torch.equal(open_engine(run).logits(ids, mask)[mask], plain)


class Extended(AttentionExtra):
    """Keys and values in front."""

    def __init__(self, prefix: nn.Parameter) -> None:
        super().__init__()
        self.prefix = prefix

    def before(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return (self.prefix.expand(len(query), -1, -1, -1),) * 2


def test_extra_keys_give_the_same_loss_and_gradient_under_checkpointing():
    def loss_and_gradient(checkpointing: bool):
        run = toy_run()
        prefix = nn.Parameter(torch.randn(1, 4, 3, 32, generator=torch.Generator().manual_seed(3)))
        for block in Blocks(run.model).blocks:
            block.self_attn.add_module("extra", Extended(prefix))
        if checkpointing:
            run.model.gradient_checkpointing_enable()
        run.model.train()
        with own_attention(run.model, run.infer):
            ids = torch.arange(1, 17).view(1, 16)
            out = run.model(input_ids=ids, labels=ids, use_cache=False)
            out.loss.backward()
        return out.loss.detach(), prefix.grad

    plain, again = loss_and_gradient(False), loss_and_gradient(True)
    assert torch.equal(plain[0], again[0]) and torch.equal(plain[1], again[1])
    assert plain[1].abs().sum() > 0


# 5. Caches that evict and encode

PROMPTS = [list(range(1, 24)), list(range(3, 15)), [5, 6, 7]]


def test_eviction_and_encoding_compose_and_bytes_are_those_held():
    run = toy_run()
    for method in (Recent(budget=8), Half()):
        run.apply(method)
    engine = open_engine(run)
    state = engine.prefill(torch.tensor(PROMPTS[:1]))
    cache: SlotCache = state.cache
    assert cache.changed().all() and cache.slot_layers[0].held() == 8
    # layers, heads, slots; k and v of so many channels in half precision, where a token stands and its mass
    assert cache.nbytes().tolist() == [2 * 4 * 8 * (2 * 32 * 2 + 4 + 4)]
    state = engine.decode(state)
    assert cache.slot_layers[0].get_seq_length() == 24 and cache.slot_layers[0].held() == 8


def test_an_evicting_cache_does_not_look_at_padding():
    run = toy_run()
    run.apply(Recent(budget=8))
    alone = [open_engine(run).generate([prompt], 6, set())[0] for prompt in PROMPTS]
    assert open_engine(run).generate(PROMPTS, 6, set()) == alone


def test_a_cache_that_keeps_everything_equals_no_cache_method():
    run = toy_run()
    pairs = [(prompt, [9, 8, 7]) for prompt in PROMPTS]
    plain = [s.logprob for s in open_engine(run).score(pairs)]
    run.apply(Recent(budget=1000))
    assert [s.logprob for s in open_engine(run).score(pairs)] == pytest.approx(plain, abs=1e-5)


def test_heavy_hitters_follow_an_explicit_attention_matrix():
    run = toy_run()
    run.apply(Recent(budget=1000))
    masses = []
    run.infer.chain("attend_observe").append(lambda module, w: masses.append(w.sum((2,))))
    cache = open_engine(run).prefill(torch.tensor(PROMPTS[:1])).cache
    # Of each layer: the pass over the prompt but for its last token, and the pass over that.
    for layer, before, after in zip(cache.slot_layers, masses[:2], masses[2:], strict=True):
        assert torch.allclose(layer.mass, nn.functional.pad(before, (0, 1))[0] + after[0], atol=1e-5)


def test_rejected_drafts_can_be_forgotten():
    run = toy_run()
    run.apply(Half())
    state = open_engine(run).prefill(torch.tensor([PROMPTS[0]]))
    layer = state.cache.slot_layers[0]
    layer.crop(-5)
    assert layer.get_seq_length() == layer.held() == len(PROMPTS[0]) - 5


# 6. The scoring protocol is part of the metric


def test_an_evicting_cache_changes_scores_and_one_that_cannot_evict_is_refused():
    run = toy_run()
    pairs = [(list(range(1, 40)), [9, 8, 7, 6])]
    scored = open_engine(run).score(pairs)[0]
    plain, first = scored.logprob, scored.token_logprobs[0]
    run.apply(Recent(budget=4))
    engine = open_engine(run)
    assert engine.score(pairs)[0].logprob != pytest.approx(plain, abs=1e-6)
    assert engine.score([(pairs[0][0], [9])])[0].logprob != pytest.approx(first, abs=1e-6)
    text = Windows(torch.arange(1, 41)[None], 36, "", "")
    assert sum(len(part.targets) for part in predict(engine, text, block=1)) == 4
    run = toy_run()
    run.apply(Recent(budget=100))
    engine = open_engine(run)
    engine.score(pairs)
    assert not any(use.changed for use in engine.uses)
    with pytest.raises(Refused, match="changed nothing of what was measured"):
        nll(run, text, 1)


# 7. Roles


def test_the_reference_stays_the_original_and_snapshots_are_frozen_copies():
    run = toy_run()
    original = probe(run)
    fitted(run)
    run.snapshot("teacher")
    trained = probe(run)
    fitted(run)
    assert torch.equal(open_engine(run, run.reference).logits(torch.arange(48).view(2, 24) * 7 % 95 + 1), original)
    assert torch.equal(open_engine(run, run.role("teacher")).logits(torch.arange(48).view(2, 24) * 7 % 95 + 1), trained)
    assert not any(p.requires_grad for p in run.role("teacher").parameters())
    with pytest.raises(Usage, match="no model is called 'student'"):
        run.role("student")


# 8. Data that changes during training


def test_a_sampler_draws_and_sees_losses():
    class Sampler:
        def __init__(self):
            self.losses = []

        def draw(self, step, batch_size):
            return [step] * batch_size

        def seen(self, places, losses):
            assert losses.shape == (4,) and losses.isfinite().all()
            self.losses.append((places, losses))

    sampler = Sampler()

    @dataclasses.dataclass(frozen=True)
    class Feedback(Train):
        def sampler(self, examples, run):
            return sampler

    run = toy_run()
    run.apply(Feedback())
    fitted(run)
    assert [indices for indices, _ in sampler.losses] == [[0] * 4, [1] * 4, [2] * 4]


def test_selections_refine_each_other_and_leave_the_pool():
    run = toy_run()
    run.apply(Shortest(keep=0.5))
    fitted(run)  # which takes the order; the next one is for the next fit
    run.apply(Shortest(keep=0.125))
    assert len(run.data.train) == 8 and len(run.data.pool) == 64
    best = sorted(run.data.pool, key=lambda e: e.ids)[:8]
    assert run.data.train == best


# 9. Statistics


def test_global_thresholds_gradients_and_raw_inputs_reach_the_method():
    found = {}

    @dataclasses.dataclass(frozen=True)
    class Global(Weights):
        needs: ClassVar = {"norm", "hessian", "grad2", "raw"}

        def prepare(self, run):
            found["linears"] = sum(1 for _ in Blocks(run.model).linears())

        def compress_block(self, block, shared):
            found.setdefault("groups", [group.names for group in shared])
            layers = block.layers(shared)
            for layer in layers:
                inputs = layer.inputs
                assert inputs.raw.shape[1] == layer.weight.shape[1]
                expected = inputs.raw.square().sum(0).sqrt()  # all tokens fit in the sample here
                assert torch.allclose(inputs.norm, expected, rtol=1e-4)
                moment = inputs.raw.T @ inputs.raw / inputs.count
                assert torch.allclose(inputs.second_moment.float(), moment, atol=1e-4)
                assert inputs.grad2.shape == layer.weight.shape and inputs.grad2.min() >= 0
            shared = {id(layer.inputs._outer) for layer in layers[:3]}
            assert len(shared) == 1, "q, k and v do not share their Hessian"
            return {layer.name: MaskedLinear.of(layer.weight, layer.weight != 0) for layer in layers}

    run = toy_run()
    run.apply(Global())
    assert found["linears"] == 14 and len(found["groups"]) == 4


def test_blocks_are_calibrated_behind_compressed_blocks_unless_the_method_says_otherwise():
    seen: dict[bool, list[Tensor]] = {True: [], False: []}

    def method(in_sequence: bool):
        @dataclasses.dataclass(frozen=True)
        class Watch(Weights):
            needs: ClassVar = {"norm"}
            sequential: ClassVar = in_sequence

            def compress(self, layer):
                seen[in_sequence].append(layer.inputs.norm)
                return MaskedLinear.of(layer.weight * 0.5, layer.weight != 0)

        return Watch()

    for in_sequence in (True, False):
        toy_run().apply(method(in_sequence))
    half = len(seen[True]) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[True][:half], seen[False][:half], strict=True))
    assert not torch.equal(seen[True][half], seen[False][half])


def test_gradients_equal_autograd_sequence_by_sequence():
    from effbench.nn.calibration import mean_gradients

    run = toy_run(sequences=3, length=16)
    found = mean_gradients(run, {"grad2"})["grad2"]
    path = "model.layers.1.mlp.down_proj"
    weight = run.model.get_submodule(path).weight
    total = torch.zeros_like(weight)
    for ids in run.calibration():
        loss = run.model(input_ids=ids[None], labels=ids[None]).loss
        total += torch.autograd.grad(loss, weight)[0].square()
    assert torch.allclose(found[path], total / 3)


# 10. Precision


def test_precision_is_that_of_every_forward_pass_and_of_nothing_else():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watch(Train):
        def loss(self, batch, out, run):
            seen.append((out.logits.dtype, torch.is_autocast_enabled("cpu")))
            return {}

    run = toy_run()
    for method in (Precision(), Watch()):
        run.apply(method)
    fitted(run)
    assert seen == [(torch.bfloat16, False)] * 3
    run.apply(Watch())
    fitted(run)
    assert seen[3:] == [(torch.float32, False)] * 3, "the plan was used up"


# 11. Optimizers, and methods without effect


def test_an_optimizer_is_a_slot():
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Plain(Train):
        def optimizer(self, groups, run):
            calls.append("optimizer")
            return torch.optim.SGD(groups, lr=0.1)

    run = toy_run()
    run.apply(Plain())
    with pytest.raises(Conflict, match=r"train\.optimizer"):
        run.apply(Plain())
    fitted(run)
    assert calls == ["optimizer"]


def test_a_recipe_that_changed_nothing_is_refused():
    run = toy_run()
    run.apply(Extra())  # hooks for a fit that never comes
    with pytest.raises(Refused, match="changed nothing"):
        run.finish()
    run = toy_run()
    run.apply(Recent())
    run.finish()


# 12. Structure


def test_blocks_are_renumbered_after_one_is_dropped():
    run = toy_run()
    view = Blocks(run.model)
    del view.blocks[0]
    view.renumber()
    assert run.model.config.num_hidden_layers == 1
    assert [m.layer_idx for m in run.model.modules() if hasattr(m, "layer_idx")] == [0]
    open_engine(run).generate([[1, 2, 3]], 4, set())


# 13. Saving


def test_a_missing_tensor_is_fatal(tmp_path):
    from safetensors.torch import load_file, save_file

    run = toy_run()
    run.apply(Prune())
    run.finish()
    artifact.save(run.model, tmp_path / "a", run.storage)
    loaded = artifact.load(tmp_path / "a")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, run.model(ids).logits)
    tensors = load_file(tmp_path / "a" / artifact.WEIGHTS)
    tensors.popitem()
    save_file(tensors, tmp_path / "a" / artifact.WEIGHTS)
    with pytest.raises(Unsupported, match="missing"):
        artifact.load(tmp_path / "a")


def test_bytes_reported_are_bytes_written(tmp_path):
    run = toy_run()
    run.apply(Prune())
    written = artifact.save(run.model, tmp_path / "a", run.storage)
    assert sum(stored_bytes(run.model, run.storage)) == written


# 14. Step strings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rtn(bits='4')", "bits='4': must be a whole number, not str"),
        ("rtn(bits=-4)", "bits must be one of"),
        ("rtn(bits=True)", "must be a whole number, not bool"),
        ("rtn(4)", "must be named"),
        ("rtn(bits=4, bits=3)", "rtn.*twice|repeated"),
        ("rtn(bit=4)", "did you mean 'bits'"),
        ("rtnn()", "did you mean 'rtn'"),
        ("rtn", r"write rtn\(\)"),
        ("rtn(bits=2+2)", "not a literal"),
        ("rtn(bits=__import__('os'))", "not a literal"),
        ("rtn(**{})", "not allowed"),
        ("os.system('x')", "not the name of a method"),
        ("rtn(", "cannot be read"),
        ("rtn(grid='other')", "must be one of"),
        ("fit(steps=0)", "at least 1"),
    ],
)
def test_step_strings_are_read_strictly(text, message):
    with pytest.raises(Usage, match=message):
        parse(text)


def test_equal_settings_have_one_identity():
    assert parse_step("fit(lr=1)") == parse_step("fit(lr=1.0)")
    assert str(parse_step("fit(lr=1, steps=200)")) == "fit(lr=1.0)"
    assert parse_step(str(parse_step("fit(clip=None)"))).clip is None


# 15. Prompts


def test_a_prompt_method_sees_segments_and_shortens_only_what_it_may():
    run = toy_run()
    run.apply(DropWords(keep=0.5))
    prompt = Segments(instruction="Read. ", contexts=("one two three four\n", "five six "), question="What?")
    assert run.rewrite(prompt).text() == "Read. one two\nfive What?"


# 16. Identity


def test_files_that_a_method_reads_are_named(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Reads(Train):
        path: str = str(tmp_path / "labels")

        def batch(self, batch, run):
            return batch

        def files(self):
            from pathlib import Path

            return (Path(self.path),)

    assert Reads().files() == (tmp_path / "labels",)


# fit itself


def test_fit_equals_a_plain_torch_loop_bit_for_bit():
    run = toy_run()
    settings = {"steps": 4, "lr": 1e-3, "clip": None}
    examples = run.data.train
    report = fitted(run, **settings)
    model = toy().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    from effbench.nn.train.samplers import Shuffled

    sampler = Shuffled(len(examples), 0)
    for step in range(4):
        ids = torch.tensor([examples[i].ids for i in sampler.draw(step, 4)])
        logits = model(ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) == report["loss_last"]
    assert all(torch.equal(ours, plain) for ours, plain in zip(run.model.parameters(), model.parameters(), strict=True))


def test_fit_with_nothing_to_train_is_an_outcome():
    run = toy_run()
    run.model.requires_grad_(False)
    with pytest.raises(Unsupported, match="nothing to train"):
        fitted(run)


def test_a_diverging_fit_is_an_outcome():
    from effbench.core.errors import Diverged

    run = toy_run()
    with pytest.raises(Diverged, match="the loss is"):
        fitted(run, lr=1e18, steps=8, clip=None)


def test_prompts_and_padding_are_not_learned():
    from effbench.core.views import Example
    from effbench.nn.train.batches import collate

    batch = collate([Example("a", (1, 2, 3, 4), prompt=2), Example("b", (5, 6))], 0, torch.device("cpu"))
    assert batch["labels"].tolist() == [[-100, -100, 3, 4], [-100, 6, -100, -100]]
    assert batch["example"].tolist() == [[0, 0, 0, 0], [1, 1, -1, -1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_vocabulary_is_small():
    assert toy().config.vocab_size == VOCABULARY and fit_two_steps(toy_run())["steps"] == 2
