"""What dattri says of influences, DataInf and TRAK on a tiny language model, on some of whose weights they act.

dattri is given modules that hold these weights alone; the rest of the model stands still. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dattri.algorithm.influence_function import IFAttributorDataInf, IFAttributorExplicit
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from golden import write
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, WIDTH, LENGTH = 24, 8, 10
TRAIN, TARGET = 90, 5
RANK, ALPHA, SHARE = 2, 4.0, 0.1
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.4,
    "attn_implementation": "eager",
}
Parameters = dict[str, Tensor]
QUERY, VALUE = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qv")


def predict(model: nn.Module, changed: Parameters, ids: Tensor) -> Tensor:
    """[N, T - 1] logarithms of the probabilities of all tokens but the first; ids [N, T]."""
    mask = torch.full((LENGTH, LENGTH), float("-inf"), dtype=torch.float64).triu(1)
    place = torch.arange(LENGTH)[None]
    given = {"input_ids": ids, "attention_mask": mask[None, None], "position_ids": place, "use_cache": False}
    logits = torch.func.functional_call(model, changed, (), given).logits[:, :-1]
    found: Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return found


def losses(model: nn.Module, changed: Parameters, ids: Tensor, learned: Tensor, margin: bool = False) -> Tensor:
    """[N] means over learned tokens of the cross-entropy, or of log(p / (1 - p)); ids and learned [N, T]."""
    logprobs = predict(model, changed, ids)
    each = logprobs - (-logprobs.exp()).log1p() if margin else -logprobs
    counted = learned[:, 1:].to(each)
    return (each * counted).sum(-1) / counted.sum(-1)


class One(nn.Module):
    """A module of one parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def task(model: nn.Module, put: Callable[[Tensor], Parameters], weight: Tensor, margin: bool = False) -> Any:
    """dattri's view of one parameter: the mean objective of a batch, or of an example."""

    def objective(parameters: Parameters, data: Any) -> Tensor:
        ids, learned = (each if each.ndim == 2 else each[None] for each in data)
        return losses(model, put(parameters["weight"]), ids, learned, margin).mean()

    one = One(weight)
    return AttributionTask(loss_func=objective, model=one, checkpoints=one.state_dict())


def tensors() -> dict[str, Tensor]:
    """Weights, examples, and what is said of each example of the train set."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).double().eval().requires_grad_(False)
    found = {f"model.{name}": value.float() for name, value in model.state_dict().items()}
    model.load_state_dict({name.removeprefix("model."): value.double() for name, value in found.items()}, strict=True)
    ids = torch.randint(1, VOCABULARY, (TRAIN + TARGET, LENGTH))
    prompt = torch.randint(1, LENGTH - 3, (TRAIN + TARGET,))
    learned = (torch.arange(LENGTH) >= prompt[:, None]).long()
    train, target = (TensorDataset(ids[part], learned[part]) for part in (slice(0, TRAIN), slice(TRAIN, None)))
    found |= {"ids": ids, "prompt": prompt}
    weights = dict(model.named_parameters())

    explicit = task(model, lambda w: {VALUE: w}, weights[VALUE])
    for damping in (0.01, 1.0):
        attributor = IFAttributorExplicit(explicit, regularization=damping)
        attributor.cache(DataLoader(train, batch_size=TRAIN))
        scores = attributor.attribute(DataLoader(train, batch_size=TRAIN), DataLoader(target, batch_size=TARGET))
        found[f"influence.{damping}"] = scores.mean(1)

    def probability(parameters: Parameters, data: Any) -> Tensor:
        ids, learned = (each[None] for each in data)
        p = predict(model, {VALUE: parameters["weight"].view(WIDTH, WIDTH)}, ids).exp()
        counted = learned[:, 1:].to(p)
        return ((p * counted).sum() / counted.sum())[None]

    margins = task(model, lambda w: {VALUE: w}, weights[VALUE], margin=True)
    trak = TRAKAttributor(
        margins, probability, projector_kwargs={"proj_dim": 512, "proj_max_batch_size": 8}, regularization=1e-9
    )
    trak.cache(DataLoader(train, batch_size=TRAIN))
    found["trak"] = trak.attribute(DataLoader(target, batch_size=TARGET))

    factors: Parameters = {}
    for name, weight in (("q", weights[QUERY]), ("v", weights[VALUE])):
        factors |= {f"{name}.a": torch.randn(RANK, weight.shape[1]) * 0.3, f"{name}.b": torch.randn(WIDTH, RANK) * 0.3}
    factors = {name: value.float().double() for name, value in factors.items()}

    def put(changed: Parameters) -> Parameters:
        now = factors | changed
        paths = (("q", QUERY), ("v", VALUE))
        return {path: weights[path] + ALPHA / RANK * now[f"{name}.b"] @ now[f"{name}.a"] for name, path in paths}

    total = torch.zeros(TRAIN)
    for name, value in factors.items():
        one = task(model, lambda w, name=name: put({name: w}), value)
        each = one.get_grad_loss_func(in_dims=(None, 0))(value.flatten(), (ids[:TRAIN], learned[:TRAIN]))
        damping = SHARE * float(each.square().mean(1).mean())
        attributor = IFAttributorDataInf(one, regularization=damping)
        attributor.cache(DataLoader(train, batch_size=1))
        total += attributor.attribute(DataLoader(train, batch_size=TRAIN), DataLoader(target, batch_size=TARGET)).mean(
            1
        )
        found[f"factor.{name}"] = value.float()
    return found | {"datainf": total}


if __name__ == "__main__":
    made = {name: value.detach() for name, value in tensors().items()}
    write("attribution", __file__, ["dattri", "transformers"], made, alpha=ALPHA, rank=RANK, config=CONFIG)
