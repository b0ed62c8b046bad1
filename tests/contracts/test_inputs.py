"""Inputs belong to the caller: they are not written to, and a backward that finds them changed says so."""

from __future__ import annotations

import pytest
import torch

from tests.cases import BF16, FP32, Backend, Case, thinned
from tests.contracts.ops import Op, bits, make_problem


@pytest.mark.parametrize("stacked", thinned([False], [True]))
@pytest.mark.parametrize("dtype", thinned([FP32], [BF16]), ids=str)
def test_inputs_are_not_written_to(backend: Backend, op: Op, dtype: torch.dtype, stacked: bool) -> None:
    """Byte for byte, and the versions that autograd counts: Triton's writes do not count themselves."""
    problem = make_problem(op, backend, Case(L=3, stacked=stacked), dtype=dtype)
    given = problem.given
    pairs = given.pairs
    inputs = [*problem.hidden, problem.temperature, given.mask, given.spans.word]
    inputs += [given.spans._packed, pairs.anchor, pairs.positive, pairs.negatives]
    before = [bits(tensor) for tensor in inputs]
    versions = [tensor._version for tensor in inputs]
    problem.gradients()
    assert all(torch.equal(bits(tensor), then) for tensor, then in zip(inputs, before, strict=True))
    assert [tensor._version for tensor in inputs] == versions


@pytest.mark.parametrize("stacked", thinned([False], [True]))
def test_hidden_states_changed_before_the_backward_raise(backend: Backend, op: Op, stacked: bool) -> None:
    problem = make_problem(op, backend, Case(L=3, stacked=stacked))
    outputs = problem.forward()
    with torch.no_grad():
        problem.hidden[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        problem.gradients(outputs)
