"""Cases whose answer is known beforehand, and what must not change the losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import csrc_ref
from carma_kernels.spans import PairIndex, TokenSpans
from csrc_ref import CarmaConfig

from .cases import random_case, random_pairs


def pair_with(positive: float, negatives: list[float]) -> tuple[Tensor, TokenSpans]:
    """Hidden states `[1, 1, 2+n, D]` of a word and n other tokens, with these dot products with the anchor."""
    h = torch.tensor([[1.0, 0.0], [positive, 1.0], *([s, 0.0] for s in negatives)], dtype=torch.float64)
    return h[None, None], TokenSpans.from_lists([[(0, 2)]], seq_len=2 + len(negatives))


def loss_of(positive: float, negatives: list[float]) -> float:
    h, spans = pair_with(positive, negatives)
    return csrc_ref.mi_loss(h, spans, metric="dot", temperature=1.0).item()


@pytest.mark.parametrize("gap", [30.0, 50.0, 300.0, 700.0])
def test_far_ahead_the_loss_is_exp_minus_the_gap(gap: float) -> None:
    assert loss_of(gap, [0.0]) == pytest.approx(math.exp(-gap), rel=1e-12)


@pytest.mark.parametrize("gap", [30.0, 700.0, 1e6])
def test_far_behind_the_loss_is_the_gap(gap: float) -> None:
    assert loss_of(0.0, [gap]) == pytest.approx(gap, rel=1e-12)


@pytest.mark.parametrize("gap", [-25.0, -3.0, 0.0, 0.7, 20.5, 25.0])
def test_one_negative_is_a_sigmoid(gap: float) -> None:
    """Also beyond 20, where `torch.nn.functional.softplus` drops a term of 2e-9."""
    h, spans = pair_with(gap, [0.0])
    h.requires_grad_()
    loss = csrc_ref.mi_loss(h, spans, metric="dot", temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-gap)), rel=1e-12)
    assert loss_of(0.0, [gap]) == pytest.approx(gap + math.log1p(math.exp(-gap)), rel=1e-13)
    assert h.grad is not None
    assert h.grad[0, 0, 1, 0].item() == pytest.approx(-1 / (1 + math.exp(gap)), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_negatives_equal_to_the_positive(n: int) -> None:
    assert loss_of(0.3, [0.3] * n) == pytest.approx(math.log(1 + n), rel=1e-14)
    h, spans = pair_with(0.3, [0.3] * n)
    matched = csrc_ref.mi_loss(h, spans, metric="dot", temperature=1.0, match_negatives=5)
    assert matched.item() == pytest.approx(math.log(1 + 5), rel=1e-14)


def test_all_tokens_equal() -> None:
    h = torch.ones(2, 1, 6, 3, dtype=torch.float64, requires_grad=True)
    loss = csrc_ref.mi_loss(h, TokenSpans.from_lists([[(0, 2)]], seq_len=6))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + 4), rel=1e-14)
    assert h.grad is not None
    assert h.grad.abs().max() < 1e-14


def test_a_repeated_negative_counts_again() -> None:
    h, _ = pair_with(1.0, [0.0, 0.5])
    pairs = PairIndex(torch.tensor([0]), torch.tensor([1]), torch.tensor([[2, 2, 3, -1]]), (1, 4))
    loss = csrc_ref.mi_loss(h, pairs, metric="dot", temperature=1.0)
    odds = 2 * math.exp(-1.0) + math.exp(-0.5)
    assert loss.item() == pytest.approx(math.log1p(odds), rel=1e-14)


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_a_pair_without_negatives_costs_nothing_and_counts(negatives: str) -> None:
    torch.manual_seed(0)
    h = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    covered = TokenSpans.from_lists([[(0, 3)]], seq_len=3)
    tau = torch.tensor(0.1, requires_grad=True)
    loss = csrc_ref.mi_loss(h, covered, negatives=negatives, temperature=tau, match_negatives=5)
    loss.backward()
    assert loss.item() == 0
    assert h.grad is not None
    assert (h.grad == 0).all()
    assert tau.grad == 0

    # one such word of 3 pairs beside a sequence with one real pair: a quarter of that pair's cost
    other = torch.randn(1, 1, 3, 4, dtype=torch.float64)
    alone = csrc_ref.mi_loss(other, TokenSpans.from_lists([[(0, 2)]], seq_len=3))
    both = csrc_ref.mi_loss(torch.cat([h, other], dim=1), TokenSpans.from_lists([[(0, 3)], [(0, 2)]], seq_len=3))
    assert both.item() == pytest.approx(alone.item() / 4, rel=1e-14)


NO_PAIRS = {
    "no words": TokenSpans.from_lists([[], []], seq_len=4),
    "one-token words": TokenSpans.from_lists([[(0, 1), (1, 2)], [(3, 4)]], seq_len=4),
    "nothing valid": TokenSpans.from_lists([[], []], seq_len=4, attention_mask=torch.zeros(2, 4)),
    "empty list": PairIndex(
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0, 5, dtype=torch.int32),
        (2, 4),
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", NO_PAIRS)
def test_no_pairs_is_a_zero_with_real_zero_gradients(kind: str, reduction: str) -> None:
    layers = [torch.full((2, 4, 3), math.nan, requires_grad=True) for _ in range(3)]
    tau = torch.tensor(0.1, requires_grad=True)
    for count in (None,) if reduction == "sum" else (None, 0, 9):
        loss = csrc_ref.mi_loss(
            layers, NO_PAIRS[kind], temperature=tau, layers=(1, 2), reduction=reduction, num_pairs=count
        )
        assert loss.tolist() == ([0, 0] if reduction == "none" else 0)
        gradients = torch.autograd.grad(loss.sum(), [*layers[1:], tau])
        assert all((gradient == 0).all() for gradient in gradients)
        assert [gradient.shape for gradient in gradients] == [(2, 4, 3), (2, 4, 3), ()]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_empty_stability_is_a_zero_with_real_zero_gradients(reduction: str) -> None:
    h = torch.full((3, 2, 4, 3), math.inf, requires_grad=True)
    one_layer = csrc_ref.stability_loss(h, layers=(1, 1), reduction=reduction)
    nothing_valid = csrc_ref.stability_loss(h, mask=torch.zeros(2, 4), reduction=reduction)
    assert one_layer.tolist() == ([] if reduction == "none" else 0)
    assert nothing_valid.tolist() == ([0, 0] if reduction == "none" else 0)
    for loss in (one_layer, nothing_valid):
        (gradient,) = torch.autograd.grad(loss.sum(), h)
        assert (gradient == 0).all()
    no_sequences = torch.zeros(3, 0, 4, 3, requires_grad=True)
    csrc_ref.stability_loss(no_sequences).backward()
    assert no_sequences.grad is not None


def test_empty_similarity_is_zeros_with_real_zero_gradients() -> None:
    h = torch.full((1, 2, 3, 4), math.nan, requires_grad=True)
    tau = torch.tensor(1.0, requires_grad=True)
    s = csrc_ref.pairwise_similarity(h, temperature=tau, mask=torch.zeros(2, 3))
    assert (s == 0).all()
    gradients = torch.autograd.grad(s.sum(), (h, tau))
    assert all((gradient == 0).all() for gradient in gradients)
    assert csrc_ref.pairwise_similarity(torch.zeros(2, 0, 3, 4)).shape == (2, 0, 3, 3)


@pytest.mark.parametrize("length", [0.0, 1e-8, 1e-200])
@pytest.mark.parametrize("token", range(4))
def test_a_zero_vector_has_similarity_and_gradient_zero(token: int, length: float) -> None:
    """As anchor, positive, and negative: the cost is the one with every similarity of the token at 0."""
    torch.manual_seed(0)
    h = torch.randn(1, 1, 4, 2, dtype=torch.float64)
    h[0, 0, token] = torch.tensor([length, 0.0])
    h.requires_grad_()
    spans = TokenSpans.from_lists([[(0, 2)]], seq_len=4)
    s = csrc_ref.pairwise_similarity(h, temperature=0.1, out_dtype=torch.float64)[0, 0]
    assert (s[token] == 0).all()
    assert (s[:, token] == 0).all()
    loss = csrc_ref.mi_loss(h, spans)
    assert loss.item() == pytest.approx(torch.log1p((s[0, 2:] - s[0, 1]).exp().sum()).item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss + s.square().sum(), h)
    assert (gradient[0, 0, token] == 0).all()
    assert gradient.isfinite().all()


def test_just_above_the_threshold_a_vector_has_its_exact_cosine() -> None:
    h = torch.tensor([[[[1.1e-8, 0.0], [0.6, 0.8]]]], dtype=torch.float64)
    s = csrc_ref.pairwise_similarity(h, out_dtype=torch.float64)
    assert s[0, 0, 0, 1].item() == pytest.approx(0.6, rel=1e-14)


def test_stability_of_nothing_but_zeros() -> None:
    h = torch.zeros(2, 1, 3, 2, requires_grad=True)
    loss = csrc_ref.stability_loss(h)
    loss.backward()
    assert loss.item() == 0
    assert h.grad is not None
    assert (h.grad == 0).all()


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (0.0, 1.0), (-1.0, 2.0), (3.0, 4 / 10)])
def test_stability_of_a_scaled_copy(factor: float, expected: float) -> None:
    torch.manual_seed(0)
    h = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    loss = csrc_ref.stability_loss(torch.cat([h, factor * h]), eps=1e-300)
    assert loss.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("negatives", ["sequence", "batch", "listed"])
def test_a_vectors_length_does_not_matter_to_a_cosine(negatives: str) -> None:
    case = random_case(0)
    lengths = torch.rand(*case.hidden.shape[:3], 1, dtype=torch.float64) * 10 + 0.1
    spans = random_pairs(case, 1) if negatives == "listed" else case.spans
    options = {} if negatives == "listed" else {"negatives": negatives}
    before = csrc_ref.mi_loss(case.hidden, spans, **options)  # type: ignore[arg-type]
    after = csrc_ref.mi_loss(case.hidden * lengths, spans, **options)  # type: ignore[arg-type]
    assert after.item() == pytest.approx(before.item(), rel=1e-13)
    raw = csrc_ref.mi_loss(case.hidden, spans, metric="dot", **options)  # type: ignore[arg-type]
    scaled = csrc_ref.mi_loss(case.hidden * lengths, spans, metric="dot", **options)  # type: ignore[arg-type]
    assert abs(scaled.item() - raw.item()) > 1e-3


@pytest.mark.parametrize("negatives", ["sequence", "batch"])
def test_permuting_the_sequences_permutes_the_gradient(negatives: str) -> None:
    case = random_case(1)
    order = [2, 0, 1]
    permuted = TokenSpans.from_lists(
        [case.words[b] for b in order], seq_len=case.valid.shape[1], attention_mask=case.valid[order]
    )
    config = CarmaConfig(negatives=negatives)
    gradients = []
    losses = []
    for hidden, spans, mask in (
        (case.hidden, case.spans, case.valid),
        (case.hidden[:, order], permuted, case.valid[order]),
    ):
        hidden = hidden.clone().requires_grad_()
        out = csrc_ref.carma_loss(hidden, spans, config, mask=mask)
        gradients.append(torch.autograd.grad(out.loss, hidden)[0])
        losses.append(out.loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-13)
    torch.testing.assert_close(gradients[1], gradients[0][:, order], rtol=1e-11, atol=1e-14)


def test_parts_of_a_batch_add_up_with_num_pairs() -> None:
    case = random_case(2)
    T = case.valid.shape[1]
    whole = csrc_ref.mi_loss(case.hidden, case.spans)
    parts = [
        csrc_ref.mi_loss(
            case.hidden[:, b : b + 1],
            TokenSpans.from_lists([case.words[b]], seq_len=T, attention_mask=case.valid[b : b + 1]),
            num_pairs=case.spans.num_pairs,
        )
        for b in range(len(case.words))
    ]
    assert torch.stack(parts).sum().item() == pytest.approx(whole.item(), rel=1e-13)


def test_inputs_are_not_written_to() -> None:
    case = random_case(3)
    before = case.hidden.clone()
    csrc_ref.carma_loss(case.hidden, case.spans, mask=case.valid)
    csrc_ref.pairwise_similarity(case.hidden, mask=case.valid)
    assert torch.equal(case.hidden.nan_to_num(7.0), before.nan_to_num(7.0))


def test_anything_with_the_right_attributes_will_do() -> None:
    class Words:
        attention_mask = torch.tensor([[1, 1, 1, 0]])

        def to_lists(self) -> list[list[tuple[int, int]]]:
            return [[(0, 2)]]

    class Listed:
        anchor = torch.tensor([0])
        positive = torch.tensor([1])
        negatives = torch.tensor([[2]])

    torch.manual_seed(0)
    h = torch.randn(2, 1, 4, 3)
    assert torch.equal(csrc_ref.mi_loss(h, Words()), csrc_ref.mi_loss(h, Listed()))


def test_bad_options_raise() -> None:
    case = random_case(4)
    pairs = random_pairs(case, 0, num_layers=2)
    bad = [
        ({"metric": "euclid"}, "metric must be one of 'cosine', 'dot', got 'euclid'"),
        ({"negatives": "all"}, "negatives must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": torch.tensor(-1.0)}, "temperature must be > 0"),
        ({"match_negatives": 0}, "match_negatives must be > 0"),
        ({"layers": (0, 2)}, "layers must be .* L = 2, got \\(0, 2\\)"),
        ({"layers": (1, 0)}, "layers must be"),
        ({"layers": (-1, 1)}, "layers must be"),
        ({"reduction": "sum", "num_pairs": 3}, "num_pairs is the divisor of a mean"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message):
            csrc_ref.mi_loss(case.hidden, case.spans, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="explicit pairs already say"):
        csrc_ref.mi_loss(case.hidden, pairs, match_negatives=5)
    with pytest.raises(ValueError, match="drawn for 2 layers, the loss is over 1"):
        csrc_ref.mi_loss(case.hidden, pairs, layers=(0, 0))
    with pytest.raises(ValueError, match=r"for \[3, 7\] tokens, hidden_states for \[2, 7\]"):
        csrc_ref.mi_loss(case.hidden[:, :2], case.spans)
    with pytest.raises(ValueError, match="reduction must be one of"):
        csrc_ref.stability_loss(case.hidden, reduction="max")
    with pytest.raises(ValueError, match="metric must be one of"):
        csrc_ref.pairwise_similarity(case.hidden, metric="l2")
