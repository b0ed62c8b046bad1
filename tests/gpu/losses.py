"""Each loss as a function of hidden states, words, temperature and backend; and batches like those of real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import carma_kernels as ck
from carma_kernels import CarmaConfig, TokenSpans
from tests.cases import FP32
from tests.compare import upstream_gradients

Call = Callable[[Any, Any, Any, str], Tensor]
LOSSES: dict[str, Call] = {
    "mi": lambda h, spans, tau, backend: ck.mi_loss(h, spans, temperature=tau, backend=backend),
    "mi, dot": lambda h, spans, tau, backend: ck.mi_loss(h, spans, metric="dot", temperature=tau * 80, backend=backend),
    "mi, batch": lambda h, spans, tau, backend: ck.mi_loss(
        h, spans, negatives="batch", match_negatives=5, temperature=tau, backend=backend
    ),
    "mi, listed": lambda h, spans, tau, backend: ck.mi_loss(h, listed(spans), temperature=tau, backend=backend),
    "stability": lambda h, spans, _, backend: ck.stability_loss(h, mask=spans.attention_mask, backend=backend),
    "carma": lambda h, spans, tau, backend: (
        ck.carma_loss(h, spans, CarmaConfig(temperature=tau), mask=spans.attention_mask, backend=backend).loss
    ),
    # a temperature that is known to be no sharper than this has kernels of its own
    "carma, a number": lambda h, spans, _, backend: ck.carma_loss(h, spans, backend=backend).loss,
    "similarity": lambda h, spans, tau, backend: ck.pairwise_similarity(
        h, temperature=tau, mask=spans.attention_mask, backend=backend, out_dtype=torch.promote_types(h[0].dtype, FP32)
    ),
}


def listed(spans: TokenSpans) -> ck.PairIndex:
    return spans.sample_pairs(5, torch.Generator(spans.device).manual_seed(0))


def batch(shape: tuple[int, ...]) -> tuple[Tensor, TokenSpans]:
    """Tokens with something in common, as hidden states have; words of two to five tokens and padding.

    Args:
        shape: `(L, B, T, D)`.
    """
    L, B, T, D = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(L, B, T, D, generator=generator, dtype=torch.float64)
    hidden += torch.randn(D, generator=generator, dtype=torch.float64)
    valid = torch.arange(T) < torch.linspace(max(T // 2, 8), T, B).long()[:, None]
    spans = [[(at, at + 2 + at % 4) for at in range(0, int(row.sum()) - 5, 7)] for row in valid]
    return hidden, TokenSpans.from_lists(spans, seq_len=T, attention_mask=valid)


def step_of(
    loss: str, shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: str
) -> Callable[[], list[Tensor]]:
    """The loss, and the gradients of the hidden states and of the temperature."""
    hidden, spans = batch(shape)
    leaf = hidden.to(device, dtype).requires_grad_()
    temperature = torch.tensor(0.1, device=device, requires_grad=True)
    there = spans.to(device)
    pairs_or_spans = listed(there) if loss == "mi, listed" else there  # drawn once

    def forward() -> Tensor:
        if isinstance(pairs_or_spans, ck.PairIndex):
            return ck.mi_loss(leaf, pairs_or_spans, temperature=temperature, backend=backend)
        return LOSSES[loss](leaf, pairs_or_spans, temperature, backend)

    upstream = upstream_gradients([forward()])

    def step() -> list[Tensor]:
        value = forward()
        wanted = (leaf, temperature)
        return [
            value.detach(),
            *torch.autograd.grad(value, wanted, upstream, allow_unused=True, materialize_grads=True),
        ]

    return step
