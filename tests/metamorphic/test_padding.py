"""How a batch is padded changes neither the losses nor the gradients of its tokens."""

from __future__ import annotations

import pytest
from hypothesis import example, given

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
