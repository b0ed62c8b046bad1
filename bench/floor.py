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
    scores, applied, hidden = _products(workload), _products(workload, applied=True), element_bytes * _numbers(workload)
    forward = Cost(hidden, scores)
    if passes == "forward":
        return [forward]
    return [forward, Cost(2 * hidden, scores + applied)]


def kernel_cost(kernel: str, workload: Workload, element_bytes: int) -> Cost | None:
    """Of the launches of one of this package's kernels in a step with both losses; None for what is small.

    As if the hidden states were read once by each, and gradients written once.
    """
    hidden, scores = element_bytes * _numbers(workload), _products(workload)
    applied = _products(workload, applied=True)
    return {
        "stability_forward": Cost(hidden, 0),
        "stability_backward": Cost(2 * hidden, 0),
        "short_forward": Cost(hidden, scores),
        "short_backward": Cost(2 * hidden, scores + applied),
        "mi_scores": Cost(hidden, scores),
        "mi_weights": Cost(hidden, scores),
        "mi_gradient": Cost(2 * hidden, applied),
    }.get(kernel)


def _numbers(workload: Workload) -> int:
    """Of the hidden states."""
    return workload.L * workload.B * workload.T * workload.D


def _products(workload: Workload, *, applied: bool = False) -> int:
    """FLOPs of the scores, or of what their weights are applied to."""
    products = 0
    for words in workload.spans():
        V = words[-1][1]  # valid tokens
        A = sum(end - start - 1 for start, end in words if end - start > 1)  # anchors: all but the last of a word
        # a weight between two anchors is applied in one product with its mirror image
        products += 2 * A * V - A * A if applied else A * V
    return 2 * products * workload.D * workload.L


def floor_seconds(workload: Workload, element_bytes: int, passes: Passes, rates: Rates) -> float:
    """The sum of the passes' floors."""
    return sum(cost.seconds(rates) for cost in costs(workload, element_bytes, passes))


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Medians of a copy of a large buffer, and of a square matrix product."""
    on_gpu = device.type == "cuda"
    source = torch.ones((1 << 30) if on_gpu else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if on_gpu else 1024
    a = torch.randn(n, n, device=device).to(dtype)  # equal numbers take less power, and go faster
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
