"""Cases of the engine whose processes hold the whole model: ddp."""

from __future__ import annotations

import functools

from ranks import DROPOUT, Case, Masking, Ordered, Program, Skipping

CHANGES = {"steps": 4, "clip": 1.0}
adam = functools.partial(Case, adam=True, changes=CHANGES)
TEXTS = "new_tokens=4, prompt_tokens=3"
CASES = {
    "eight": adam("ddp()"),
    "accumulated": adam("ddp()", changes=CHANGES | {"accumulate": 2, "clip": 0.1}),
    "packed": adam("ddp()", "gpt_neox", changes=CHANGES | {"layout": "packed"}),
    "three": adam("ddp()", changes=CHANGES | {"batch_size": 3}),
    "one": adam("ddp()", changes=CHANGES | {"batch_size": 1}),
    "unlearned": adam("ddp()", methods=(Masking(),), changes=CHANGES | {"batch_size": 2}),
    "skipped": adam(  # every step is taken twice
        "ddp()",
        methods=(Skipping(),),
        changes=CHANGES | {"clip": 0.1},
        overflows=dict.fromkeys(range(0, 8, 2), "gradients"),
    ),
    "short": adam(  # the last batch is smaller than the ranks
        "ddp()", methods=(Ordered(),), changes=CHANGES | {"batch_size": 4}, documents=5
    ),
    "written": adam(f"gkd(lmbda=0.5, alpha=0.5, {TEXTS}), ddp()", changes=CHANGES | {"accumulate": 2}),
    "rewarded": adam(f"minillm({TEXTS}, epochs=2), ddp()", changes=CHANGES | {"batch_size": 5, "accumulate": 2}),
}
SCALED = adam("fp8(), ddp()")
PROGRAM = Program(
    "replicated",
    cases=CASES | {"scaled": SCALED},
    killed={"ddp": adam("ddp()", "opt", shape=DROPOUT, single=True)},
)
