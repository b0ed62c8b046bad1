"""Each switch undoes its peculiarity, and nothing else."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels.integrations.upstream import MILoss, StabilityLoss
from tests.integration.upstream.published import as_cache, as_spans, draw
from tests.integration.upstream.test_quirks import mi, states

FP64 = torch.float64
WORDS = [[(0, 3), (4, 6), (8, 9)], [(2, 4), (5, 7)]]
OWN = [[(0, 3), (4, 6)], [(2, 4)]]  # of them, those that count as published


def sampled(layers: list[Tensor], words: list[list[tuple[int, int]]], limits: list[int], fresh: bool = True) -> Tensor:
    """This package's loss with each sample's own pairs, and negatives drawn singly from the first `limit` tokens."""
    T = layers[0].shape[1]
    pairs = [
        (b * T + i, b * T + j, b, word)
        for b, sample in enumerate(words)
        for word in sample
        for i, j in combinations(range(*word), 2)
    ]
    negatives = []
    for _ in layers if fresh else layers[:1]:
        negatives.append([[b * T + t for t in draw(*word, limits[b], 5)] for _, _, b, word in pairs])
    index = ck.PairIndex(
        anchor=torch.tensor([anchor for anchor, *_ in pairs]),
        positive=torch.tensor([positive for _, positive, *_ in pairs]),
        negatives=torch.tensor(negatives if fresh else negatives * len(layers)),
        shape=(len(words), T),
    )
    return ck.mi_loss(layers, index)


def test_per_sample():
    layers = states()
    random.seed(0)
    expected = sampled(layers, OWN, [12, 12])
    end_state = random.getstate()
    torch.testing.assert_close(mi(layers, WORDS, MILoss(per_sample=True)), expected)
    assert random.getstate() == end_state


def test_include_last_span():
    layers = states()
    random.seed(0)
    expected = sampled(layers, WORDS, [12, 12])
    torch.testing.assert_close(mi(layers, WORDS, MILoss(per_sample=True, include_last_span=True)), expected)


def test_no_padding_among_the_negatives():
    """The sequences end with their last spans, after 9 and 7 tokens; the third's has none, and no negative either."""
    layers = states()
    random.seed(0)
    expected = sampled(layers, OWN, [9, 7])
    torch.testing.assert_close(mi(layers, WORDS, MILoss(per_sample=True, padding_negatives=False)), expected)


def test_no_padding_among_the_negatives_of_other_samples_words():
    """A word may reach beyond another sequence's end: what there is before it is drawn, and nothing costs 0."""
    layers = states(L=1)
    words = [[(6, 9), (11, 12)], [(0, 7)]]  # the first sequence has 12 tokens, the second 7
    loss = mi(layers, words, MILoss(padding_negatives=False, n_negatives=200))
    [gradient] = torch.autograd.grad(loss, layers)
    assert (gradient[1].abs().amax(-1) > 0).tolist() == [True] * 9 + [False] * 3
    alone = mi(layers, [[(0, 7), (7, 8)], []], MILoss(padding_negatives=False))
    assert alone.isfinite()
    assert torch.autograd.grad(alone, layers)[0][1].abs().max() == 0


def test_one_draw_for_all_layers():
    layers = states(L=3)
    random.seed(0)
    expected = sampled(layers, OWN, [12, 12], fresh=False)
    end_state = random.getstate()
    torch.testing.assert_close(mi(layers, WORDS, MILoss(per_sample=True, fresh_negatives=False)), expected)
    assert random.getstate() == end_state


def test_own_generator():
    layers = states()
    random.seed(1)
    expected, before = mi(layers, WORDS, seed=5), random.getstate()
    rng = random.Random(5)
    random.setstate(before)
    assert MILoss(rng=rng).calculate_mi_loss(as_cache(layers), as_spans(WORDS)) == expected
    assert random.getstate() == before
    reference = random.Random(5)
    [reference.random() for _ in range(2 * 2 * 5 * 5)]  # layers, sequences, pairs, negatives
    assert rng.getstate() == reference.getstate()


@pytest.mark.parametrize("size", [1.0, 1e3])
def test_stable_mi(size: float):
    """Where the published loss is finite the same, and elsewhere what it would be in exact arithmetic."""
    layers = [(size * h.detach()).requires_grad_() for h in states()]
    loss = MILoss(similarity_metric="dot_product", stable=True, per_sample=True)
    value = mi(layers, WORDS, loss)
    random.seed(0)
    index_loss = sampled_dot(layers)
    torch.testing.assert_close(value, index_loss)
    for got, expected in zip(torch.autograd.grad(value, layers), torch.autograd.grad(index_loss, layers), strict=True):
        torch.testing.assert_close(got, expected)
    assert mi(layers, WORDS, MILoss(similarity_metric="dot_product", per_sample=True)).isfinite() == (size == 1.0)


def sampled_dot(layers: list[Tensor]) -> Tensor:
    T = layers[0].shape[1]
    pairs = [(b, i, j, w) for b, sample in enumerate(OWN) for w in sample for i, j in combinations(range(*w), 2)]
    negatives = [[[b * T + t for t in draw(*word, T, 5)] for b, _, _, word in pairs] for _ in layers]
    index = ck.PairIndex(
        torch.tensor([b * T + i for b, i, _, _ in pairs]),
        torch.tensor([b * T + j for b, _, j, _ in pairs]),
        torch.tensor(negatives),
        (len(OWN), T),
    )
    return ck.mi_loss(layers, index, metric="dot")


def test_stable_in_halves():
    """fp32 throughout: no overflow, and zero vectors have a cosine."""
    layers = [torch.full((1, 4, 2), size, dtype=torch.float16, requires_grad=True) for size in (300.0, 1.0)]
    loss = mi(layers, [[(0, 2), (2, 3)]], MILoss(stable=True))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(6))
    change = StabilityLoss(end_layer=None, stable=True).calculate_loss(as_cache(layers))
    assert change.dtype == torch.float32
    assert change.item() == pytest.approx(299**2 / (300**2 + 1))
    zero = torch.zeros(1, 4, 2, dtype=torch.float16)
    assert mi([zero], [[(0, 2), (2, 3)]], MILoss(stable=True)).item() == pytest.approx(math.log(6))
    assert mi([zero], [[(0, 2), (2, 3)]]).isnan()


def test_stability_with_a_mask():
    layers = states(L=3)
    mask = torch.tensor([[1] * 7 + [0] * 5, [1] * 12])
    value = StabilityLoss(end_layer=None).calculate_loss(as_cache(layers), mask=mask)
    torch.testing.assert_close(value, ck.stability_loss(layers, mask=mask))
    assert value != StabilityLoss(end_layer=None).calculate_loss(as_cache(layers))


@pytest.mark.parametrize(
    "words",
    [[[(0, 2), (1, 3)], []], [[(0, 2), (0, 2)], []], [[(3, 3)], []], [[(-3, -1)], []], [[(5, 7), (0, 2)], []]],
    ids=["overlapping", "repeated", "empty", "from the end", "out of order"],
)
def test_strict_about_words(words: list[list[tuple[int, int]]]):
    mi(states(), words)
    with pytest.raises(ValueError, match=r"token_spans\[0\] must hold words in order"):
        mi(states(), words, MILoss(strict=True))


def test_strict_about_samples():
    mi(states(), WORDS[:1])
    for switch in ({"strict": True}, {"per_sample": True}, {"padding_negatives": False}):
        with pytest.raises(ValueError, match="got 1 for a batch of 2"):
            mi(states(), WORDS[:1], MILoss(**switch))


def test_strict_takes_what_is_in_order():
    assert mi(states(), WORDS, MILoss(strict=True)) == mi(states(), WORDS)


def test_strict_stability():
    layers = states(L=3)
    nothing = StabilityLoss(1, 1, strict=True).calculate_loss(as_cache(layers))
    assert nothing.item() == 0.0
    assert torch.autograd.grad(nothing, layers[1])[0].abs().max() == 0
    with pytest.raises(ValueError, match="Wrapped models"):
        StabilityLoss(end_layer=None, strict=True).calculate_loss({})
    with pytest.raises(IndexError, match="start_layer=2, end_layer=1"):
        StabilityLoss(2, 1, strict=True).calculate_loss(as_cache(layers))
    last = StabilityLoss(end_layer=None, strict=True)
    last.calculate_loss(as_cache(layers[:2]))
    assert last.calculate_loss(as_cache(layers)) == StabilityLoss(0, 2).calculate_loss(as_cache(layers))
