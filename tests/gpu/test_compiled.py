"""`torch.compile` as users call it: what inductor makes of the steps around the kernels, and CUDA graphs of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.cases import BF16, FP32, Backend, Case
from tests.compare import upstream_gradients
from tests.contracts.ops import OPS, HiddenStates, Op, make_problem

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300), pytest.mark.usefixtures("users_defaults")]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["list", "stacked"])
@pytest.mark.parametrize("op", [op for op in OPS if op.name in ("carma", "mi of listed pairs", "similarity")], ids=str)
def test_as_eager(backend: Backend, op: Op, stacked: bool, dtype: torch.dtype, mode: str) -> None:
    """On other numbers at each call: a graph is recorded at the second, and replayed from the third on."""
    problem = make_problem(op, backend, Case(L=3, D=64, stacked=stacked), dtype=dtype)

    def call(hidden: HiddenStates, tau: Tensor) -> tuple[Tensor, ...]:
        return op.call(hidden, problem.given, tau)

    compiled = torch.compile(call, fullgraph=True, mode=mode)
    hidden = [problem.hidden] if isinstance(problem.hidden, Tensor) else problem.hidden
    generator = torch.Generator(backend.device).manual_seed(0)
    for _ in range(5):
        with torch.no_grad():
            for leaf in hidden:
                leaf.normal_(generator=generator)
        torch.compiler.cudagraph_mark_step_begin()
        outputs = tuple(output.clone() for output in compiled(problem.hidden, problem.temperature))
        gradients = torch.autograd.grad(outputs, problem.leaves, upstream_gradients(outputs))
        expected = problem.forward()
        for x, y in zip((*outputs, *gradients), (*expected, *problem.gradients(expected)), strict=True):
            # the kernels' part has the same bits; inductor adds up the losses of layers in an order of its own
            torch.testing.assert_close(x, y, rtol=2 * torch.finfo(y.dtype).eps + 1e-6, atol=1e-7)
