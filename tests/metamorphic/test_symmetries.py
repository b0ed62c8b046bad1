"""Changes of the input after which the losses are known from the losses before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import carma_kernels as ck
from tests.cases import FP64, Backend, thinned
from tests.contracts.ops import same_bits
from tests.metamorphic.batches import (
    LOSSES,
    D,
    L,
    Layout,
    assert_same,
    lay_out,
    layouts,
    run,
    seeds,
    sequences,
    tokens_of,
)


@pytest.mark.parametrize("name", LOSSES)
@given(data=st.data(), rows=sequences(), layout=layouts, seed=seeds)
def test_permuting_the_sequences(
    backend: Backend, name: str, data: st.DataObject, rows: list[str], layout: Layout, seed: int
) -> None:
    """The loss stays, the gradients go along."""
    order = data.draw(st.permutations(range(len(rows))))
    tokens = tokens_of(rows, seed)
    loss, gradient = run(name, lay_out(rows, tokens, layout, backend), backend)
    shuffled = lay_out([rows[b] for b in order], [tokens[b] for b in order], layout, backend)
    shuffled_loss, shuffled_gradient = run(name, shuffled, backend)
    assert_same(shuffled_loss, loss)
    assert_same(shuffled_gradient, gradient[:, order])


@pytest.mark.parametrize("name", ["sequence", "batch"])
@given(rows=sequences(), layout=layouts, seed=seeds)
def test_lengths_of_vectors(backend: Backend, name: str, rows: list[str], layout: Layout, seed: int) -> None:
    """A cosine does not see them; a vector c times as long has a gradient 1/c times as long."""
    batch = lay_out(rows, tokens_of(rows, seed), layout, backend)
    generator = torch.Generator().manual_seed(seed)
    c = torch.rand(*batch.hidden.shape[:3], 1, generator=generator, dtype=FP64).mul(4).sub(2).exp().to(batch.hidden)
    loss, gradient = run(name, batch, backend)
    scaled_loss, scaled_gradient = run(name, replace(batch, hidden=batch.hidden * c), backend)
    assert_same(scaled_loss, loss)
    assert_same(scaled_gradient * c, gradient)


@pytest.mark.parametrize("name", LOSSES)
@given(rows=sequences(), seed=seeds)
def test_rotation(backend: Backend, name: str, rows: list[str], seed: int) -> None:
    """No loss knows the axes: the loss stays, the gradients turn along."""
    batch = lay_out(rows, tokens_of(rows, seed), Layout(2), backend)
    square = torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=FP64)
    rotation = torch.linalg.qr(square).Q.to(batch.hidden)
    loss, gradient = run(name, batch, backend)
    turned_loss, turned_gradient = run(name, replace(batch, hidden=batch.hidden @ rotation), backend)
    assert_same(turned_loss, loss)
    assert_same(turned_gradient, gradient @ rotation)


@pytest.mark.parametrize("name", ["sequence", "dot"])
@given(data=st.data(), rows=sequences(min_size=2), layout=layouts, seed=seeds)
def test_parts_of_a_batch(
    backend: Backend, name: str, data: st.DataObject, rows: list[str], layout: Layout, seed: int
) -> None:
    """With the pairs of the whole as divisor, parts add up to it, however uneven: gradient accumulation is exact."""
    cut = data.draw(st.integers(1, len(rows) - 1))
    tokens = tokens_of(rows, seed)
    whole = lay_out(rows, tokens, Layout(), backend)
    loss, gradient = run(name, whole, backend)
    parts = [lay_out(rows[some], tokens[some], layout, backend) for some in (slice(cut), slice(cut, None))]
    results = [run(name, part, backend, num_pairs=whole.spans.num_pairs) for part in parts]
    assert_same(results[0][0] + results[1][0], loss)
    tokens_then = [token for part, (_, g) in zip(parts, results, strict=True) for token in part.tokens(g)]
    for actual, expected in zip(tokens_then, whole.tokens(gradient), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "carma"])
@given(data=st.data(), rows=sequences(), seed=seeds)
def test_a_range_of_layers_is_a_slice(
    backend: Backend, name: str, data: st.DataObject, rows: list[str], seed: int
) -> None:
    """To the last bit."""
    start = data.draw(st.integers(0, L - 1))
    end = data.draw(st.integers(start, L - 1))
    batch = lay_out(rows, tokens_of(rows, seed), Layout(1), backend)
    loss, gradient = run(name, batch, backend, layers=(start, end))
    part_loss, part_gradient = run(name, replace(batch, hidden=batch.hidden[start : end + 1]), backend)
    assert same_bits(loss, part_loss)
    assert same_bits(gradient[start : end + 1], part_gradient)
    assert (gradient[:start] == 0).all()
    assert (gradient[end + 1 :] == 0).all()


@pytest.mark.parametrize("negatives", thinned(["sequence"], ["batch"]))
@given(rows=sequences(), layout=layouts, seed=seeds)
@example(rows=["aab.", "ccc"], layout=Layout(), seed=0)
def test_all_negatives_listed(backend: Backend, negatives: str, rows: list[str], layout: Layout, seed: int) -> None:
    """Two ways to say one loss: words, and pairs with every negative written out."""
    batch = lay_out(rows, tokens_of(rows, seed), layout, backend)
    assume(batch.spans.num_pairs)
    drawn = batch.spans.sample_pairs(k=1)
    T = batch.spans.shape[1]
    word = batch.spans.word.flatten()  # [B*T]
    sequence = torch.arange(len(word), device=word.device) // max(T, 1)
    anchor = drawn.anchor.long()
    is_negative = (word[anchor, None] != word) & (word >= 0)  # [P, B*T]
    if negatives == "sequence":
        is_negative &= sequence[anchor, None] == sequence
    listed = torch.where(is_negative, torch.arange(len(word), device=word.device), -1)
    loss, gradient = run(negatives, batch, backend)
    hidden = batch.hidden.clone().requires_grad_()
    pairs = ck.PairIndex(drawn.anchor, drawn.positive, listed, drawn.shape)
    same = ck.mi_loss(hidden, pairs, temperature=0.3, reduction="none", backend=backend.name)
    assert_same(same.detach(), loss)
    assert_same(torch.autograd.grad(same.sum(), hidden)[0], gradient)
