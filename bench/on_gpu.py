"""What a GPU needs to be timed fairly: a cold L2 cache, and the device's time without the host's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def cold_cache(device: torch.device) -> Callable[[], None]:
    """A function that drives everything out of the L2 cache: in training, other tensors have been there meanwhile."""
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def flush() -> None:
        buffer.zero_()
        torch.cuda.synchronize(device)

    return flush


def graph_seconds(step: Callable[[], object], hidden_states: Sequence[Tensor], rounds: int = 20) -> list[float] | None:
    """The device's seconds for a step, replayed as a CUDA graph with a cold cache; None if it cannot be captured.

    What is captured must not read the device's memory on the host, as the published loops do.
    """
    device = hidden_states[0].device
    flush = cold_cache(device)
    stream = torch.cuda.Stream(device)
    try:
        with torch.cuda.stream(stream):
            step()  # what is made once is made before the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    seconds = []
    for _ in range(rounds):
        flush()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize(device)
        seconds.append(start.elapsed_time(stop) / 1e3)
    return seconds
