"""How alike two hidden states are.

cosine:  s_ij = h_i.h_j / (|h_i| |h_j| tau)      dot:  s_ij = h_i.h_j / tau
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from csrc_ref.layers import check_option, connected_zero, select_layers

ZERO_NORM = 1e-8
"""A vector not longer than this counts as zero: its cosine with anything is 0, and so is its gradient."""


def pairwise_similarity(
    hidden_states: Tensor | Sequence[Tensor],
    *,
    metric: str = "cosine",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    layers: tuple[int, int] | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`s[l, b, i, j]`, the similarity of tokens i and j of sequence b in layer l.

    Args:
        hidden_states: `[L, B, T, D]`, or L tensors `[B, T, D]`.
        metric: "cosine" or "dot".
        temperature: tau > 0, a number or a 0-d tensor.
        mask: `[B, T]`, nonzero for the tokens that take part; rows and columns of the others are 0 with zero gradient,
            and their values are not read.
        layers: `(start, end)`, both included; None for all.
        out_dtype: None for fp32, or fp64 for hidden states in fp64.

    Returns:
        `[L, B, T, T]`.
    """
    check_option("metric", metric, ("cosine", "dot"))
    chosen = select_layers(hidden_states, layers)
    tau = checked_temperature(temperature, chosen[0])
    B, T, _ = chosen[0].shape
    valid = torch.ones(B, T, dtype=torch.bool) if mask is None else mask != 0  # [B, T]
    zero = connected_zero(*chosen, tau)
    tables = [zero.expand(0, T, T)]
    for h in chosen:  # [B, T, D]
        for b in range(B):
            tokens = valid[b].nonzero().flatten().to(h.device)  # [V]
            vectors = as_compared(h[b, tokens], metric)  # [V, D]
            table = zero.expand(T, T)
            for i, v_i in zip(tokens, vectors, strict=True):
                table = table.index_put((i, tokens), similarity(v_i, vectors, tau))
            tables.append(table[None])
    s = torch.cat(tables).reshape(len(chosen), B, T, T)
    return s.to(out_dtype or chosen[0].dtype)


def as_compared(h: Tensor, metric: str) -> Tensor:
    """Vectors whose plain dot product is the similarity at tau = 1: `h / |h|`, or 0 for a zero vector; `h` for dot.

    Args:
        h: `[..., D]`.
        metric: "cosine" or "dot".
    """
    if metric == "dot":
        return h
    squared = h.square().sum(-1, keepdim=True)  # [..., 1]
    is_zero = squared.sqrt() <= ZERO_NORM
    # both `where`s are needed: the first keeps sqrt'(0) = inf out of the backward, the second makes the value 0
    norm = torch.where(is_zero, 1.0, squared).sqrt()  # [..., 1]
    return torch.where(is_zero, 0.0, h / norm)


def similarity(v_i: Tensor, v_j: Tensor, temperature: float | Tensor) -> Tensor:
    """`v_i.v_j / tau` over the last axis. A product and a sum, because autocast would lower a matrix product."""
    return (v_i * v_j).sum(-1) / temperature


def checked_temperature(temperature: float | Tensor, h: Tensor) -> float | Tensor:
    """The temperature, in the dtype of the computation if it is a tensor.

    Raises:
        ValueError: it is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    return temperature.to(h) if isinstance(temperature, Tensor) else temperature
