"""How steps and kernels are timed on a GPU: a cold L2 cache, the host's time and the device's each for itself."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import TypeVar

import torch
from torch import Tensor

from bench.floor import Rates, measure_rates

Result = TypeVar("Result")
Spread = tuple[float, float, float]
"""Seconds: the 20th percentile, the median, the 80th."""

_MILLISECOND = 2_000_000
"""Cycles of a GPU's clock, about."""


def cold_cache(device: torch.device) -> Callable[[], None]:
    """A function that drives everything out of the L2 cache: in training, other tensors have been there meanwhile."""
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def flush() -> None:
        buffer.zero_()
        torch.cuda.synchronize(device)

    return flush


def capture(step: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A step as a CUDA graph, and where a replay leaves its result.

    What is captured must not read the device's memory on the host, as the published loops do.

    Raises:
        RuntimeError: it cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    try:
        with torch.cuda.stream(stream):
            step()  # what is made once is made before the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                result = step()
    finally:
        torch.cuda.synchronize(device)
    return graph, result


def graph_seconds(step: Callable[[], object], hidden_states: Sequence[Tensor], rounds: int = 20) -> list[float] | None:
    """The device's seconds for a step, replayed as a CUDA graph with a cold cache; None if it cannot be captured."""
    device = hidden_states[0].device
    flush = cold_cache(device)
    try:
        graph, _ = capture(step, device)
    except RuntimeError:
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


def spread(seconds: Sequence[float]) -> Spread:
    """Of two measurements or more."""
    fifths, halves = quantiles(seconds, n=5, method="inclusive"), quantiles(seconds, n=2, method="inclusive")
    return fifths[0], halves[0], fifths[-1]


def kernel_seconds(launch: Callable[[], object], rounds: int = 30) -> Spread:
    """The device's time for a launch, or a few, with a cold cache.

    The launches wait in the queue behind a pause, so that the host's time for them is not in between.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    buffer = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
    launch()
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * _MILLISECOND)
    for start, stop in events:
        buffer.zero_()
        start.record()
        launch()
        stop.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(stop) / 1e3 for start, stop in events])


class Gpu:
    """The current GPU, for `bench.gpu_quick`. A rehearsal has the same without one."""

    rounds = 30

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self._flush = cold_cache(self.device)

    def seconds(self, step: Callable[[], object]) -> float:
        """From the call until the device has done it, with a cold cache."""
        self._flush()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def host_seconds(self, step: Callable[[], object]) -> float:
        """Until the call returns, while the device is busy with something else."""
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(50 * _MILLISECOND)
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return seconds

    def kernel_seconds(self, launch: Callable[[], object]) -> Spread:
        """See `kernel_seconds`."""
        return kernel_seconds(launch)

    def captured(self, step: Callable[[], Result]) -> Callable[[], Result]:
        """The step as a CUDA graph; its result is overwritten by each call."""
        graph, result = capture(step, self.device)

        def replay() -> Result:
            graph.replay()
            return result

        return replay

    def how_to_compile(self, mode: str | None) -> tuple[str | None, str]:
        """The mode and the backend for torch.compile."""
        return mode, "inductor"

    def rates(self, dtype: torch.dtype) -> Rates:
        """What it does at best."""
        return measure_rates(self.device, dtype)

    def reserved_bytes(self) -> int:
        """Of memory that tensors or graphs have, or could have without asking for more."""
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)

    def operations(self, step: Callable[[], object]) -> dict[str, int]:
        """What the device does for a step, kernels and copies, and how often."""
        torch.cuda.synchronize(self.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize(self.device)
        on_device = (event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
        found = dict(Counter(event.name for event in on_device))
        if not found:
            raise RuntimeError("torch's profiler has seen nothing on the device")
        return found
