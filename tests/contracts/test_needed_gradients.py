"""What needs no gradient gets none, and changes nothing for the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import BF16, FP16, FP32, FP64, Backend, Case, thinned
from tests.compare import upstream_gradients
from tests.contracts.ops import OPS, Op, Problem, make_problem, same_bits

LISTED = Case(L=4, D=48, stacked=False)  # wide enough for the torch backend to take layers together


def gradients(problem: Problem) -> list[Tensor | None]:
    """`.grad` of every layer and of the temperature after a backward."""
    outputs = problem.forward()
    torch.autograd.backward(outputs, upstream_gradients(outputs))
    return [leaf.grad for leaf in (*problem.hidden, problem.temperature)]


@pytest.mark.parametrize("frozen", thinned([(1,), (0, 1, 3)], [(0,), (3,), (0, 1), (0, 2), (1, 2, 3)]), ids=str)
def test_frozen_layers(backend: Backend, op: Op, frozen: tuple[int, ...]) -> None:
    expected = gradients(make_problem(op, backend, LISTED))
    problem = make_problem(op, backend, LISTED)
    for layer in frozen:
        problem.hidden[layer].requires_grad_(False)
    actual = gradients(problem)
    for place, (ours, whole) in enumerate(zip(actual, expected, strict=True)):
        if place in frozen or whole is None:
            assert ours is None
        else:
            assert ours is not None
            assert same_bits(ours, whole)


def test_a_frozen_temperature(backend: Backend, op: Op) -> None:
    expected = gradients(make_problem(op, backend, LISTED))
    problem = make_problem(op, backend, LISTED)
    problem.temperature.requires_grad_(False)
    *actual, none = gradients(problem)
    assert none is None
    for ours, whole in zip(actual, expected, strict=False):
        assert ours is not None
        assert whole is not None
        assert same_bits(ours, whole)


@pytest.mark.parametrize("stacked", thinned([True], [False]))
@pytest.mark.parametrize("op", [op for op in OPS if op.has_temperature], ids=str)
def test_only_the_temperature(backend: Backend, op: Op, stacked: bool) -> None:
    case = Case(L=4, D=48, stacked=stacked)
    expected = make_problem(op, backend, case).gradients()[-1]
    problem = make_problem(op, backend, case)
    for tensor in [problem.hidden] if isinstance(problem.hidden, Tensor) else problem.hidden:
        tensor.requires_grad_(False)
    outputs = problem.forward()
    upstream = upstream_gradients(outputs)
    (gradient,) = torch.autograd.grad(outputs, problem.temperature, upstream)
    assert same_bits(gradient, expected)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_no_gradient_at_all(backend: Backend, op: Op, guard: type[torch.no_grad]) -> None:
    problem = make_problem(op, backend)
    with guard():
        outputs = problem.forward()
    assert not any(output.requires_grad for output in outputs)
    assert all(map(same_bits, outputs, problem.forward()))
    frozen = problem.with_hidden(problem.hidden.detach())  # type: ignore[union-attr]
    frozen.temperature.requires_grad_(False)
    assert not any(output.requires_grad for output in frozen.forward())


@pytest.mark.parametrize("stacked", thinned([False], [True]))
def test_outputs_one_by_one(backend: Backend, op: Op, stacked: bool) -> None:
    """For outputs that are not used autograd passes zeros, or nothing: the gradients of each alone add up to all."""
    problem = make_problem(op, backend, Case(L=4, stacked=stacked))
    outputs = problem.forward()
    whole = problem.gradients(outputs, retain_graph=True)
    parts = [
        torch.autograd.grad(output, problem.leaves, up, retain_graph=True, allow_unused=True, materialize_grads=True)
        for output, up in zip(outputs, upstream_gradients(outputs), strict=True)
    ]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        eps = torch.finfo(together.dtype).eps
        torch.testing.assert_close(sum(apart), together, rtol=100 * eps, atol=100 * eps * together.abs().max().item())


@pytest.mark.parametrize("of_temperature", thinned([BF16], [FP64, FP32]), ids=str)
@pytest.mark.parametrize("dtype", [FP64, FP32, FP16, BF16], ids=str)
def test_dtypes(backend: Backend, op: Op, dtype: torch.dtype, of_temperature: torch.dtype) -> None:
    """Losses in fp32 (fp64 for fp64), gradients in the dtype of what they are the gradient of."""
    if dtype not in backend.tolerance:
        pytest.skip(f"the backend does not take {dtype}")
    problem = make_problem(op, backend, LISTED, dtype=dtype)
    problem.temperature.data = problem.temperature.data.to(of_temperature)
    assert all(output.dtype == (FP64 if dtype == FP64 else FP32) for output in problem.forward())
    *hidden, temperature = gradients(problem)
    assert all(gradient is not None and gradient.dtype == dtype for gradient in hidden)
    assert temperature is None or temperature.dtype == of_temperature
