"""What the kernels and the host reach, in the summary at the end: figures to look at, limits are for the benches."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

import carma_kernels as ck
from carma_kernels import _runtime

pytestmark = [pytest.mark.gpu, pytest.mark.alone, pytest.mark.usefixtures("users_defaults")]

Events = tuple[torch.cuda.Event, torch.cuda.Event]


def problem(B: int, T: int, L: int, D: int) -> tuple[torch.Tensor, ck.TokenSpans]:
    hidden = torch.randn(L, B, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    words = [[(at, at + 2 + at % 3) for at in range(0, T - 4, 8)]] * B
    return hidden, ck.TokenSpans.from_lists(words, seq_len=T).to("cuda")


def seconds_by_kernel(
    step: Callable[[], object], monkeypatch: pytest.MonkeyPatch, repeats: int = 20
) -> dict[str, float]:
    """Of one step; the median of the repeats, between events before and after each launch."""
    launch = _runtime.launch
    times: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        events: defaultdict[str, list[Events]] = defaultdict(list)

        def timed(kernel: Any, *arguments: Any, _events: Any = events, **options: Any) -> Any:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            compiled = launch(kernel, *arguments, **options)
            end.record()
            _events[kernel.__name__.strip("_").removesuffix("_kernel")].append((start, end))
            return compiled

        torch.cuda._sleep(10**7)  # so that the launches wait in the queue, and the events lie close to the kernels
        with monkeypatch.context() as patch:
            patch.setattr(_runtime, "launch", timed)
            step()
        torch.cuda.synchronize()
        for name, pairs in events.items():
            times[name].append(sum(start.elapsed_time(end) for start, end in pairs) / 1e3)
    return {name: statistics.median(of_steps) for name, of_steps in times.items()}


@pytest.mark.parametrize(
    "shape", [(16, 58, 12, 768), (256, 58, 12, 768), (8, 1024, 28, 3072), (1, 8192, 16, 2048)], ids=str
)
def test_the_kernels(
    shape: tuple[int, int, int, int], measured: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GB/s: as if each kernel read the hidden states once, and a backward's wrote them. TFLOP/s: of the Gram matrix."""
    B, T, L, D = shape
    hidden, spans = problem(*shape)

    def step() -> None:
        torch.autograd.grad(ck.carma_loss(hidden, spans, backend="triton").loss, hidden)

    step()
    found = seconds_by_kernel(step, monkeypatch)
    assert found
    word = spans.word[0]
    anchors = int((word[:-1] == word[1:])[word[:-1] >= 0].sum())
    for name, seconds in found.items():
        moved = hidden.nbytes * (2 if name in ("short_backward", "mi_gradient", "stability_backward") else 1)
        rate = f"{moved / seconds / 1e9:.0f} GB/s"
        if name.startswith("mi_") and name != "mi_statistics":
            products = 2 * L * B * anchors * T * D * (2 if name == "mi_gradient" else 1)
            rate += f", {products / seconds / 1e12:.0f} TFLOP/s"
        measured(f"B={B} T={T} L={L} D={D} bf16: {name} {seconds * 1e6:.0f} us, {rate}")


def test_the_host(measured: Callable[[str], None]) -> None:
    """100 calls behind a busy device: by tens, which the launch queue takes, and in one go, which fills it."""
    hidden, spans = problem(16, 58, 12, 768)

    def step() -> None:
        torch.autograd.grad(ck.carma_loss(hidden, spans, backend="triton").loss, hidden)

    def seconds(calls: int) -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(10**8)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls

    for _ in range(10):
        step()
    by_tens, in_one_go = statistics.median(seconds(10) for _ in range(10)), seconds(100)
    torch.cuda.synchronize()
    measured(f"host: carma_loss and its backward, {by_tens * 1e6:.0f} us; 100 in one go, {in_one_go * 1e6:.0f} us each")
