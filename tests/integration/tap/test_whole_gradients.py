"""Who asks for the gradient of the tapped hidden states gets all of it: the losses' and what comes from above."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.tap.models import LAYERS, SPANS, batch, blocks_of, build

Losses = Callable[[Tensor, ck.CarmaOutput], Tensor]
LOSSES: dict[str, Losses] = {
    "both losses": lambda task, carma: ck.total_loss(task, carma.loss, 0.5),
    "carma alone": lambda _task, carma: carma.loss,
    "task alone": lambda task, _carma: task,
}

Seen = list[Tensor]
Ask = Callable[[Tensor, Seen], list[Tensor | None]]


def by_grad(loss: Tensor, states: Seen) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, states, allow_unused=True))


def by_grad_of_one_at_a_time(loss: Tensor, states: Seen) -> list[Tensor | None]:
    return [torch.autograd.grad(loss, layer, retain_graph=True, allow_unused=True)[0] for layer in states]


def by_retain_grad(loss: Tensor, states: Seen) -> list[Tensor | None]:
    for layer in states:
        layer.retain_grad()
    loss.backward()
    return [layer.grad for layer in states]


def by_tensor_hook(loss: Tensor, states: Seen) -> list[Tensor | None]:
    found: dict[int, Tensor] = {}
    for at, layer in enumerate(states):
        layer.register_hook(lambda grad, at=at: found.__setitem__(at, grad))
    loss.backward()
    return [found.get(at) for at in range(len(states))]


def from_the_tap(tap: HiddenStateTap, _before: Seen, _after: Seen) -> Seen:
    return tap.hidden_states


def from_hooks_set_before(_tap: HiddenStateTap, before: Seen, _after: Seen) -> Seen:
    return before


def from_hooks_set_after(_tap: HiddenStateTap, _before: Seen, after: Seen) -> Seen:
    return after


def run(
    pass_through: bool, where: Callable[[HiddenStateTap, Seen, Seen], Seen], ask: Ask, losses: Losses
) -> list[Tensor | None]:
    model = build().double()
    before, after = keep_outputs(model), Seen()
    tap = HiddenStateTap(model, pass_through=pass_through)
    after = keep_outputs(model)
    task = model(**batch()).loss
    states = where(tap, before, after)
    return ask(losses(task, tap.carma_loss(SPANS)), states)


def keep_outputs(model: nn.Module) -> Seen:
    seen = Seen()

    def keep(_block: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    for block in blocks_of(model):
        block.register_forward_hook(keep)
    return seen


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("ask", [by_grad, by_grad_of_one_at_a_time, by_retain_grad, by_tensor_hook])
@pytest.mark.parametrize("where", [from_the_tap, from_hooks_set_before, from_hooks_set_after])
def test_hidden_states_get_the_whole_gradient(where: Any, ask: Ask, losses: str) -> None:
    got = run(True, where, ask, LOSSES[losses])
    expected = run(False, from_the_tap, by_grad, LOSSES[losses])
    assert len(got) == len(expected) == LAYERS
    for layer, plain in zip(got, expected, strict=True):
        assert layer is not None
        assert plain is not None
        assert torch.allclose(layer, plain, rtol=1e-10, atol=1e-14)


def test_a_penalty_on_the_activations_adds_to_it() -> None:
    """Losses of the user's own, of the very states that the tap hands out."""
    grads = []
    for pass_through in (True, False):
        model = build().double()
        tap = HiddenStateTap(model, pass_through=pass_through)
        task = model(**batch()).loss
        penalty = sum(layer.square().mean() for layer in tap.hidden_states)
        (task + penalty + tap.carma_loss(SPANS).loss).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for got, plain in zip(*grads, strict=True):
        assert torch.allclose(got, plain, rtol=1e-10, atol=1e-14)
