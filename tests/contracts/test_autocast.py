"""The result depends on the inputs, not on an autocast around the call."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from tests.cases import BF16, FP16, FP32, Backend, Case, thinned
from tests.contracts.ops import Op, make_problem, same_bits


@pytest.mark.parametrize("around", thinned(["both"], ["forward", "backward"]))
@pytest.mark.parametrize("low", thinned([BF16], [FP16]), ids=str)
@pytest.mark.parametrize("dtype", thinned([FP32], [BF16]), ids=str)
def test_autocast_changes_nothing(backend: Backend, op: Op, dtype: torch.dtype, low: torch.dtype, around: str) -> None:
    def ambient(of: str) -> torch.autocast | nullcontext[None]:
        return torch.autocast(backend.device, dtype=low) if around in (of, "both") else nullcontext()

    problem = make_problem(op, backend, Case(L=3, D=64), dtype=dtype)
    expected = problem.forward()
    with ambient("forward"):
        outputs = problem.forward()
    assert all(map(same_bits, outputs, expected))
    with ambient("backward"):
        gradients = problem.gradients(outputs)
    assert all(map(same_bits, gradients, problem.gradients(expected)))
