"""Who divides by what: however many steps are accumulated, the optimizer gets the CARMA gradient of the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

import carma_kernels as ck
from carma_kernels.integrations.transformers import HiddenStateTap
from tests.integration.trainer.toys import (
    CARMA_ALONE,
    Gradients,
    InOrder,
    assert_same,
    examples,
    model,
    trainer,
    window_gradients,
)


def windows(count: int, steps: int) -> list[list[list[dict[str, Any]]]]:
    """Of batches of two, in order; the last window of an epoch may be short."""
    every = examples(count)
    batches = [every[at : at + 2] for at in range(0, count, 2)]
    return [batches[at : at + steps] for at in range(0, len(batches), steps)]


def steps_of(folder: Path, count: int, **options: Any) -> list[dict[str, Tensor]]:
    seen = Gradients()
    trainer(folder, count, callbacks=[seen], **options).train()
    return seen.steps


@pytest.mark.parametrize("model_takes_loss_arguments", [True, False])
@pytest.mark.parametrize(("steps", "count"), [(1, 4), (2, 6), (4, 12), (8, 22)])
def test_gradient_is_that_of_the_window(
    steps: int, count: int, model_takes_loss_arguments: bool, tmp_path: Path
) -> None:
    """Trainer divides the loss by the steps, or takes it to be divided already."""
    own = model()
    own.accepts_loss_kwargs = model_takes_loss_arguments
    seen = steps_of(tmp_path, count, gradient_accumulation_steps=steps, model=own)
    expected = windows(count, steps)
    assert len(seen) == len(expected)
    for actual, batches in zip(seen, expected, strict=True):
        assert_same(actual, window_gradients(batches, CARMA_ALONE))


class Naive(InOrder):
    """What one would write first: add the loss of the batch to that of the task."""

    def compute_loss(self, model: Any, inputs: Any, num_items_in_batch: Any = None, **_: Any) -> Any:
        inputs = dict(inputs)
        spans = inputs.pop("spans")
        with HiddenStateTap(model) as tap:
            task = Trainer.compute_loss(self, model, inputs, num_items_in_batch=num_items_in_batch)
            carma = tap.carma_loss(spans, self.carma, mask=spans.attention_mask)
        return ck.total_loss(task, carma.loss, self.carma.carma_weight)


@pytest.mark.parametrize("steps", [2])
def test_what_one_would_write_first_is_too_large(steps: int, tmp_path: Path) -> None:
    """By the number of steps: the failure that the mixin is for. Equal batches, so that the mean is no matter."""
    same = examples(1) * 2 * steps
    naive, ours = Gradients(), Gradients()
    for kind, seen in ((Naive, naive), (InOrder, ours)):
        one = trainer(tmp_path, kind=kind, gradient_accumulation_steps=steps, callbacks=[seen])
        one.train_dataset = same
        one.train()
    for name, gradient in ours.steps[0].items():
        torch.testing.assert_close(naive.steps[0][name], steps * gradient, rtol=1e-5, atol=1e-7)
