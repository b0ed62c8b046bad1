"""A step captured in a CUDA graph computes at every replay what it would compute if it were called."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.cases import BF16, FP32, Backend, Case
from tests.compare import upstream_gradients
from tests.contracts.ops import Op, Problem, make_problem, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("users_defaults")]


def step_of(problem: Problem, op: Op, number: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward, from upstream gradients that are on the device beforehand."""
    temperature = problem.temperature if not number else 0.1

    def forward() -> tuple[Tensor, ...]:
        return op.call(problem.hidden, problem.given, temperature)

    leaves = [leaf for leaf in problem.leaves if not (number and leaf is problem.temperature)]
    upstream = upstream_gradients(forward())

    def step() -> tuple[Tensor, ...]:
        outputs = forward()
        return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))

    return step


def capture(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """As torch's documentation has it: warmed up on another stream first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def other_calls(op: Op, backend: Backend) -> None:
    """They take whatever host and device memory the capture has let go of."""
    for L in range(1, 9):
        for _ in range(5):
            make_problem(op, backend, Case(L=L, stacked=False)).gradients()
    gc.collect()
    torch.cuda.synchronize()


@pytest.mark.parametrize("number", [False, True], ids=["learned temperature", "number"])
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_replay(backend: Backend, op: Op, dtype: torch.dtype, stacked: bool, number: bool) -> None:
    problem = make_problem(op, backend, Case(L=3, D=64, stacked=stacked), dtype=dtype)
    step = step_of(problem, op, number)
    graph, results = capture(step)
    for seed in range(3):
        other_calls(op, backend)
        generator = torch.Generator(backend.device).manual_seed(seed)
        hidden = [problem.hidden] if isinstance(problem.hidden, Tensor) else problem.hidden
        with torch.no_grad():
            for leaf in hidden:
                leaf.normal_(generator=generator)
        expected = step()
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(same_bits, results, expected))


def test_two_graphs(backend: Backend, op: Op) -> None:
    """Each keeps its own tables."""
    steps = [
        step_of(make_problem(op, backend, Case(L=L, D=64, stacked=False), dtype=FP32), op, number=True) for L in (2, 5)
    ]
    expected = [step() for step in steps]
    captured = [capture(step) for step in steps]
    for _ in range(2):
        for (graph, results), wanted in zip(captured, expected, strict=True):
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(same_bits, results, wanted))
