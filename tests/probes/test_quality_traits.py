"""What a checkpoint says besides tensors, where tasks are scored: BOS, stop tokens, chat template."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import processors

from effbench import sources, tiny
from effbench.core.errors import Unsupported
from effbench.nn.files.load import open_run
from effbench.probes import quality

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def opening_with_bos(tokenizer: Any) -> Any:
    """The tokenizer with a post-processor that puts BOS before every text, as those of Llama and Gemma have."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tiny_run() -> Any:
    torch.set_num_threads(1)
    run = open_run(sources.model("tiny"), sources.data(None), "cpu", None, 0)
    run.model.config.max_position_embeddings = 256  # longer texts take several windows
    return run


@pytest.fixture(params=["plain", "bos"])
def run(request: pytest.FixtureRequest, tiny_run: Any) -> Any:
    run = copy.copy(tiny_run)
    run.tokenizer = tiny_run.tokenizer if request.param == "plain" else opening_with_bos(tiny_run.tokenizer)
    return run


def evaluate(lm: Any, run: Any, **options: Any) -> dict[str, float]:
    """Every number of every tiny task."""
    with quality.quiet():
        tasks, _ = quality.load(["tiny"], run.data.task_paths)
        found = quality.evaluator.evaluate(lm, tasks, limit=4, bootstrap_iters=0, log_samples=True, **options)
    return {
        f"{task}/{name}": value
        for task, metrics in found["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }


def their_own(run: Any, **options: Any) -> Any:
    HFLM = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError).HFLM  # needs accelerate
    with quality.quiet():
        return HFLM(pretrained=run.model, tokenizer=run.tokenizer, batch_size=2, max_length=256, **options)


def ours(run: Any) -> quality.EngineLM:
    return quality.EngineLM(run, {})


@pytest.mark.parametrize("chats", [False, True])
def test_tasks_are_scored_as_lm_evals_own_model_scores_them(run: Any, chats: bool) -> None:
    run.tokenizer = copy.deepcopy(run.tokenizer)
    run.tokenizer.chat_template = TEMPLATE
    found = evaluate(ours(run), run, apply_chat_template=chats)
    wanted = evaluate(their_own(run), run, apply_chat_template=chats)
    if run.tokenizer.bos_token_id is not None:  # whole texts: by itself it scores BOS after BOS
        without = evaluate(their_own(run, add_bos_token=False), run)
        wanted |= {name: value for name, value in without.items() if name.startswith("tiny_ppl/")}
    assert found and found == pytest.approx(wanted, rel=1e-5)


def test_bos_is_never_scored(run: Any) -> None:
    """Against plain transformers: BOS as context once, then every token of the text once."""
    text = " ".join(tiny.documents("heldout", 3))
    lm = ours(run)
    (found,) = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids = [lm.prefix_token_id, *run.tokenizer.encode(text, add_special_tokens=False)]
    assert len(ids) > 257
    truth = 0.0
    for start in range(0, len(ids) - 1, 256):
        end = min(start + 256, len(ids) - 1)
        row = torch.tensor([ids[max(0, end - 256) : end + 1]])
        with torch.no_grad():
            scores = run.model(row[:, :-1]).logits[0].log_softmax(-1).gather(1, row[0, 1:, None])
        truth += float(scores[start - end :].sum())
    assert found == pytest.approx(truth, rel=1e-5)
    own = their_own(run, add_bos_token=False)  # by itself it scores BOS after BOS
    with quality.quiet():
        assert own.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True) == [
            pytest.approx(found, rel=1e-5)
        ]
    (spelled,) = lm.loglikelihood_rolling([SimpleNamespace(args=(lm.tokenizer.decode(lm.prefix_token_id) + text,))])
    assert spelled == pytest.approx(found, rel=1e-5)  # also where the text itself begins with it


def test_generation_ends_at_the_stop_tokens_of_the_checkpoint(run: Any) -> None:
    lm, own = ours(run), their_own(run)
    prompt = tiny.documents("heldout", 1)[0][:80]
    asked = [SimpleNamespace(args=(prompt, {"until": [], "max_gen_toks": 20}), task_name="t", doc={}, doc_id=0)]
    (whole,) = lm.generate_until(asked)
    stop = run.tokenizer.encode(whole, add_special_tokens=False)[6]
    before = run.model.generation_config
    run.model.generation_config = copy.deepcopy(before)
    try:
        for stops in ([stop], [lm.eot_token_id, stop]):
            run.model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops
            (cut,) = lm.generate_until(asked)
            with quality.quiet():
                (theirs,) = own.generate_until(asked, disable_tqdm=True)
            assert cut != whole and whole.startswith(cut)
            assert theirs.startswith(cut) and theirs.removeprefix(cut) in ("", run.tokenizer.decode(stop))
        run.model.generation_config.repetition_penalty = 1.3
        lm.generate_until(asked)
        assert lm.generation["t"].endswith("or EOS, without repetition_penalty=1.3 of the checkpoint")
    finally:
        run.model.generation_config = before


def test_a_chat_template_is_a_setting_and_named(tiny_run: Any) -> None:
    run = copy.copy(tiny_run)
    run.tokenizer = copy.deepcopy(tiny_run.tokenizer)
    settings = {"tasks": ["tiny"], "limit": 2}
    plain = quality.take(run, settings)
    assert not any("chat template" in protocol for protocol in plain.protocols.values())
    with pytest.raises(Unsupported, match="tokenizer has none"):
        quality.take(run, settings | {"chat_template": True})
    run.tokenizer.chat_template = TEMPLATE
    chat = quality.take(run, settings | {"chat_template": True})
    named = {name for name, protocol in chat.protocols.items() if "chat template of the model" in protocol}
    whole = {name for name in chat.metrics if name.startswith("tiny_ppl")}  # texts by themselves have no turns
    assert named == chat.metrics.keys() - whole - {"tasks_acc"} and whole
