"""Swap: modules at the method's sites are replaced by trainable ones, and what was there is frozen."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from effbench.core.errors import Unsupported
from effbench.nn.model.adapters import adding, choose_adapter
from effbench.nn.model.blocks import Blocks
from effbench.nn.model.linear import check_module, kept, replace
from effbench.nn.model.sites import find_sites

if TYPE_CHECKING:
    from effbench.core.kinds import Swap
    from effbench.core.run import Run


def apply(run: Run, method: Swap) -> None:
    """Replace what the method wants; it settles after a fit. Raises `Unsupported` where no module is a target."""
    run.settle()
    with adding(run):
        _replace_all(run, method)
    if name := getattr(method, "adapter", ""):
        choose_adapter(run.model, name)


def _replace_all(run: Run, method: Swap) -> None:
    sites = find_sites(run, method.sites)
    chosen = [site for site in sites if method.wants(site.path) and site.role in (method.roles or {site.role})]
    if not sites:
        raise Unsupported(f"the blocks have no module of the kind {' or '.join(method.sites)} to stand at")
    if "linear" in method.sites:
        _check_experts(run, method)
    if not chosen:
        names = sorted({site.path.rpartition(".")[2] for site in sites})
        raise Unsupported(f"none of the modules is a target; they are called {', '.join(names)}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(run.seed)
        prepared = method.prepare(run)
    for site in chosen:
        before = run.model.get_submodule(site.path)
        held = site.kind == "linear" and kept(before) is not None
        with torch.random.fork_rng(devices=[]):  # new parameters depend on the run and the place alone
            torch.default_generator.manual_seed(site.seed)
            module = method.replace(before, dataclasses.replace(site, prepared=prepared))
        check_module(module, method, "replace", before)
        replace(run.model, site.path, module.to(run.device))
        run.note_swap(module, method, held)


def _check_experts(run: Run, method: Swap) -> None:
    """Raise `Unsupported` where a method wants the weights of experts, which lie in one tensor and are no linears."""
    view = Blocks(run.model)
    tensors = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"} if view.names.experts else {}
    for role, name in tensors.items():
        path = f"{view.path(0, view.names.experts)}.{name}"
        if method.wants(path) and role in (method.roles or {role}):
            raise Unsupported(f"{path} holds the weights of all experts, and is no linear: give targets in attention")
