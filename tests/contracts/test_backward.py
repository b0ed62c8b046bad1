"""Backward can be run again, scaled, but not differentiated; it is the derivative of the forward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.cases import BF16, FP16, FP32, FP64, Backend, Case, thinned
from tests.compare import upstream_gradients
from tests.contracts.ops import Op, make_problem, same_bits


@pytest.mark.parametrize("stacked", thinned([False], [True]))
@pytest.mark.parametrize("dtype", thinned([FP32], [BF16]), ids=str)
def test_a_second_backward_gives_the_same(backend: Backend, op: Op, dtype: torch.dtype, stacked: bool) -> None:
    problem = make_problem(op, backend, Case(L=3, stacked=stacked), dtype=dtype)
    outputs = problem.forward()
    first = problem.gradients(outputs, retain_graph=True)
    first_copy = [gradient.clone() for gradient in first]
    assert all(map(same_bits, problem.gradients(outputs), first))
    assert all(map(same_bits, first, first_copy))  # not one buffer, handed out twice
    with pytest.raises(RuntimeError, match="retain_graph"):
        problem.gradients(outputs)


def test_a_double_backward_raises(backend: Backend, op: Op) -> None:
    """A gradient penalty must not become a constant without a word."""
    problem = make_problem(op, backend)
    gradients = problem.gradients(create_graph=True)
    assert isinstance(problem.hidden, Tensor)
    with pytest.raises(RuntimeError, match="differentiate"):
        (problem.hidden.square().sum() + gradients[0].square().sum()).backward()


def test_a_loss_scale_is_a_factor(backend: Backend, op: Op) -> None:
    """65536, where GradScaler starts: a power of two, so the bits are the same but for the exponent."""
    problem = make_problem(op, backend, dtype=FP32)
    outputs = problem.forward()
    plain = problem.gradients(outputs, retain_graph=True)
    scaled = problem.gradients(tuple(65536 * output for output in outputs))
    assert all(same_bits(65536 * small, large) for small, large in zip(plain, scaled, strict=True))


def test_a_loss_scale_in_fp16(backend: Backend, op: Op) -> None:
    """Gradients that fp16 could not hold unscaled: 1e-9 of a real loss, times 65536, keeps its digits."""
    if FP16 not in backend.tolerance:
        pytest.skip("the backend does not take fp16")
    problem = make_problem(op, backend, dtype=FP16)
    tiny = 2.0**-24
    exact = replace(problem, hidden=problem.hidden.detach().float().requires_grad_())  # type: ignore[union-attr]
    half, single = (
        p.gradients(tuple(tiny * 65536 * output for output in p.forward()))[0].double() for p in (problem, exact)
    )
    wanted = single.to(FP16).double()
    assert wanted.count_nonzero() > wanted.numel() / 4
    error = (half - wanted).abs()
    computed = backend.tolerance[FP16] * wanted.abs().max()
    assert (error <= computed + torch.finfo(FP16).eps * wanted.abs() + 2.0**-24).all()


@pytest.mark.parametrize(
    "case",
    [
        Case(D=3, temperature=0.5),
        Case(D=3, temperature=0.5, pad="left", stacked=False, L=3),
        Case(D=3, temperature=0.5, drawing="dense"),
        Case(D=16, temperature=0.5),
    ],
    ids=str,
)
def test_gradcheck(backend: Backend, op: Op, case: Case) -> None:
    """Against finite differences, the temperature included."""
    if FP64 not in backend.tolerance:
        pytest.skip("finite differences need fp64")
    problem = make_problem(op, backend, case, dtype=FP64)

    def call(tau: Tensor, *hidden: Tensor) -> tuple[Tensor, ...]:
        return op.call(hidden[0] if case.stacked else hidden, problem.given, tau)

    leaves = [problem.hidden] if isinstance(problem.hidden, Tensor) else problem.hidden
    assert gradcheck(call, (problem.temperature, *leaves), atol=1e-7, rtol=1e-5, fast_mode=True)


def test_upstream_gradients_are_not_all_alike() -> None:
    """Or the tests above could not tell a loss's entries apart."""
    (upstream,) = upstream_gradients([torch.zeros(2, 3, 4)])
    assert len(upstream.unique()) > 8
