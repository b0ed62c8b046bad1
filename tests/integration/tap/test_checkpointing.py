"""Activation checkpointing runs blocks again during the backward: nothing is captured twice, no gradient is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.tap.models import LAYERS, SPANS, batch, blocks_of, build, distance, gradients

selective = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])


def by_the_library(model: PreTrainedModel, **options: Any) -> None:
    """transformers checkpoints `forward`: hooks run outside."""
    model.activation_checkpointing_enable(options)


def by_hand(model: PreTrainedModel, **options: Any) -> None:
    """A user, and transformers before 5, checkpoint `__call__`: hooks run inside, and again in the backward."""
    for block in blocks_of(model):
        forward = block._call_impl
        block._call_impl = partial(_checkpointed, forward, options)  # what calling a module runs


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any], states: Any, **inputs: Any) -> Any:
    return checkpoint(partial(forward, **inputs), states, **options)


WAYS = {
    "none": lambda _model: None,
    **{
        f"{place.__name__}, {name}": partial(place, **options)
        for place in (by_the_library, by_hand)
        for name, options in {
            "non-reentrant": {"use_reentrant": False},
            "reentrant": {"use_reentrant": True},
            "selective": {"use_reentrant": False, "context_fn": selective},
        }.items()
    },
}


def run(way: str, *, pass_through: bool, task_weight: float = 1.0, steps: int = 1) -> dict[str, torch.Tensor]:
    """The gradients."""
    model = build()
    calls = [0] * LAYERS
    for layer, block in enumerate(blocks_of(model)):
        block.self_attn.register_forward_hook(lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1))
    WAYS[way](model)
    tap = HiddenStateTap(model, pass_through=pass_through)
    for _ in range(steps):
        task = model(**batch(), use_cache=False).loss
        captured = tap.hidden_states
        assert len(captured) == LAYERS
        assert all(states.requires_grad for states in captured)
        (task_weight * task + tap.carma_loss(SPANS).loss).backward()
        # recomputed outputs are not captured: what is left is what was there, or nothing
        left = [None if capture.states is None else id(capture.states) for capture in tap._captures]
        assert left in ([id(states) for states in captured], [None] * LAYERS)
    assert calls == [steps * (1 if way == "none" else 2)] * LAYERS, "nothing was recomputed"
    return gradients(model)


@pytest.mark.parametrize("pass_through", [True, False])
@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_equal_gradients(way: str, pass_through: bool) -> None:
    """Of two steps, each of which starts afresh."""
    expected = run("none", pass_through=False, steps=2)
    assert distance(run(way, pass_through=pass_through, steps=2), expected) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_the_carma_loss_alone(way: str) -> None:
    """Without a task loss nothing flows into the last block from above."""
    expected = run("none", pass_through=False, task_weight=0.0)
    assert distance(run(way, pass_through=True, task_weight=0.0), expected) < 1e-5


def test_carmas_part_is_felt() -> None:
    model = build()
    model(**batch()).loss.backward()
    assert distance(gradients(model), run("none", pass_through=True)) > 0.5


def test_frozen_embeddings() -> None:
    """Reentrant checkpointing gives no gradient to blocks whose input needs none: the input is made to, as in peft."""
    model = build()
    model.get_input_embeddings().requires_grad_(False)
    by_the_library(model, use_reentrant=True)
    model.enable_input_require_grads()
    tap = HiddenStateTap(model)
    model(**batch(), use_cache=False)
    tap.carma_loss(SPANS).loss.backward()
    assert all(p.grad is not None for block in blocks_of(model)[:-1] for p in block.parameters())


def test_a_forward_within_a_backward_is_not_captured() -> None:
    """As when the whole model is checkpointed."""

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
            ctx.model = model
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            with torch.enable_grad():
                ctx.model(**batch())
            return None, grad

    model = build()
    tap = HiddenStateTap(model, pass_through=False)
    task = model(**batch()).loss
    captured = tap.hidden_states
    Again.apply(model, task).backward()
    assert [id(states) for states in tap.hidden_states] == [id(states) for states in captured]
