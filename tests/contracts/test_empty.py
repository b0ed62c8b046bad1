"""An empty loss is a zero whose backward gives real zeros, whatever the hidden states hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import carma_kernels as ck
from tests.cases import BF16, FP32, Backend, Case, list_pairs, make_batch

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
STACKED = pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "list"])
L = 3


def assert_connected_zero(
    loss: Callable[[Tensor | list[Tensor], Tensor], Tensor], hidden: Tensor, *, stacked: bool, temperature: bool
) -> None:
    """Zero, with zeros for every layer and the temperature: a gradient left out would hang DDP."""
    leaf = hidden.detach().clone().requires_grad_()
    layers = [layer.detach().requires_grad_() for layer in leaf]
    tau = torch.tensor(0.1, device=hidden.device, requires_grad=True)
    value = loss(leaf if stacked else layers, tau)
    assert (value == 0).all()
    leaves = [*([leaf] if stacked else layers), *([tau] if temperature else [])]
    for gradient, leaf in zip(torch.autograd.grad(value.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype
        assert (gradient == 0).all()


def spoilt(case: Case, backend: Backend, dtype: torch.dtype = FP32) -> Tensor:
    hidden = make_batch(case).hidden.to(backend.device, dtype)
    hidden[..., ::2] = torch.nan
    hidden[..., 1::4] = torch.inf
    return hidden


@REDUCTIONS
@STACKED
@pytest.mark.parametrize("negatives", ["sequence", "batch", "listed"])
@pytest.mark.parametrize("drawing", ["wordless", "one token", "nothing valid"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_mi_without_pairs(
    backend: Backend, dtype: torch.dtype, drawing: str, negatives: str, stacked: bool, reduction: str
) -> None:
    batch = make_batch(Case(drawing=drawing, L=L))
    listed = negatives == "listed"
    spans = (list_pairs(batch) if listed else batch.spans).to(backend.device)
    asked: dict[str, Any] = {"reduction": reduction, "backend": backend.name}
    asked |= {} if listed else {"negatives": negatives}
    hidden = spoilt(Case(drawing=drawing, L=L), backend, dtype)
    for count in (None,) if reduction == "sum" else (None, 0, 9, torch.tensor(0, device=backend.device)):
        assert_connected_zero(
            lambda h, tau, count=count: ck.mi_loss(h, spans, temperature=tau, num_pairs=count, **asked),  # type: ignore[misc]
            hidden,
            stacked=stacked,
            temperature=True,
        )


@STACKED
@pytest.mark.parametrize("match", [None, 5])
@pytest.mark.parametrize("negatives", ["sequence", "batch", "listed"])
def test_mi_without_negatives(backend: Backend, negatives: str, match: float | None, stacked: bool) -> None:
    """Pairs that cost nothing: a word that is all there is, and slots that hold no token."""
    case = Case(drawing="covered", L=L)
    batch = make_batch(case)
    spans: ck.TokenSpans | ck.PairIndex
    asked: dict[str, Any] = {"backend": backend.name}
    if negatives == "listed":
        pairs = list_pairs(batch)
        spans = ck.PairIndex(pairs.anchor, pairs.positive, torch.full_like(pairs.negatives, -1), pairs.shape)
    else:
        rows = slice(0, 1 if negatives == "batch" else None)  # with a second sequence a batch has negatives
        spans = ck.TokenSpans.from_lists([[(0, 3)], [(0, 3)]][rows], seq_len=3)
        asked |= {"negatives": negatives, "match_negatives": match}
    spans = spans.to(backend.device)
    assert_connected_zero(
        lambda h, tau: ck.mi_loss(h, spans, temperature=tau, reduction="none", **asked),
        batch.hidden[:, : spans.shape[0]].to(backend.device, backend.sharpest),
        stacked=stacked,
        temperature=True,
    )


@REDUCTIONS
@STACKED
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_stability_without_a_step_or_a_token(
    backend: Backend, dtype: torch.dtype, stacked: bool, reduction: str
) -> None:
    hidden = spoilt(Case(L=L), backend, dtype)
    nothing = torch.zeros(hidden.shape[1:3], dtype=torch.bool, device=backend.device)
    asked: dict[str, Any] = {"reduction": reduction, "backend": backend.name}
    assert_connected_zero(lambda h, _: ck.stability_loss(h, **asked), hidden[:1], stacked=stacked, temperature=False)
    assert_connected_zero(
        lambda h, _: ck.stability_loss(h, mask=nothing, **asked), hidden, stacked=stacked, temperature=False
    )


@STACKED
def test_similarity_of_nothing(backend: Backend, stacked: bool) -> None:
    hidden = spoilt(Case(L=L), backend)
    nothing = torch.zeros(hidden.shape[1:3], dtype=torch.bool, device=backend.device)
    assert_connected_zero(
        lambda h, tau: ck.pairwise_similarity(h, temperature=tau, mask=nothing, backend=backend.name),
        hidden,
        stacked=stacked,
        temperature=True,
    )


@STACKED
def test_carma_of_nothing(backend: Backend, stacked: bool) -> None:
    hidden = spoilt(Case(L=L, drawing="wordless"), backend)
    spans = make_batch(Case(drawing="wordless")).spans.to(backend.device)
    nothing = torch.zeros(spans.shape, dtype=torch.bool, device=backend.device)

    def loss(h: Tensor | list[Tensor], tau: Tensor) -> Tensor:
        return ck.carma_loss(h, spans, ck.CarmaConfig(temperature=tau), mask=nothing, backend=backend.name).loss

    assert_connected_zero(loss, hidden, stacked=stacked, temperature=True)


@STACKED
@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("name", ["mi", "stability", "similarity"])
def test_hidden_states_without_tokens(backend: Backend, name: str, B: int, T: int, stacked: bool) -> None:
    spans = ck.TokenSpans.from_lists([[]] * B, seq_len=T).to(backend.device)

    def loss(h: Tensor | list[Tensor], tau: Tensor) -> Tensor:
        if name == "mi":
            return ck.mi_loss(h, spans, temperature=tau, backend=backend.name)
        if name == "stability":
            return ck.stability_loss(h, backend=backend.name)
        return ck.pairwise_similarity(h, temperature=tau, backend=backend.name)

    hidden = torch.zeros(L, B, T, 3, device=backend.device)
    assert_connected_zero(loss, hidden, stacked=stacked, temperature=name != "stability")


def test_a_large_number_of_pairs(backend: Backend) -> None:
    """2^40 pairs in the whole batch, as a number and as a tensor: beyond int32, and beyond the integers of fp32."""
    batch = make_batch(Case())
    spans = batch.spans.to(backend.device)
    hidden = batch.hidden.to(backend.device, FP32)
    plain = ck.mi_loss(hidden, spans, num_pairs=1, backend=backend.name)
    for count in (2**40, torch.tensor(2**40, device=backend.device)):
        assert ck.mi_loss(hidden, spans, num_pairs=count, backend=backend.name) == plain / 2**40
