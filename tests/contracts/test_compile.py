"""`torch.compile` takes every loss whole, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import carma_kernels as ck
from tests.cases import Backend, Case
from tests.compare import upstream_gradients
from tests.contracts.ops import OPS, HiddenStates, Op, make_problem, same_bits


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("op", "case"), [*((op, Case(D=64)) for op in OPS), (OPS[-1], Case(D=64, L=3, stacked=False))], ids=str
)
def test_without_a_graph_break(backend: Backend, op: Op, case: Case) -> None:
    problem = make_problem(op, backend, case)

    def call(hidden: HiddenStates, tau: Tensor) -> tuple[Tensor, ...]:
        return op.call(hidden, problem.given, tau)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    outputs = compiled(problem.hidden, problem.temperature)
    expected = problem.forward()
    assert all(map(same_bits, outputs, expected))
    assert all(map(same_bits, problem.gradients(outputs), problem.gradients(expected)))


def test_within_a_model(backend: Backend) -> None:
    """A step of training in one graph: the hidden states are made and the loss is used inside."""
    (op,) = [op for op in OPS if op.name == "carma"]
    problem = make_problem(op, backend, Case(L=1))
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(3)]).to(backend.device, backend.sharpest)

    def step(hidden: Tensor) -> Tensor:
        layers = []
        for block in blocks:
            hidden = hidden + block(hidden).tanh()
            layers.append(hidden)
        carma = ck.carma_loss(layers, problem.given.spans, **problem.given.options)
        return ck.total_loss(hidden.square().mean(), carma.loss, 0.3)

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(problem.hidden[0].detach())
        gradients.append(torch.autograd.grad(loss, list(blocks.parameters()), upstream_gradients([loss])))
    assert all(map(same_bits, *gradients))


def test_other_batches_use_the_same_graph(backend: Backend) -> None:
    """New lengths and new words: compiled once more, with sizes left open, and once for batches without padding."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(hidden: Tensor, spans: ck.TokenSpans) -> Tensor:
        return ck.carma_loss(hidden, spans, backend=backend.name).loss

    call = torch.compile(loss, fullgraph=True, backend=counter)
    for T in (9, 12, 15, 19, 23):
        words = [[(at, at + 2 + T % 2) for at in range(0, T - 3, 4)]] * 2
        mask = [[1] * T, [1] * (T - T % 2) + [0] * (T % 2)]  # some are padded
        spans = ck.TokenSpans.from_lists(words, seq_len=T, attention_mask=mask).to(backend.device)
        hidden = torch.randn(2, 2, T, 6).to(backend.device, backend.sharpest)
        assert same_bits(call(hidden, spans), loss(hidden, spans))
    assert counter.frame_count <= 3
