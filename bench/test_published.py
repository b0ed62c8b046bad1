"""The restated baseline computes what the published code computes, with the same draws."""

from __future__ import annotations

import random

import pytest
import torch

from bench import check, published, vectorised
from bench.workloads import TINY

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("tiny", TINY, ids=str)
@pytest.mark.parametrize("carma_loss", [published.carma_loss, vectorised.sampled_carma_loss])
def test_values_gradients_and_draws(tiny, carma_loss):
    case = tiny.build(dtype=torch.float64)

    random.seed(0)
    result = check.run(lambda h: carma_loss(h, case.spans), case.hidden_states, backward=True)
    next_draw = random.random()

    random.seed(0)
    expected = check.run(check.oracle(case, "published"), case.hidden_states, backward=True)
    assert next_draw == random.random()
    check.assert_close(result, expected, tolerance=1e-12)


def test_stability_by_hand():
    """Two layers of one number each: (3 - 1)^2 / (1 + 9)."""
    hidden_states = [torch.full((1, 1, 1), value, dtype=torch.float64) for value in (1.0, 3.0)]
    expected = torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(published.stability_loss(hidden_states), expected, atol=0, rtol=1e-7)
    torch.testing.assert_close(vectorised.stability_loss(hidden_states), expected, atol=0, rtol=1e-7)


def test_mi_by_hand():
    """One word of two tokens of one direction, every other token orthogonal to it: -log(e / (e + 5)) at tau = 1."""
    h = torch.zeros(1, 6, 2, dtype=torch.float64)
    h[0, :2, 0] = 2.0
    h[0, 2:, 1] = 3.0
    spans = [[(0, 2), (2, 3), (3, 4), (4, 6)]]  # the last word is left out
    expected = -torch.tensor(torch.e / (torch.e + 5), dtype=torch.float64).log()
    for mi_loss in (published.mi_loss, vectorised.sampled_mi_loss):
        torch.testing.assert_close(mi_loss([h, h], spans, temperature=1.0), expected)
