"""What the losses cost at least: bytes that must move, arithmetic that must be done, and a machine's speed at either.

Forward: every hidden state is read once, and each anchor is multiplied with the valid tokens of its sequence. Backward:
they are read once more and a gradient is written for each; the products are made again, and every product's weight is
applied to both of its ends. The floor of a pass is the larger of bytes / bandwidth and FLOPs / rate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from bench.workloads import Workload
from carma_kernels.measure import synchronize

Passes = Literal["forward", "forward+backward"]


@dataclass(frozen=True)
class Rates:
    """What a machine does at best, as measured on it."""

    bytes_per_second: float  # of a copy, read and written
    flops_per_second: float  # of a matrix product


@dataclass(frozen=True)
class Cost:
    """Of one pass or more."""

    bytes: int
    flops: int

    def seconds(self, rates: Rates) -> float:
        """The floor."""
        return max(self.bytes / rates.bytes_per_second, self.flops / rates.flops_per_second)


def costs(workload: Workload, element_bytes: int, passes: Passes) -> list[Cost]:
    """The cost of each pass at least, on one device."""
    L, B, T, D = workload.L, workload.B, workload.T, workload.D
    hidden_bytes = L * B * T * D * element_bytes
    scores = applied = 0
    for words in workload.spans():
        V = words[-1][1]  # valid tokens
        A = sum(end - start - 1 for start, end in words if end - start > 1)  # anchors: all but the last of a word
        scores += A * V
        applied += 2 * A * V - A * A  # a weight between two anchors is applied in one product with its mirror image
    forward = Cost(hidden_bytes, 2 * scores * D * L)
    if passes == "forward":
        return [forward]
    return [forward, Cost(2 * hidden_bytes, 2 * (scores + applied) * D * L)]


def floor_seconds(workload: Workload, element_bytes: int, passes: Passes, rates: Rates) -> float:
    """The sum of the passes' floors."""
    return sum(cost.seconds(rates) for cost in costs(workload, element_bytes, passes))


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Medians of a copy of a large buffer, and of a square matrix product."""
    on_gpu = device.type == "cuda"
    source = torch.ones((1 << 30) if on_gpu else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if on_gpu else 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    b = torch.empty_like(a)
    copy = _median_seconds(lambda: target.copy_(source), device)
    product = _median_seconds(lambda: torch.mm(a, a, out=b), device)
    return Rates(2 * source.nbytes / copy, 2 * n**3 / product)


def _median_seconds(fn, device: torch.device) -> float:
    samples = []
    for _ in range(11):
        synchronize(device)
        start = time.perf_counter()
        fn()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return median(samples[1:])  # the first one warms up
