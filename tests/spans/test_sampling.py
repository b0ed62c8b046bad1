"""Sampled pairs: each pair once; negatives uniform over the valid tokens outside the word, the same for a seed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from carma_kernels import TokenSpans
from tests.spans.batches import EXAMPLE, EXAMPLE_WORDS, Batch, batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def candidates(batch: Batch) -> list[tuple[int, int, set[int]]]:
    """Anchor, positive and the tokens its negatives may be, for each pair in order."""
    T = batch.shape[1]
    found = []
    for b, words in enumerate(batch.words):
        for start, end in words:
            outside = {b * T + t for t, is_valid in enumerate(batch.valid[b]) if is_valid and not start <= t < end}
            found += [
                (b * T + i, b * T + j, outside) for i in range(start, end) for j in range(i + 1, end)
            ]  # fmt: skip
    return found


@settings(max_examples=60)
@given(batches(), st.integers(1, 6), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_any_batch(batch: Batch, k: int, num_layers: int | None, seed: int):
    pairs = batch.spans.sample_pairs(k, generator(seed), num_layers)
    expected = candidates(batch)
    assert pairs.shape == batch.shape
    assert pairs.attention_mask is not None
    assert torch.equal(pairs.attention_mask, batch.mask)
    assert pairs.num_pairs == batch.spans.num_pairs == len(expected)
    assert pairs.negatives.shape == (() if num_layers is None else (num_layers,)) + (len(expected), k)
    assert {pairs.anchor.dtype, pairs.positive.dtype, pairs.negatives.dtype} == {torch.int32}
    assert pairs.anchor.tolist() == [anchor for anchor, _, _ in expected]
    assert pairs.positive.tolist() == [positive for _, positive, _ in expected]
    for layer in pairs.negatives.reshape(num_layers or 1, len(expected), k).tolist():
        for drawn, (_, _, outside) in zip(layer, expected, strict=True):
            assert set(drawn) <= outside if outside else drawn == [-1] * k


def test_every_candidate_is_equally_likely():
    """Chi-square of 40 000 draws for each pair; with this seed it is the same number on every run."""
    draws = 40_000
    pairs = EXAMPLE.spans.sample_pairs(draws, generator())
    for drawn, (_, _, outside) in zip(pairs.negatives, candidates(EXAMPLE), strict=True):
        counts = torch.bincount(drawn, minlength=EXAMPLE.mask.numel())
        assert set(counts.nonzero().flatten().tolist()) == outside
        expected = draws / len(outside)
        chi_square = sum((counts[token].item() - expected) ** 2 / expected for token in outside)
        degrees = len(outside) - 1
        assert chi_square < degrees + 4 * math.sqrt(2 * max(degrees, 1))  # four sigma above its mean


def test_the_generators_state_decides():
    spans = EXAMPLE.spans
    first, second = spans.sample_pairs(20, generator(1)), spans.sample_pairs(20, generator(1))
    assert torch.equal(first.negatives, second.negatives)
    assert not torch.equal(first.negatives, spans.sample_pairs(20, generator(2)).negatives)
    one = generator(1)
    assert torch.equal(first.negatives, spans.sample_pairs(20, one).negatives)
    assert not torch.equal(first.negatives, spans.sample_pairs(20, one).negatives)  # it has moved on


def test_without_a_generator_torchs_own_decides():
    spans = EXAMPLE.spans
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = spans.sample_pairs(20)
        torch.manual_seed(5)
        second = spans.sample_pairs(20)
        third = spans.sample_pairs(20)
    assert torch.equal(first.negatives, second.negatives)
    assert not torch.equal(first.negatives, third.negatives)


def test_torchs_own_generator_is_not_touched_by_another():
    before = torch.get_rng_state()
    EXAMPLE.spans.sample_pairs(5, generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_every_layer_and_every_pair_has_its_own_draws():
    spans = TokenSpans.from_lists([[(0, 2), (2, 4)]], seq_len=40)
    negatives = spans.sample_pairs(30, generator(), num_layers=3).negatives  # [3, 2, 30]
    rows = {tuple(row) for row in negatives.reshape(-1, 30).tolist()}
    assert len(rows) == 6


def test_the_default_is_five_for_all_layers():
    assert EXAMPLE.spans.sample_pairs().negatives.shape == (8, 5)


@pytest.mark.parametrize("num_layers", [None, 2])
def test_no_pairs(num_layers: int | None):
    pairs = TokenSpans.from_lists([[(0, 1)], []], seq_len=3).sample_pairs(4, num_layers=num_layers)
    assert pairs.num_pairs == 0
    assert pairs.negatives.shape == (() if num_layers is None else (num_layers,)) + (0, 4)


def test_a_word_that_covers_its_sequence_has_nothing_to_draw():
    spans = TokenSpans.from_lists([[(1, 3)], [(0, 2)]], seq_len=3, attention_mask=[[0, 1, 1], [1, 1, 1]])
    assert spans.sample_pairs(3, generator()).negatives.tolist() == [[-1, -1, -1], [5, 5, 5]]


def test_nor_has_the_last_word_of_the_batch():
    """There is no token after it, whose number a rank beyond the last could be taken for."""
    spans = TokenSpans.from_lists([[(0, 2)], [(0, 3)]], seq_len=3)
    anchors, negatives = spans.sample_pairs(2, generator()).anchor, spans.sample_pairs(2, generator()).negatives
    assert anchors.tolist() == [0, 3, 3, 4]
    assert negatives.tolist() == [[2, 2], [-1, -1], [-1, -1], [-1, -1]]


def test_the_spans_are_left_alone():
    spans = EXAMPLE.spans
    word = spans.word.clone()
    spans.sample_pairs(5, generator())
    assert torch.equal(spans.word, word)
    assert spans.to_lists() == EXAMPLE_WORDS
