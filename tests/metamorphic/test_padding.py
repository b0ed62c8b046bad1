"""How a batch is padded changes neither the losses nor the gradients of its tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given

import carma_kernels as ck
from tests.cases import Backend
from tests.metamorphic.batches import LOSSES, Layout, assert_same, lay_out, layouts, run, seeds, sequences, tokens_of


@pytest.mark.parametrize("name", LOSSES)
@given(rows=sequences(), one=layouts, other=layouts, seed=seeds)
@example(rows=["aabb.", "", "cc"], one=Layout(0), other=Layout(3, "left", float("nan")), seed=0)
@example(rows=["aa."], one=Layout(8, "both", float("inf")), other=Layout(0, "left"), seed=0)
def test_width_side_and_content(
    backend: Backend, name: str, rows: list[str], one: Layout, other: Layout, seed: int
) -> None:
    tokens = tokens_of(rows, seed)
    results = []
    for layout in (one, other):
        batch = lay_out(rows, tokens, layout, backend)
        loss, gradient = run(name, batch, backend)
        assert (gradient[:, ~batch.mask] == 0).all()
        results.append((loss, batch.tokens(gradient)))
    (loss, gradients), (expected_loss, expected_gradients) = results
    assert_same(loss, expected_loss)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        assert_same(actual, expected)


Call = Callable[..., ck.CarmaOutput]


def by_module(hidden: torch.Tensor, spans: ck.TokenSpans, *, backend: str, **options: object) -> ck.CarmaOutput:
    return ck.CarmaLoss(backend=backend)(hidden, spans, **options)


@pytest.mark.parametrize("call", [ck.carma_loss, by_module])
def test_one_batch_padded_in_three_ways(backend: Backend, call: Call) -> None:
    """By default nothing depends on the padding; `mask="all"` is the published mean, which does."""
    rows = ["aabb.", "cc", ".ddd"]
    tokens = tokens_of(rows, seed=0)
    ways = [Layout(0), Layout(4, fill=-1.5), Layout(2, "left", fill=3.0)]
    batches = [lay_out(rows, tokens, way, backend) for way in ways]
    default, published = (
        [call(batch.hidden, batch.spans, backend=backend.name, **options).loss for batch in batches]
        for options in ({}, {"mask": "all"})
    )
    assert_same(default[1], default[0])
    assert_same(default[2], default[0])
    assert len({round(loss.item(), 3) for loss in published}) == len(ways)
    for batch, loss in zip(batches, published, strict=True):
        everywhere = torch.ones_like(batch.mask)
        assert torch.equal(call(batch.hidden, batch.spans, mask=everywhere, backend=backend.name).loss, loss)


def test_sampled_pairs_know_the_valid_tokens(backend: Backend) -> None:
    rows = ["aabb.", "cc", ".ddd"]
    batch = lay_out(rows, tokens_of(rows, seed=0), Layout(3, fill=float("nan")), backend)
    pairs = batch.spans.sample_pairs(3)
    by_default, given_mask = (
        ck.carma_loss(batch.hidden, pairs, backend=backend.name, **options).loss
        for options in ({}, {"mask": batch.mask})
    )
    assert by_default.isfinite()
    assert torch.equal(by_default, given_mask)
