"""One run: what an evaluation measures must not depend on how the definitions were batched."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from carma_kernels import CarmaConfig, mi_loss, stability_loss
from carma_kernels.demo.definitions import read_definitions, shipped_file
from carma_kernels.demo.model import build_gpt2, word_logits
from carma_kernels.demo.text import Batch, Collator, train_tokenizer
from carma_kernels.demo.training import Evaluation, Recipe, Run
from carma_kernels.integrations.transformers import HiddenStateTap

RECIPE = Recipe(steps=1, learning_rate=0.01, carma=CarmaConfig(), backend=None, device=torch.device("cpu"))
DEFINITIONS = read_definitions(shipped_file())[:40]
COLLATE = Collator(train_tokenizer(DEFINITIONS, 400))


def evaluate(batches: list[Batch]) -> Evaluation:
    model = build_gpt2(vocab_size=400, layers=3, width=16, heads=2, seed=0)
    run = Run("run", model, RECIPE, with_carma=False)
    run.evaluate(batches)
    return run.record.last


@pytest.fixture(scope="module")
def whole() -> Batch:
    return COLLATE(DEFINITIONS)


def test_evaluation_is_that_of_the_losses(whole: Batch) -> None:
    model = build_gpt2(vocab_size=400, layers=3, width=16, heads=2, seed=0)
    with torch.no_grad(), HiddenStateTap(model, no_grad=True) as tap:
        logits = word_logits(model, whole)
        states = tap.hidden_states
    measured = evaluate([whole])
    assert measured.task_loss == pytest.approx(torch.nn.functional.cross_entropy(logits, whole.labels).item())
    assert measured.mi == pytest.approx(mi_loss(states, whole.spans).item())
    assert measured.mi_per_layer == pytest.approx(mi_loss(states, whole.spans, reduction="none").tolist())
    assert measured.stability == pytest.approx(stability_loss(states, mask=whole.attention_mask).item())
    ranks = (logits > logits.gather(1, whole.labels[:, None])).sum(dim=1)
    assert measured.accuracy == pytest.approx([(ranks < k).float().mean().item() for k in (1, 10)])


def test_batches_of_unequal_size_weigh_as_much_as_they_hold(whole: Batch) -> None:
    together = evaluate([whole])
    apart = evaluate([COLLATE(DEFINITIONS[:3]), COLLATE(DEFINITIONS[3:])])
    assert apart.task_loss == pytest.approx(together.task_loss)
    assert apart.accuracy == pytest.approx(together.accuracy)
    assert apart.mi_per_layer == pytest.approx(together.mi_per_layer)
    # a ratio of means is no mean of ratios, but nearly so
    assert apart.stability_per_layer == pytest.approx(together.stability_per_layer, rel=0.02)


def test_steps_leave_no_hidden_states_behind(whole: Batch) -> None:
    for with_carma in (False, True):
        run = Run("run", build_gpt2(vocab_size=400, layers=3, width=16, heads=2, seed=0), RECIPE, with_carma=with_carma)
        run.train_on(whole)
        run.evaluate([whole])
        assert run.carma_seconds(whole) > 0
        with pytest.raises(RuntimeError, match="no forward has run since the tap was set or cleared"):
            _ = run._tap.hidden_states


def test_batch_moves_as_a_whole(whole: Batch) -> None:
    moved = whole.to(torch.device("cpu"))
    assert [field.name for field in dataclasses.fields(moved)] == ["input_ids", "attention_mask", "labels", "spans"]
    assert moved.spans is whole.spans
