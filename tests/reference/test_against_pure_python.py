"""csrc_ref against Python floats, to 1e-12: every kind of negatives, metric, mask and reduction."""

from __future__ import annotations

import math

import pytest
import torch

import csrc_ref
from csrc_ref import CarmaConfig

from . import by_hand
from .cases import Case, random_case, random_pairs

EXACT = {"rel": 1e-12, "abs": 1e-12}


def costs_by_layer(
    case: Case, negatives: str, metric: str, temperature: float, k: float | None = None
) -> list[list[float]]:
    pairs = list(by_hand.pairs_of_words(case.words, case.valid.tolist(), negatives))
    return [
        [by_hand.pair_cost(h, i, j, others, metric, temperature, k) for i, j, others in pairs]
        for h in case.hidden.tolist()
    ]


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize(("metric", "temperature"), [("cosine", 0.1), ("cosine", 0.01), ("dot", 2.0)])
@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_mi_of_words(negatives: str, metric: str, temperature: float, pad: str, k: float | None) -> None:
    for seed in range(3):
        case = random_case(seed, pad=pad)
        costs = costs_by_layer(case, negatives, metric, temperature, k)
        means = [math.fsum(layer) / len(layer) for layer in costs]
        options = {"negatives": negatives, "metric": metric, "temperature": temperature, "match_negatives": k}
        assert len(costs[0]) == case.spans.num_pairs

        def mi(case: Case = case, options: dict[str, object] = options, **more: object) -> torch.Tensor:
            return csrc_ref.mi_loss(case.hidden, case.spans, **options, **more)  # type: ignore[arg-type]

        assert mi().item() == pytest.approx(sum(means) / len(means), **EXACT)
        assert mi(reduction="none").tolist() == pytest.approx(means, **EXACT)
        assert mi(reduction="sum").item() == pytest.approx(sum(map(math.fsum, costs)), **EXACT)
        assert mi(layers=(1, 1)).item() == pytest.approx(means[1], **EXACT)
        for count in (100, torch.tensor(100)):
            per_layer = [math.fsum(layer) / 100 for layer in costs]
            assert mi(num_pairs=count).item() == pytest.approx(sum(per_layer) / len(per_layer), **EXACT)
            assert mi(num_pairs=count, reduction="none").tolist() == pytest.approx(per_layer, **EXACT)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("metric", "temperature"), [("cosine", 0.1), ("dot", 2.0)])
def test_mi_of_listed_pairs(metric: str, temperature: float, per_layer: bool) -> None:
    case = random_case(3, L=3)
    T = case.valid.shape[1]
    pairs = random_pairs(case, 0, num_layers=2 if per_layer else None)
    slots = pairs.negatives.tolist() if per_layer else [pairs.negatives.tolist()] * 2
    means = []
    for h, drawn in zip(
        case.hidden[1:].tolist(), slots, strict=True
    ):  # the first of [L, P, K] is the loss's first layer
        costs = [
            by_hand.pair_cost(
                h, divmod(i, T), divmod(j, T), [divmod(n, T) for n in others if n != -1], metric, temperature, None
            )
            for i, j, others in zip(pairs.anchor.tolist(), pairs.positive.tolist(), drawn, strict=True)
        ]
        assert costs[0] == 0  # all its slots are -1
        means.append(math.fsum(costs) / len(costs))
    loss = csrc_ref.mi_loss(case.hidden, pairs, layers=(1, 2), metric=metric, temperature=temperature, reduction="none")
    assert loss.tolist() == pytest.approx(means, **EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_stability(masked: bool) -> None:
    case = random_case(4, L=4, poison=masked)
    mask = case.valid if masked else None
    for eps in (1e-8, 0.5):
        terms = by_hand.stability_terms(case.hidden.tolist(), mask.tolist() if mask is not None else None, eps)
        for some in (mask, mask.long() if mask is not None else None):
            loss = csrc_ref.stability_loss(case.hidden, mask=some, eps=eps, reduction="none")
            assert loss.tolist() == pytest.approx(terms, **EXACT)
        assert csrc_ref.stability_loss(case.hidden, mask=mask, eps=eps).item() == pytest.approx(sum(terms), **EXACT)
        mean = csrc_ref.stability_loss(case.hidden, mask=mask, eps=eps, reduction="mean")
        assert mean.item() == pytest.approx(sum(terms) / 3, **EXACT)
        inner = csrc_ref.stability_loss(case.hidden, mask=mask, eps=eps, layers=(1, 2))
        assert inner.item() == pytest.approx(terms[1], **EXACT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("metric", "temperature"), [("cosine", 0.3), ("dot", 2.0)])
def test_pairwise_similarity(metric: str, temperature: float, masked: bool) -> None:
    case = random_case(5, poison=masked)
    options = {"metric": metric, "temperature": temperature, "mask": case.valid if masked else None}
    s = csrc_ref.pairwise_similarity(case.hidden, out_dtype=torch.float64, **options)  # type: ignore[arg-type]
    L, B, T, _ = case.hidden.shape
    assert s.shape == (L, B, T, T)
    for layer in range(L):
        for b in range(B):
            for i in range(T):
                for j in range(T):
                    x, y = case.hidden[layer, b, i].tolist(), case.hidden[layer, b, j].tolist()
                    shown = not masked or (case.valid[b, i] and case.valid[b, j])
                    expected = by_hand.similarity(x, y, metric, temperature) if shown else 0.0
                    assert s[layer, b, i, j].item() == pytest.approx(expected, **EXACT)
    one_layer = csrc_ref.pairwise_similarity(case.hidden, layers=(1, 1), out_dtype=torch.float64, **options)  # type: ignore[arg-type]
    assert torch.equal(one_layer, s[1:])


def test_carma_is_the_weighted_sum() -> None:
    case = random_case(6, L=4)
    config = CarmaConfig(
        mi_weight=0.7,
        stability_weight=0.4,
        temperature=0.3,
        metric="dot",
        negatives="batch",
        match_negatives=2,
        mi_layers=(1, 2),
        stability_layers=(0, 2),
        eps=1e-3,
    )
    out = csrc_ref.carma_loss(case.hidden, case.spans, config, mask=case.valid, num_pairs=50)
    mi = [math.fsum(layer) / 50 for layer in costs_by_layer(case, "batch", "dot", 0.3, 2)[1:3]]
    terms = by_hand.stability_terms(case.hidden.tolist(), case.valid.tolist(), 1e-3)[:2]
    assert out.mi_per_layer.tolist() == pytest.approx(mi, **EXACT)
    assert out.stability_per_layer.tolist() == pytest.approx(terms, **EXACT)
    assert out.mi.item() == pytest.approx(sum(mi) / 2, **EXACT)
    assert out.stability.item() == pytest.approx(sum(terms), **EXACT)
    assert out.loss.item() == pytest.approx(0.7 * sum(mi) / 2 + 0.4 * sum(terms), **EXACT)
    assert out.num_pairs == case.spans.num_pairs


def test_carma_defaults_are_the_losses_defaults() -> None:
    case = random_case(7, B=1)  # nothing is padded
    out = csrc_ref.carma_loss(case.hidden, case.spans)
    assert torch.equal(out.mi, csrc_ref.mi_loss(case.hidden, case.spans))
    assert torch.equal(out.stability, csrc_ref.stability_loss(case.hidden))
    assert torch.equal(out.loss, 0.5 * out.mi + 0.2 * out.stability)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_is_computed_in_fp32(dtype: torch.dtype) -> None:
    case = random_case(8)
    hidden = case.hidden.to(dtype).requires_grad_()
    computed = torch.promote_types(dtype, torch.float32)
    exact = csrc_ref.carma_loss(hidden.detach().double(), case.spans, mask=case.valid)
    tau = torch.tensor(0.1, dtype=torch.float64)  # must not raise the loss's dtype
    out = csrc_ref.carma_loss(hidden, case.spans, CarmaConfig(temperature=tau), mask=case.valid)
    assert {out.loss.dtype, out.mi.dtype, out.stability.dtype, out.mi_per_layer.dtype} == {computed}
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=2e-6 if dtype != torch.float64 else 1e-12)
    out.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    assert csrc_ref.pairwise_similarity(hidden, mask=case.valid).dtype == computed
    assert csrc_ref.pairwise_similarity(hidden, mask=case.valid, out_dtype=torch.float16).dtype == torch.float16


def test_autocast_changes_nothing() -> None:
    case = random_case(9)
    hidden = case.hidden.float()
    outside = csrc_ref.carma_loss(hidden, case.spans, mask=case.valid).loss
    with torch.autocast("cpu", torch.bfloat16):
        inside = csrc_ref.carma_loss(hidden, case.spans, mask=case.valid).loss
    assert torch.equal(outside, inside)


def test_list_of_layers_is_the_stack() -> None:
    case = random_case(10)
    stacked = csrc_ref.carma_loss(case.hidden, case.spans, mask=case.valid)
    listed = csrc_ref.carma_loss(list(case.hidden), case.spans, mask=case.valid)
    assert torch.equal(stacked.loss, listed.loss)
    as_list = csrc_ref.pairwise_similarity(tuple(case.hidden), mask=case.valid)
    assert torch.equal(as_list, csrc_ref.pairwise_similarity(case.hidden, mask=case.valid))
