"""Loops of one's own: what a window's batches divide by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

import carma_kernels as ck
from carma_kernels.integrations.transformers import CarmaCollator, CarmaWindow, HiddenStateTap
from tests.integration.trainer.test_scaling import windows
from tests.integration.trainer.toys import (
    CARMA_ALONE,
    assert_same,
    batch_of,
    examples,
    forward,
    gradients,
    model,
    tokenizer,
    window_gradients,
)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_plain_loop(steps: int) -> None:
    for window in windows(8, steps):
        own = model()
        with HiddenStateTap(own) as tap:
            batches = [batch_of(chosen) for chosen in window]
            shares = CarmaWindow.of(batches)
            for batch in batches:
                forward(own, batch)
                shares.carma_loss(tap, batch["spans"], CARMA_ALONE, mask=batch["attention_mask"]).loss.backward()
        assert_same(gradients(own), window_gradients(window))


def test_accelerate_loop() -> None:
    accelerator = Accelerator(cpu=True)
    own = model()
    tap = HiddenStateTap(own)
    collator = CarmaCollator(DataCollatorForLanguageModeling(tokenizer(), mlm=False), tokenizer())
    loader: Any = DataLoader(examples(6), 2, collate_fn=collator)  # type: ignore[arg-type]
    prepared, loader = accelerator.prepare(own, loader)
    batches = list(loader)
    shares = CarmaWindow.of(batches, accelerator)
    for batch in batches:
        forward(prepared, batch)
        mask = batch["attention_mask"]
        accelerator.backward(shares.carma_loss(tap, batch["spans"], CARMA_ALONE, mask=mask).loss)
    assert_same(gradients(own), window_gradients(windows(6, 3)[0]))


class TwoRanks:
    """Of an `Accelerator`, what the window asks of it; the other rank has `others` pairs."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, others: int) -> None:
        self.others = others

    def reduce(self, pairs: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return pairs + self.others


@pytest.mark.parametrize(("others", "expected"), [(9, lambda own: (own + 9) / 2), (0, lambda own: own / 2)])
def test_pairs_are_those_of_all_ranks(others: int, expected: Callable[[int], float]) -> None:
    batch = batch_of(examples(2))
    window = CarmaWindow.of([batch], TwoRanks(others))
    assert isinstance(window.num_pairs, torch.Tensor), "not read"
    assert window.num_pairs.item() == expected(batch["spans"].num_pairs)


@pytest.mark.parametrize("accelerator", [None, TwoRanks(0)])
def test_a_window_without_words_has_zero_gradients(accelerator: Any) -> None:
    own, batch = model(), batch_of(examples(1))
    batch["spans"] = ck.TokenSpans.from_lists([[]], seq_len=batch["input_ids"].shape[1])
    window = CarmaWindow.of([batch, {"input_ids": None}], accelerator)
    assert window.num_batches == 2
    with HiddenStateTap(own) as tap:
        forward(own, batch)
        config = ck.CarmaConfig(stability_weight=0)
        window.carma_loss(tap, batch["spans"], config).loss.backward()
    assert all(not gradient.any() for gradient in gradients(own).values())
