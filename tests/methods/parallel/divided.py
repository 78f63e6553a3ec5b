"""Cases of engines whose processes hold some blocks, or some experts: pp and ep."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

from ranks import TIED, Case, Program, train
from torch import Tensor

from effbench.methods.parallel import ep
from effbench.nn.train.collectives import Collectives

LORA = "lora(rank=4, targets=('q_proj', 'v_proj'))"
TEXTS = "gkd(new_tokens=4, prompt_tokens=3)"
deep = functools.partial(Case, layers=4)
PP = {
    "pp": deep("pp(microbatches=3)", shape=TIED),
    "pp 1f1b": deep("pp(schedule='1f1b')", "gpt2", changes={"layout": "packed", "accumulate": 2}),
    "pp one example": deep("pp(schedule='1f1b')", "opt", changes={"batch_size": 1}),
    "pp untied": deep("pp()", "gpt_neox", changes={"batch_size": 5}),
    "pp experts": deep("pp(microbatches=2)", "mixtral", shape=TIED),
    "pp float32": deep("pp()", "qwen3", shape=TIED, single=True),
    "pp kd": deep("kd(alpha=0.5), pp(microbatches=3)"),
    "pp lora": deep(f"{LORA}, pp(), checkpointing()"),
    "pp prefix": deep("prefix_tuning(length=3, hidden=16), pp()"),
}
EP = {
    "ep": deep("ep()", "mixtral", shape=TIED),
    "ep three": deep("ep()", "mixtral", changes={"batch_size": 3, "accumulate": 2}),
    "ep one example": deep("ep()", "mixtral", changes={"batch_size": 1, "layout": "packed"}),
    "ep float32": deep("ep()", "mixtral", shape=TIED, single=True),
    "ep kd": deep("kd(alpha=0.5), ep(), checkpointing()", "mixtral"),
    "ep lora": deep(f"{LORA}, ep()", "mixtral"),
}
COST = {
    "pp()": deep("pp()", shape=TIED),
    "pp(schedule='1f1b')": deep("pp(schedule='1f1b')", shape=TIED),
    "ep()": deep("ep()", "mixtral"),
}
OVERFLOWING = {  # all ranks train them alike, and one process by another scale of the loss
    "pp overflow": deep("fp16(growth_every=2), pp()", shape=TIED, single=True, overflows={0: "gradients"}),
    "ep overflow": deep("fp16(growth_every=2), ep()", "mixtral", shape=TIED, single=True, overflows={0: "gradients"}),
}
PP_REFUSED = {  # and what is said
    "pp few blocks": (deep("pp()", layers=1), "and the model has 1 blocks"),
    "pp soft prompt": (deep("prompt_tuning(length=3), pp()"), "belongs to no block"),
    "pp hidden": (deep("feature_kd(), pp()"), "sees the whole model at work"),
    "pp attention": (deep("attention_transfer(), pp()"), "reads more of the model than logits"),
    "pp masks": (deep("gmp(), pp()"), "sees the whole model at work"),
    "pp validation": (deep("pp()", changes={"validate": 1}), "something runs the model within the fit"),
    "pp texts": (deep(f"{TEXTS}, pp()"), "something runs the model"),
    "pp last": (deep("pp()", changes={"train": "last:1"}), "stage 1 of 2 would have nothing"),
}
EP_REFUSED = {
    "ep dense": (deep("ep()"), "a llama has no experts to divide"),
    "ep uneven": (deep("ep()", "mixtral", shape={"num_local_experts": 3}), "3 experts cannot be divided"),
    "ep texts": (deep(f"{TEXTS}, ep()", "mixtral"), "its own examples"),
}


def count(case: Case, ranks: int) -> dict[str, Any]:
    """Calls and bytes of one step by kind of collective, rows [H] that were dispatched, and the shape of its batch."""
    rows = list[tuple[int, int]]()
    exchange = ep.exchange

    def note(states: Tensor, received: list[int], sent: list[int]) -> Tensor:
        rows.append((sum(sent), sum(received)))
        return exchange(states, received, sent)

    with Collectives() as counter, mock.patch.object(ep, "exchange", note):
        report = train(case._replace(changes={"steps": 1, "max_length": 16}), ranks).report
    return {"calls": counter.calls, "bytes": counter.bytes, "rows": rows, "cost": report["cost"]}


def measure(ranks: int) -> dict[str, Any]:
    """What a step of each engine passes between processes, and what one of them spends."""
    cases = {name: case._replace(single=True, adam=True, changes={"steps": 7}) for name, case in COST.items()}
    return {
        "counted": {name: count((PP | EP)[name], ranks) for name in ("pp", "ep")},
        "costs": {name: train(case, ranks).report["cost"] for name, case in cases.items()},
    }


PROGRAM = Program(
    "divided",
    cases=PP | EP | OVERFLOWING,
    killed={name: (PP | EP)[name]._replace(adam=True) for name in ("pp", "ep")},
    four=("pp", "pp 1f1b", "pp float32", "ep", "ep three", "ep float32", *OVERFLOWING),
    refused=PP_REFUSED | EP_REFUSED,
    measure=measure,
    fatal={2: PP["pp"], 4: EP["ep"]},
)
