"""Bytes that a process holds, and what it tells others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from effbench.nn.model.held import count_bytes, local
from effbench.nn.train.collectives import Collectives
from effbench.nn.train.shards import cut_like, put_back, whole


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_shared_and_viewed_tensors_count_once() -> None:
    flat = torch.zeros(100)
    assert count_bytes([flat, flat]) == 400
    assert count_bytes([flat[:60].view(6, 10), flat[40:], flat[10:20]]) == 400
    assert count_bytes([flat[:10], flat[90:]]) == 80
    assert count_bytes([flat.view(10, 10).T, torch.zeros(3, dtype=torch.float64)]) == 424
    embedding, head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
    head.weight = embedding.weight
    assert count_bytes([embedding.weight, head.weight]) == count_bytes([head.weight.detach()]) == 140
    assert count_bytes([torch.zeros(0), flat[:0]]) == 0


def test_parts_are_what_this_process_holds(alone: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    tensor = torch.arange(6.0).view(3, 2)
    part = distribute_tensor(tensor, mesh, [Shard(0)])
    assert torch.equal(local(part), tensor) and torch.equal(whole(part), tensor) and count_bytes([part, part]) == 24
    local(part).mul_(2)
    assert torch.equal(whole(part), 2 * tensor)
    mask = cut_like(tensor > 2, part)
    part.data.mul_(mask)
    assert torch.equal(whole(part), 2 * tensor * (tensor > 2))
    assert cut_like(tensor, tensor) is tensor


def test_parameters_come_back_as_they_were_named(alone: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    before = model[0].weight
    with put_back(model):
        part = nn.Parameter(distribute_tensor(before.detach() + 1, mesh, [Shard(0)]))
        model[0].weight = model[1].weight = part
        model[0].register_forward_pre_hook(lambda *_: None)
        expected = whole(part)
    assert model[0].weight is before and model[1].weight is before
    assert torch.equal(before, expected) and not model[0]._forward_pre_hooks


def test_collectives_are_counted_by_kind(alone: None) -> None:
    x = torch.zeros(8)
    with Collectives() as counted:
        distributed.all_reduce(x)
        distributed.all_reduce(x[:2])
        distributed.all_gather_into_tensor(torch.zeros(8), x)
        distributed.broadcast(x, 0)
        part = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Shard(0)], src_data_rank=None)
        (part * 2).sum()
    assert counted.calls["all_reduce"] == 2 and counted.bytes["all_reduce"] == 40
    assert counted.calls["all_gather"] == 1 and counted.bytes["all_gather"] == 32
    assert counted.calls["broadcast"] == 1 and counted.bytes["broadcast"] == 32
