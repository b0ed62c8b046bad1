"""gradcheck in fp64: numbers by finite differences against autograd through csrc_ref, the temperature's included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import csrc_ref
from csrc_ref import CarmaConfig

from .cases import random_case, random_pairs


def checked(function: Callable[..., object], *inputs: Tensor) -> bool:
    return gradcheck(function, [x.detach().clone().requires_grad_() for x in inputs], atol=1e-7, rtol=1e-5)


def temperature(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    "options", [{}, {"match_negatives": 3, "num_pairs": 20}, {"reduction": "none"}, {"layers": (1, 1)}]
)
@pytest.mark.parametrize(("metric", "tau"), [("cosine", 0.3), ("dot", 2.0)])
@pytest.mark.parametrize("negatives", ["sequence", "batch", "listed"])
def test_mi(negatives: str, metric: str, tau: float, options: dict[str, object]) -> None:
    case = random_case(0, B=2, T=5, D=2)
    hidden = case.hidden.nan_to_num(1.0)  # finite differences need numbers in the padding, too
    if negatives == "listed":
        if "match_negatives" in options:
            options = {"num_pairs": torch.tensor(20), "reduction": "mean"}
        pairs = random_pairs(case, 1)
        assert checked(
            lambda h, t: csrc_ref.mi_loss(h, pairs, metric=metric, temperature=t, **options),  # type: ignore[arg-type]
            hidden,
            temperature(tau),
        )
        return
    assert checked(
        lambda h, t: csrc_ref.mi_loss(h, case.spans, negatives=negatives, metric=metric, temperature=t, **options),  # type: ignore[arg-type]
        hidden,
        temperature(tau),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"reduction": "mean", "eps": 0.1}, {"layers": (1, 2)}])
def test_stability(options: dict[str, object], masked: bool) -> None:
    case = random_case(1, L=3, B=2, T=4, D=2, poison=False)
    mask = case.valid if masked else None
    assert checked(lambda h: csrc_ref.stability_loss(h, mask=mask, **options), case.hidden)  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("metric", "tau"), [("cosine", 0.3), ("dot", 2.0)])
def test_pairwise_similarity(metric: str, tau: float, masked: bool) -> None:
    case = random_case(2, B=2, T=4, D=2, poison=False)
    mask = case.valid if masked else None
    assert checked(
        lambda h, t: csrc_ref.pairwise_similarity(h, metric=metric, temperature=t, mask=mask, out_dtype=torch.float64),
        case.hidden,
        temperature(tau),
    )


def test_carma_of_a_list_of_layers() -> None:
    case = random_case(3, L=3, B=2, T=4, D=2, poison=False)

    def losses(tau: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = CarmaConfig(temperature=tau, mi_layers=(1, 2), stability_layers=(0, 1))
        return csrc_ref.carma_loss(layers, case.spans, config, mask=case.valid, num_pairs=7)[:3]

    assert checked(losses, temperature(0.3), *case.hidden)


def test_per_layer_values_of_carma_are_detached() -> None:
    case = random_case(4)
    out = csrc_ref.carma_loss(case.hidden.requires_grad_(), case.spans, mask=case.valid)
    assert out.loss.requires_grad
    assert out.mi.requires_grad
    assert out.stability.requires_grad
    assert not out.mi_per_layer.requires_grad
    assert not out.stability_per_layer.requires_grad


def test_gradients_of_padding_are_zero_and_those_of_tokens_finite() -> None:
    """The padding is NaN: what is read into the arithmetic shows."""
    case = random_case(5)
    for negatives in ("sequence", "batch"):
        hidden = case.hidden.clone().requires_grad_()
        config = CarmaConfig(negatives=negatives)
        csrc_ref.carma_loss(hidden, case.spans, config, mask=case.valid).loss.backward()
        assert hidden.grad is not None
        assert (hidden.grad[:, ~case.valid] == 0).all()
        assert hidden.grad[:, case.valid].isfinite().all()
        assert (hidden.grad[:, case.valid] != 0).any(-1).all()


def test_listed_pairs_read_no_token_but_theirs() -> None:
    case = random_case(6)
    pairs = random_pairs(case, 2)
    listed = torch.zeros(case.valid.numel(), dtype=torch.bool)
    listed[torch.cat([pairs.anchor, pairs.positive, pairs.negatives[pairs.negatives >= 0]]).long()] = True
    listed = listed.view(case.valid.shape)  # [B, T]
    hidden = case.hidden.clone()
    hidden[:, ~listed] = float("inf")
    hidden.requires_grad_()
    loss = csrc_ref.mi_loss(hidden, pairs)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad is not None
    assert (hidden.grad[:, ~listed] == 0).all()
    assert hidden.grad.isfinite().all()


def test_unselected_layers_are_not_read() -> None:
    case = random_case(7, L=4)
    hidden = case.hidden.clone()
    hidden[0] = hidden[3] = float("nan")
    hidden.requires_grad_()
    config = CarmaConfig(mi_layers=(1, 2), stability_layers=(1, 2))
    out = csrc_ref.carma_loss(hidden, case.spans, config, mask=case.valid)
    out.loss.backward()
    assert out.loss.isfinite()
    assert hidden.grad is not None
    assert (hidden.grad[[0, 3]] == 0).all()
    assert hidden.grad.isfinite().all()


def test_forward_mode() -> None:
    """The way out of the backends, which refuse tangents."""
    case = random_case(4, L=3, B=2, T=4, D=2, poison=False)
    tangent = torch.randn(case.hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = case.hidden.detach()

    def loss(h: Tensor) -> Tensor:
        return csrc_ref.carma_loss(h, case.spans).loss

    _, derivative = torch.func.jvp(loss, (hidden,), (tangent,))
    (gradient,) = torch.autograd.grad(loss(hidden.requires_grad_()), hidden)
    assert torch.allclose(derivative, (gradient * tangent).sum())
