"""Whoever trains on a config, in a loop as in the README or in a Trainer, trains on one loss: no padding is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaWindow, HiddenStateTap
from tests.integration.trainer.toys import (
    CARMA_ALONE,
    Gradients,
    assert_same,
    batch_of,
    examples,
    forward,
    gradients,
    model,
    trainer,
)

Step = Callable[[HiddenStateTap, dict[str, Any]], ck.CarmaOutput]


def by_the_tap(tap: HiddenStateTap, batch: dict[str, Any]) -> ck.CarmaOutput:
    return tap.carma_loss(batch["spans"], CARMA_ALONE)


def by_a_window(tap: HiddenStateTap, batch: dict[str, Any]) -> ck.CarmaOutput:
    return CarmaWindow.of([batch]).carma_loss(tap, batch["spans"], CARMA_ALONE)


def by_a_module(tap: HiddenStateTap, batch: dict[str, Any]) -> ck.CarmaOutput:
    return ck.CarmaLoss(CARMA_ALONE)(tap.hidden_states, batch["spans"])


@pytest.mark.parametrize("step", [by_the_tap, by_a_window, by_a_module])
def test_a_loop_and_the_trainer(step: Step, tmp_path: Path) -> None:
    batch = batch_of(examples(2))
    assert batch["spans"].is_padded
    loop = model()
    tap = HiddenStateTap(loop)
    forward(loop, batch)
    step(tap, batch).loss.backward()

    seen = Gradients()
    trainer(tmp_path, 2, callbacks=[seen]).train()
    assert_same(seen.steps[0], gradients(loop))
