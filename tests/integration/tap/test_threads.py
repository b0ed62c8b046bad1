"""A backward in one thread takes nothing from another's: several models, tapped or not, train in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.tap.models import SPANS, VALID

STEPS = 250  # of each of four threads
D = 4


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


class Model(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(num_layers))

    def forward(self, states: Tensor) -> Tensor:
        for block in self.blocks:
            states = block(states)
        return states


def tapped_step(num_layers: int) -> Callable[[], list[Tensor]]:
    """A step that returns the gradients of a model's parameters."""
    torch.manual_seed(num_layers)
    model = Model(num_layers)
    states = torch.randn(*VALID.shape, D)
    tap = HiddenStateTap(model)

    def step() -> list[Tensor]:
        task = model(states).square().mean()
        return list(torch.autograd.grad(task + tap.carma_loss(SPANS).loss, list(model.parameters())))

    return step


def plain_step(num_layers: int) -> Callable[[], list[Tensor]]:
    """A step that returns the gradients of every layer."""
    torch.manual_seed(num_layers)
    layers = [torch.randn(*VALID.shape, D, requires_grad=True) for _ in range(num_layers)]

    def step() -> list[Tensor]:
        grads = torch.autograd.grad(ck.carma_loss(layers, SPANS).loss, layers, allow_unused=True)
        return [torch.full((), torch.nan) if grad is None else grad for grad in grads]

    return step


def test_a_thousand_steps_in_four_threads() -> None:
    steps = [tapped_step(11), tapped_step(6), plain_step(8), plain_step(3)]
    expected = [step() for step in steps]  # one after the other

    def wrong_steps(which: int) -> int:
        def is_right(grads: list[Tensor]) -> bool:
            return all(map(torch.equal, grads, expected[which]))

        return sum(not is_right(steps[which]()) for _ in range(STEPS))

    with ThreadPoolExecutor(len(steps)) as pool:
        assert list(pool.map(wrong_steps, range(len(steps)))) == [0] * len(steps)


def test_one_loss_in_two_threads() -> None:
    """Two backwards through the same graph at once."""
    torch.manual_seed(0)
    model = Model(6)
    tap = HiddenStateTap(model)
    model(torch.randn(*VALID.shape, D))
    loss = tap.carma_loss(SPANS).loss
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)

    def wrong_steps(factor: int) -> int:
        wrong = 0
        for _ in range(50):
            grads = torch.autograd.grad(factor * loss, parameters, retain_graph=True)
            wrong += not all(
                torch.allclose(got, factor * want, atol=1e-7) for got, want in zip(grads, expected, strict=True)
            )
        return wrong

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(wrong_steps, (1, 3))) == [0, 0]
