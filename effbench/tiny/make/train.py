"""Train the tiny model on the generated world, and export a decayed snapshot of it.

The learning rate is constant after a warm-up, so training has no fixed end: ``--export`` takes the latest
checkpoint, lowers the rate linearly to zero over ``--decay`` further tokens and writes the result in
bfloat16. The windows grow from 64 tokens, where looking things up is learned soonest, to 1,024.

    python -m effbench.tiny.make.train --out runs/tiny                         # until --tokens, or until stopped
    python -m effbench.tiny.make.train --out runs/tiny --resume                # go on
    python -m effbench.tiny.make.train --out runs/tiny --export effbench/tiny/model --decay 3000000
"""

import argparse
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from effbench.tiny import tokenizer as bpe
from effbench.tiny import world

#: from so many tokens on, the window is so long
CURRICULUM = ((0, 64), (11_000_000, 128), (15_500_000, 512), (18_500_000, 1024))
BATCH_TOKENS = 4096
RATE, WARMUP_STEPS = 3e-3, 200
LOG_STEPS, MEASURE_STEPS, SAVE_SECONDS = 100, 1000, 240.0


def config(vocabulary: int) -> LlamaConfig:
    """The architecture: 1.5 M parameters, a fifth of them embeddings (tied, which eases copying)."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        # the fused CPU kernel's backward pass is slower than plain matrix products at these sizes
        attn_implementation="eager",  # type: ignore[call-arg]
    )


def window_at(tokens: int) -> int:
    """Window length of the curriculum after so many tokens."""
    return max(window for start, window in CURRICULUM if tokens >= start)


def batch(tokenizer: PreTrainedTokenizerBase, window: int, step: int) -> Tensor:
    """The rows of one step: whole documents one after the other, each row cut at ``window + 1`` tokens."""
    rows: list[list[int]] = []
    row: list[int] = []
    documents = world.stream(window, f"step {step}")
    while len(rows) < BATCH_TOKENS // window:
        text = [next(documents) for _ in range(16)]
        for ids in tokenizer(text, add_special_tokens=False)["input_ids"]:
            row += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            # every other row opens with the text itself: the model must not depend on a mark before it
            bare = len(rows) % 2
            if len(row) > window + bare:
                rows.append(row[bare : window + 1 + bare])
                row = []
    return torch.tensor(rows[: BATCH_TOKENS // window])


def held_out_losses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, window: int) -> dict[str, float]:
    """Loss per token on held-out documents of each kind."""
    losses = {}
    for kind, write in world.KINDS.items():
        text = [write(Random(f"watch:{kind}:{i}"), min(window, 512) - 2, True) for i in range(16)]
        batch = tokenizer(text, return_tensors="pt", padding=True, truncation=True, max_length=window)
        ids = batch["input_ids"].to(model.device)
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16):
            logits = model(input_ids=ids).logits
        labels = ids.masked_fill(batch["attention_mask"].to(ids.device) == 0, -100)[:, 1:]
        losses[kind] = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten()).item()
    return losses


class Batches(Dataset[Tensor]):
    """The rows of every step by its number: the same whoever makes them, in whatever order."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __getitem__(self, step: int) -> Tensor:
        return batch(self.tokenizer, window_at(step * BATCH_TOKENS), step)


class Trainer:
    """Model, optimizer and position, saved and restored as one.

    With `workers` processes beside it that write the text ahead: one alone gives a GPU too little to do.
    """

    def __init__(self, out: Path, device: str, workers: int = 0) -> None:
        self.workers = workers
        self.checkpoint = out / "checkpoint.pt"
        self.log = out / "log.jsonl"
        self.tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config(len(self.tokenizer)))
        self.model.to(device)  # type: ignore[arg-type]
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        gains = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
            lr=RATE,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step = 0
        self.stopping = False
        self.loss = torch.compile(self._loss, dynamic=False)

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.step * BATCH_TOKENS

    def _loss(self, rows: Tensor) -> Tensor:
        logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    def load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.model.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state | {"step": self.step}, partial)
        os.replace(partial, self.checkpoint)

    def report(self, **record: object) -> None:
        line = json.dumps({"step": self.step, "tokens": self.tokens} | record)
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")

    def run(self, until: int, rate: Callable[[int, int], float], saving: bool) -> None:
        """Train until so many tokens were seen or a signal asks to stop, at ``rate(step, tokens)``."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))
        device = self.model.device.type
        began = saved = time.monotonic()
        losses: list[Tensor] = []
        steps = range(self.step, -(-until // BATCH_TOKENS))
        for rows in DataLoader(Batches(self.tokenizer), None, sampler=steps, num_workers=self.workers):
            if self.stopping:
                break
            window, rows = rows.shape[1] - 1, rows.to(device, non_blocking=True)
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.step, self.tokens)
            with torch.autocast(device, torch.bfloat16):
                loss = self.loss(rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(loss.detach())
            if self.step % LOG_STEPS == 0:
                speed = len(losses) * BATCH_TOKENS / (time.monotonic() - began)
                loss = torch.stack(losses).mean()
                self.report(window=window, loss=round(loss.item(), 4), per_second=round(speed))
                losses = []
                if self.step % MEASURE_STEPS == 0:
                    held_out_means = held_out_losses(self.model, self.tokenizer, window)
                    self.report(held_out={kind: round(value, 3) for kind, value in held_out_means.items()})
                began = time.monotonic()
            if saving and time.monotonic() - saved > SAVE_SECONDS:
                self.save()
                saved = time.monotonic()
        if saving:
            self.save()

    def export(self, folder: Path, decay: int) -> None:
        """Anneal for ``decay`` tokens and write model, tokenizer and the number of tokens seen."""
        start = self.tokens
        self.run(start + decay, lambda step, tokens: RATE * (1 - (tokens - start) / decay), saving=False)
        if self.stopping:
            raise SystemExit("stopped before the learning rate was zero: nothing exported")
        held_out_means = held_out_losses(self.model, self.tokenizer, window_at(self.tokens))
        self.report(exported=str(folder), held_out={kind: round(value, 3) for kind, value in held_out_means.items()})
        self.model.bfloat16().save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # written for its owner only, but it ships with the package
        # as it was built: encoding batches has left lengths to pad and cut to in the one used here
        shutil.copytree(self.checkpoint.parent / "tokenizer", folder, dirs_exist_ok=True)
        record = {"tokens": self.tokens, "decay_tokens": decay, "steps": self.step}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, tokenizer and log")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="stop after so many tokens")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, help="processes that write text; default 0, with a GPU all cores but 2")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="anneal the checkpoint, write it here")
    parser.add_argument("--decay", type=int, default=3_000_000, help="tokens to anneal over when exporting")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not (args.resume or args.export):
        if (args.out / "checkpoint.pt").exists():
            parser.error(f"{args.out} has a checkpoint already: --resume, or another --out")
        bpe.save(args.out / "tokenizer")
    spare = max(1, (os.cpu_count() or 1) - 2) if args.device.startswith("cuda") else 0
    trainer = Trainer(args.out, args.device, spare if args.workers is None else args.workers)
    if args.resume or args.export:
        trainer.load()
    if args.export:
        trainer.export(args.export, args.decay)
    else:
        trainer.run(args.tokens, lambda step, tokens: RATE * min(1.0, (step + 1) / WARMUP_STEPS), saving=True)


if __name__ == "__main__":
    main()
