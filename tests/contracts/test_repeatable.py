"""The same inputs give the same bits, every time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.cases import BACKENDS, BF16, FP32, Backend, Case, thinned
from tests.contracts.ops import Op, Problem, make_problem, same_bits


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("users_defaults")
@pytest.mark.parametrize("dtype", thinned([FP32], [BF16]), ids=str)
def test_20_runs(backend: Backend, op: Op, dtype: torch.dtype) -> None:
    check(make_problem(op, backend, Case(L=2), dtype=dtype), runs=2 if backend.interpret else 20)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if not backend.interpret], ids=str)
@pytest.mark.usefixtures("users_defaults", "two_threads")
def test_with_several_threads(backend: Backend, op: Op) -> None:
    """So many numbers that torch's operators share out a chunk of rows, among which tokens occur again and again."""
    check(make_problem(op, backend, Case(L=2, D=4096), dtype=FP32), runs=4)


def check(problem: Problem, runs: int) -> None:
    outputs = problem.forward()
    gradients = problem.gradients(outputs)
    for _ in range(runs - 1):
        again = problem.forward()
        assert all(map(same_bits, again, outputs))
        assert all(map(same_bits, problem.gradients(again), gradients))
