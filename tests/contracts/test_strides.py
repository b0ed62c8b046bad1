"""Hidden states and upstream gradients may lie in memory in any way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import FP16, Backend, Case, thinned
from tests.compare import upstream_gradients
from tests.contracts.ops import Op, Problem, make_problem, same_bits

# from a buffer [2*L, 2*B, 2*T, 2*D] views of [L, B, T, D]
STACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "slice of a larger buffer": lambda x: x[1:4, 2:7, 3:13, 1:7],
    "every second number": lambda x: x[:3, :5, :10, ::2],
    "every second token": lambda x: x[:3, :5, ::2, :6],
    "every second layer": lambda x: x[::2, :5, :10, :6],
    "batch first": lambda x: x[:5, :3, :10, :6].transpose(0, 1),
    "tokens before sequences": lambda x: x[:3, :10, :5, :6].transpose(1, 2),
    "width first": lambda x: x[:3, :5, :6, :10].transpose(2, 3),
    "one sequence, seen by all": lambda x: x[:3, :1, :10, :6].expand(3, 5, 10, 6),
    "one layer, seen as all": lambda x: x[:1, :5, :10, :6].expand(3, 5, 10, 6),
}


def first(kinds: Iterable[str], *names: str) -> list[Any]:
    return thinned(names, [kind for kind in kinds if kind not in names])


def buffer(backend: Backend) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 10, 20, 12, generator=generator).to(backend.device, backend.sharpest)


def close(x: Tensor, y: Tensor, backend: Backend) -> None:
    """As the same arithmetic in another order gives it."""
    rtol = torch.finfo(backend.sharpest).eps * 100
    torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * y.abs().max().item())


@pytest.mark.parametrize("listed", thinned([True], [False]), ids=["list", "stacked"])
@pytest.mark.parametrize("view", first(STACKED, "slice of a larger buffer", "width first"))
def test_hidden_states(backend: Backend, op: Op, view: str, listed: bool) -> None:
    """As their contiguous copy, down to the gradient of the buffer that they are a view of; or refused, not copied."""
    problem = make_problem(op, backend)
    if not backend.reads_strided:
        hidden = STACKED[view](buffer(backend))
        there = problem.with_hidden(hidden.unbind(0) if listed else hidden)
        with pytest.raises(ValueError, match=r"hidden_states\[0\] is a view .* Pass layer.contiguous\(\)"):
            there.forward()
        return

    def run(copy: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        leaf = buffer(backend).requires_grad_()
        hidden = STACKED[view](leaf)
        assert not hidden.is_contiguous()
        hidden = hidden.contiguous() if copy else hidden
        there = problem.with_hidden(hidden.unbind(0) if listed else hidden)
        outputs = there.forward()
        sum(output.sum() for output in outputs).backward()
        assert leaf.grad is not None
        return outputs, leaf.grad

    (outputs, gradient), (expected, expected_gradient) = run(copy=False), run(copy=True)
    for output, wanted in zip(outputs, expected, strict=True):
        close(output, wanted, backend)
    close(gradient, expected_gradient, backend)


def test_stacked_and_list_are_the_same(backend: Backend, op: Op) -> None:
    stacked = make_problem(op, backend)
    listed = make_problem(op, backend, Case(L=3, stacked=False))
    assert all(map(same_bits, stacked.forward(), listed.forward()))
    of_stack, of_list = stacked.gradients(), listed.gradients()
    assert all(map(same_bits, of_stack[0], of_list))
    assert all(map(same_bits, of_stack[1:], of_list[3:]))


def test_one_tensor_in_two_places(backend: Backend, op: Op) -> None:
    """As models with shared blocks give it: its gradient is the sum of both."""
    problem = make_problem(op, backend, Case(L=3, stacked=False))
    first, second, _ = problem.hidden
    twice = problem.with_hidden([first, second, first])
    apart = problem.with_hidden([first, second, first.detach().clone().requires_grad_()])
    assert all(map(same_bits, twice.forward(), apart.forward()))
    outputs = twice.forward()
    (together,) = torch.autograd.grad(outputs, first, upstream_gradients(outputs))
    in_first, _, in_third, *_ = apart.gradients()
    close(together, in_first + in_third, backend)


UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # carma's stability knows no temperature

# what follows the loss decides how its upstream gradient lies: expand gives it stride 0, permute turns it around
CONSUMERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(),
    "mean": lambda x: x.mean(),
    "weighted sum": lambda x: (x * torch.linspace(-1, 2, x.numel()).to(x).view(x.shape)).sum(),
    "expand": lambda x: x.expand(3, *x.shape).sum(),
    "cat": lambda x: torch.cat([x[None], 2 * x[None]], dim=-1 if x.dim() else 0).square().sum(),
    "part of a cat": lambda x: torch.cat([x.reshape(-1), x.new_ones(3)])[::2].square().sum(),
    "transpose": lambda x: x.permute(tuple(range(x.dim()))[::-1]).square().sum(),
    "flip": lambda x: (x.flip(0) if x.dim() else x).cumsum(0).sum(),
    "every second": lambda x: (x[..., ::2] if x.dim() else x).sum(),
}


@pytest.mark.parametrize("consumer", first(CONSUMERS, "expand", "transpose"))
def test_upstream_gradients(backend: Backend, op: Op, consumer: str) -> None:
    """As a contiguous copy of the same upstream gradient."""
    problem = make_problem(op, backend)
    outputs = problem.forward()
    for output in outputs:
        whole = torch.autograd.grad(CONSUMERS[consumer](output), problem.leaves, retain_graph=True, **UNUSED)
        leaf = output.detach().requires_grad_()
        (upstream,) = torch.autograd.grad(CONSUMERS[consumer](leaf), leaf)
        copied = upstream.clone(memory_format=torch.contiguous_format)
        in_two = torch.autograd.grad(output, problem.leaves, copied, retain_graph=True, **UNUSED)
        assert all(map(same_bits, whole, in_two))


def test_an_upstream_gradient_is_not_written_to(backend: Backend, op: Op) -> None:
    problem = make_problem(op, backend)
    outputs = problem.forward()
    upstream = [torch.randn_like(output) for output in outputs]
    before = [tensor.clone() for tensor in upstream]
    torch.autograd.grad(outputs, problem.leaves, upstream)
    assert all(map(same_bits, upstream, before))


@pytest.mark.usefixtures("users_defaults")
def test_layers_more_than_2_31_numbers_apart(backend: Backend, op: Op) -> None:
    """Only the ends of the buffer are ever touched, so it is memory in name only."""
    if FP16 not in backend.tolerance:
        pytest.skip("needs a dtype of two bytes")
    problem = make_problem(op, backend, Case(L=2), dtype=FP16)
    near = problem.hidden
    assert isinstance(near, Tensor)
    distance = 2**31 + 8
    memory = torch.empty(distance + near[0].numel(), dtype=FP16, device=backend.device)
    far = memory.as_strided(near.shape, (distance, *near.stride()[1:])).copy_(near.detach()).requires_grad_()
    there = problem.with_hidden(far)
    assert all(map(same_bits, there.forward(), problem.forward()))
    assert all(map(same_bits, there.gradients(), problem.gradients()))


def test_problem_has_a_temperature_where_it_says_so(backend: Backend, op: Op) -> None:
    problem: Problem = make_problem(op, backend)
    gradient = torch.autograd.grad(problem.forward()[0].sum(), problem.temperature, **UNUSED)[0]
    assert (gradient != 0) == op.has_temperature
