"""The stability loss: how far each layer moves the hidden states, against their size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from csrc_ref.layers import check_option, connected_zero, select_layers


def stability_loss(
    hidden_states: Tensor | Sequence[Tensor],
    *,
    layers: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    reduction: str = "sum",
) -> Tensor:
    """`sum_l m((h_{l+1} - h_l)^2) / (m(h_l^2) + m(h_{l+1}^2) + eps)`, `m` the mean over B, T and D.

    Args:
        hidden_states: `[L, B, T, D]`, or L tensors `[B, T, D]`.
        layers: `(start, end)`, both included; None for all.
        mask: `[B, T]`, nonzero for the tokens over which `m` goes; None for every token, padding included.
        eps: keeps 0/0 away.
        reduction: "sum" or "mean" over the L-1 terms; "none" for the terms, `[L-1]`.

    Returns:
        0-d, or `[L-1]` for "none". 0 for one layer, and where no token takes part.
    """
    check_option("reduction", reduction, ("sum", "mean", "none"))
    chosen = select_layers(hidden_states, layers)
    zero = connected_zero(*chosen)
    if mask is not None:
        chosen = [h[mask != 0] for h in chosen]  # [V, D]: what is masked is not read
    terms = []
    for h, h_next in pairwise(chosen):
        if h.numel() == 0:
            terms.append(zero)
            continue
        change = (h_next - h).square().mean()
        size = h.square().mean() + h_next.square().mean()
        terms.append(change / (size + eps))
    if reduction == "none":
        return torch.stack(terms) if terms else zero.expand(0)
    total = sum(terms, zero)
    return total / len(terms) if reduction == "mean" and terms else total
