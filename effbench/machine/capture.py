"""CUDA graphs of a call: one launch replays all the kernels that it started."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UPS = 3  # steps before capture: kernels are compiled and chosen, workspaces allocated


Step = Callable[[], None]


def capture(step: Step, device: torch.device) -> Step:
    """`step` as a CUDA graph; what it reads and writes has to stay where it is.

    Raises `RuntimeError` where it cannot be captured.
    """
    # The outer stream context brings the stream back where capturing fails half-way.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                step()
            _refuse_to_wait(step)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            step()
    return graph.replay


def _refuse_to_wait(step: Step) -> None:
    """Run a step that may not wait for the device: found here, that costs nothing; while capturing it would leave
    torch's random generator in a state of which it does not recover."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


CAPTURES: dict[str, Callable[[Step, torch.device], Step]] = {"cuda": capture}  # by type of device
