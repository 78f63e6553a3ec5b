"""A teacher's predictions of the learned tokens, in whole or its likeliest tokens, and kept on disk.

What is kept belongs to what the teacher computes with, the tokens of an example as they were fed, and what is learned
of them; so it serves every epoch, fit and cell that feeds the same. Of the likeliest tokens the rest counts as one
event, whose mass does not follow from that at another temperature and is kept for each that is used.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effbench.core.errors import Unsupported
from effbench.nn.train.batches import IGNORED, Batch
from effbench.nn.train.loss import learned, learned_logits, mean_learned

if TYPE_CHECKING:
    from effbench.core.run import Run

BOUND = 2**32  # bytes of predictions on disk, at most


class Targets(NamedTuple):
    """What a teacher predicts for N learned tokens, at a temperature."""

    logprobs: Tensor  # [N, K] of its likeliest tokens
    tokens: Tensor  # [N, K]
    rest: Tensor  # [N] logarithm of the probability of all others together


def count_shared(run: Run, role: str) -> int:
    """The number of token ids, from 0 on, that the model and that of a role both predict: those of the tokenizer.

    Rows that only pad a vocabulary are left out. Raises `Unsupported` for a vocabulary of other tokens.
    """
    return run.share(("shared tokens", role), lambda: _count_shared(run, role))


def _count_shared(run: Run, role: str) -> int:
    mine, theirs = run.tokenizer, run.tokenizer_of(role)
    rows, their_rows = run.model.config.vocab_size, run.role(role).config.vocab_size
    if mine is None or theirs is None:
        if rows != their_rows:
            raise Unsupported(
                f"{role} predicts {their_rows} tokens, the model {rows}: no tokenizer says which are alike"
            )
        return int(rows)
    own = mine.get_vocab()
    other = own if mine is theirs else theirs.get_vocab()
    if own != other:
        tokens, their_tokens = ({place: token for token, place in names.items()} for names in (own, other))
        places = tokens.keys() | their_tokens.keys()
        first = min(place for place in places if tokens.get(place) != their_tokens.get(place))
        raise Unsupported(
            f"{role} has another vocabulary, {len(other)} tokens, the model {len(own)}: token {first} is "
            f"{their_tokens.get(first)!r} there and {tokens.get(first)!r} here"
        )
    shared = 1 + max(own.values())
    if shared > min(rows, their_rows):
        raise Unsupported(f"the tokenizer has {shared} tokens, {role} predicts {their_rows} and the model {rows}")
    return int(shared)


@torch.no_grad()
def watch_agreement(run: Run, batch: Batch, student: Tensor, likeliest: Tensor) -> None:
    """Have the log say what share of the learned tokens N the student's likeliest token is the teacher's [N].

    student  logits [N, V]
    """
    run.watched["agreement"] = mean_learned((student.argmax(-1) == likeliest).float(), batch)


def soften_top(run: Run, role: str, batch: Batch, temperature: float, top_k: int | None, keep: bool) -> Targets:
    """The targets of the learned tokens of a batch, from disk where they are there and `keep` says to keep them.

    Of the tokens that `count_shared` counts.
    """
    shared = count_shared(run, role)
    folder = run.cache if keep else None
    if folder is None:
        return _predict(run, role, batch, shared, temperature, top_k)
    keys = _name_examples(batch, name_teacher(run, role), temperature, top_k)
    read = {place: recall(folder, key) for place, key in keys.items()}
    found = {place: None if kept is None else Targets(**kept) for place, kept in read.items()}
    if any(targets is None for targets in found.values()):
        made = _predict(run, role, batch, shared, temperature, top_k)
        owner = batch["example"][:, 1:][learned(batch)]
        for place, key in keys.items():
            if found[place] is None:
                found[place] = targets = Targets(*(tensor[owner == place] for tensor in made))
                keep_tensors(folder, key, targets._asdict())
        shrink(folder, BOUND)
    owner = batch["example"][:, 1:][learned(batch)]
    order = torch.cat([(owner == place).nonzero()[:, 0] for place in keys]).argsort()
    parts = zip(*(targets for targets in found.values() if targets is not None), strict=True)
    return Targets(*(torch.cat(part)[order.cpu()].to(owner.device) for part in parts))


def bucketed_kl(student: Tensor, targets: Targets, temperature: float) -> Tensor:
    """KL of the teacher from the student over the teacher's likeliest tokens and all others as one, in nats [N].

    student  logits [N, V]
    """
    log_q = (student / temperature).log_softmax(-1)
    chosen = log_q.gather(1, targets.tokens)
    divergence = (targets.logprobs.exp() * (targets.logprobs - chosen)).sum(-1)
    if targets.tokens.shape[1] == student.shape[1]:
        return divergence
    others = log_q.scatter(1, targets.tokens, float("-inf")).logsumexp(-1)
    mass = targets.rest.exp()
    return divergence + torch.where(mass > 0, mass * (targets.rest - others), 0.0)


@torch.no_grad()
def _predict(run: Run, role: str, batch: Batch, shared: int, temperature: float, top_k: int | None) -> Targets:
    """The targets of the learned tokens of a batch, of the model itself."""
    return _cut(learned_logits(run.outputs(role).logits[..., :shared], batch), temperature, top_k)


def _cut(logits: Tensor, temperature: float, top_k: int | None) -> Targets:
    """The `top_k` likeliest tokens, or all, of logits [N, V]."""
    logprobs = (logits / temperature).log_softmax(-1)
    number = min(top_k or logits.shape[1], logits.shape[1])
    top, tokens = logprobs.topk(number, -1)
    others = logprobs.scatter(1, tokens, float("-inf")).logsumexp(-1)
    return Targets(top, tokens, others)


def _name_examples(batch: Batch, teacher: str, temperature: float, top_k: int | None) -> dict[int, str]:
    """A name for the targets of each example in a batch, by its place there."""
    names = {}
    for place in batch["example"].unique().tolist():
        if place >= 0:
            here = batch["example"] == place
            fed = [batch["input_ids"][here].tolist(), (batch["labels"][here] != IGNORED).tolist()]
            names[place] = hashlib.sha256(f"{teacher} {fed} {temperature} {top_k}".encode()).hexdigest()
    return names


def name_teacher(run: Run, role: str) -> str:
    """What stands in the keys of all that a teacher says: its digest, and the number of tokens it is asked about."""
    return run.share(("teacher", role), lambda: f"{digest_model(run.role(role))} {count_shared(run, role)}")


def digest_model(model: nn.Module) -> str:
    """SHA-256 of what a model computes with: tensors, and the classes, numbers and flags of its modules, by which an
    adapter is chosen or a product scaled."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        told = sorted((key, value) for key, value in vars(module).items() if isinstance(value, (bool, int, float)))
        digest.update(f"{path} {type(module).__qualname__} {told}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def recall(folder: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors that are kept under a key; None where there are none, or none that can be read."""
    path = folder / f"{key}.safetensors"
    try:
        tensors = load_file(path)
        os.utime(path)  # used just now
        return tensors
    except (OSError, ValueError, SafetensorError):
        return None


def keep_tensors(folder: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Keep tensors under a key, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{key}.{os.getpid()}.new"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, new)
    new.rename(folder / f"{key}.safetensors")


def shrink(folder: Path, bound: int) -> None:
    """Remove the files that were not used for longest until the rest takes no more than `bound` bytes."""
    there = []
    for path in folder.glob("*.safetensors"):
        try:
            state = path.stat()
        except FileNotFoundError:  # another process was faster
            continue
        there.append((state.st_mtime_ns, state.st_size, path))
    total = sum(size for _, size, _ in there)
    for _, size, path in sorted(there):
        if total <= bound:
            break
        path.unlink(missing_ok=True)
        total -= size
