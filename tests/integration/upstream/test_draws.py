"""Python's generator lent to numpy: the same numbers, bit for bit, and the same state afterwards."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from carma_kernels.integrations.upstream.draws import draw_uniform
from carma_kernels.integrations.upstream.pairs import pair_terms
from tests.integration.upstream.published import as_spans, draw


@pytest.mark.parametrize("before", [0, 1, 311, 312, 313, 1000])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3, 5), (312,), (7, 211)])
def test_same_numbers_and_state(shape: tuple[int, ...], before: int):
    """The twister makes 312 doubles from one filling of its 624 words."""
    random.seed(7)
    for _ in range(before):
        random.random()
    random.gauss()  # keeps a second normal number for later, a part of the state
    start = random.getstate()
    one_by_one = [random.random() for _ in range(math.prod(shape))]
    end = random.getstate()

    random.setstate(start)
    drawn = draw_uniform(shape)
    assert drawn.shape == shape
    assert drawn.ravel().tolist() == one_by_one
    assert random.getstate() == end


def test_half_a_number_drawn():
    """32 bits take one word of the twister, a double two."""
    random.seed(3)
    random.getrandbits(32)
    start = random.getstate()
    one_by_one = [random.random() for _ in range(1000)]
    end = random.getstate()
    random.setstate(start)
    assert draw_uniform((1000,)).tolist() == one_by_one
    assert random.getstate() == end


def test_own_generator_leaves_the_global_one_alone():
    random.seed(0)
    before = random.getstate()
    drawn = draw_uniform((4,), random.Random(5))
    assert random.getstate() == before
    rng = random.Random(5)
    assert drawn.tolist() == [rng.random() for _ in range(4)]


def test_positions_as_drawn_one_by_one():
    """Layer by layer, then sequence, word, pair; ascending for each pair."""
    T, words = 20, [[(0, 2), (5, 8), (19, 20)], [(-6, -3), (18, 20), (3, 4)]]
    terms = pair_terms(as_spans(words), (2, T), per_sample=False, include_last_span=False, padding_negatives=True)
    random.seed(11)
    expected = [
        [
            draw(start, end, T, 5)
            for _ in range(2)
            for sample in words
            for start, end in sample[:-1]
            for _ in range((end - start) * (end - start - 1) // 2)
        ]
        for _ in range(3)
    ]
    random.seed(11)
    negatives = terms.draw(draw_uniform((3, len(terms.sequence), 5)))
    assert np.array_equal(negatives, expected)
