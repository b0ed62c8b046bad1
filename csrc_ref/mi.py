"""The MI loss: tokens of one word against the other tokens, an InfoNCE bound on their mutual information.

For a word w of two tokens or more, each pair of its tokens i < j is an anchor i and a positive j, and costs

    -log( exp(s_ij) / (exp(s_ij) + sum_{n in N(i)} exp(s_in)) )  =  softplus(z_i - s_ij)
    z_i = log sum_{n in N(i)} exp(s_in)

with N(i) the tokens outside w. L_MI is the mean over layers of the mean over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from csrc_ref.layers import check_option, connected_zero, select_layers
from csrc_ref.similarity import as_compared, checked_temperature, similarity


@runtime_checkable
class Spans(Protocol):
    """The words of each sequence as half-open token ranges, and which tokens are valid."""

    @property
    def attention_mask(self) -> Tensor:
        """`[B, T]` bool, True for a valid token."""

    def to_lists(self) -> list[list[tuple[int, int]]]:
        """For each sequence its words `(start, end)`."""


@runtime_checkable
class Pairs(Protocol):
    """Explicit pairs and the negatives of each, as flat token indices `b*T + t`."""

    @property
    def anchor(self) -> Tensor:
        """`[P]`."""

    @property
    def positive(self) -> Tensor:
        """`[P]`."""

    @property
    def negatives(self) -> Tensor:
        """`[P, K]`, or `[L, P, K]` with one draw for each layer in the loss; -1 for a slot that holds no token."""


class Pair(NamedTuple):
    """Flat token indices `b*T + t`."""

    anchor: int
    positive: int
    negatives: list[int]


def mi_loss(
    hidden_states: Tensor | Sequence[Tensor],
    spans_or_pairs: Spans | Pairs,
    *,
    negatives: str = "sequence",
    temperature: float | Tensor = 0.1,
    metric: str = "cosine",
    layers: tuple[int, int] | None = None,
    match_negatives: float | None = None,
    reduction: str = "mean",
    num_pairs: float | Tensor | None = None,
) -> Tensor:
    """`L_MI`: the mean over layers of the mean over pairs of `softplus(z_i - s_ij)`.

    Args:
        hidden_states: `[L, B, T, D]`, or L tensors `[B, T, D]`.
        spans_or_pairs: words, or explicit pairs whose negatives are exactly the tokens listed.
        negatives: N(i) of an anchor in word w: "sequence", the valid tokens of its sequence outside w; "batch", the
            valid tokens of the batch outside w. Not consulted with explicit pairs.
        temperature: tau > 0, a number or a 0-d tensor, which gets its gradient.
        metric: "cosine" or "dot".
        layers: `(start, end)`, both included; None for all.
        match_negatives: k adds `log(k / |N(i)|)` to `z_i`, an estimate of the loss with k random negatives.
        reduction: "mean"; "sum" over layers and pairs; "none" for the `[L]` per-layer means.
        num_pairs: divides instead of the number of pairs at hand, when they are a part of a larger batch.

    Returns:
        0-d, or `[L]` for "none". A pair without negatives costs 0 and counts; without pairs the loss is 0.
    """
    check_option("metric", metric, ("cosine", "dot"))
    check_option("negatives", negatives, ("sequence", "batch"))
    check_option("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "sum" and num_pairs is not None:
        raise ValueError("num_pairs is the divisor of a mean; it has no place in reduction='sum'.")
    chosen = select_layers(hidden_states, layers)
    tau = checked_temperature(temperature, chosen[0])
    pairs_of_layers = list_pairs(spans_or_pairs, negatives, chosen)
    if match_negatives is not None:
        if isinstance(spans_or_pairs, Pairs):
            raise ValueError("match_negatives is for words; explicit pairs already say which negatives they have.")
        if not match_negatives > 0:
            raise ValueError(f"match_negatives must be > 0, got {match_negatives}.")

    sums = []
    for h, pairs in zip(chosen, pairs_of_layers, strict=True):
        tokens = h.flatten(0, 1).unbind()  # B*T tensors [D]
        used = {t for pair in pairs for t in (pair.anchor, pair.positive, *pair.negatives)}
        v = {t: as_compared(tokens[t], metric) for t in sorted(used)}  # no other token is read
        layer_sum = connected_zero(h, tau)
        for i, j, others in pairs:
            if not others:
                continue  # nothing to be told apart from: costs 0
            s_ij = similarity(v[i], v[j], tau)
            s_in = similarity(v[i], torch.stack([v[n] for n in others]), tau)  # [|N(i)|]
            z_i = s_in.logsumexp(0)
            if match_negatives is not None:
                z_i = z_i + math.log(match_negatives / len(others))
            layer_sum = layer_sum + softplus(z_i - s_ij)
        sums.append(layer_sum)

    per_layer = torch.stack(sums)  # [L]
    if reduction == "sum":
        return per_layer.sum()
    if P := count_pairs(spans_or_pairs):
        per_layer = per_layer / (P if num_pairs is None else num_pairs)
    return per_layer if reduction == "none" else per_layer.mean()


def softplus(x: Tensor) -> Tensor:
    """`log(1 + e^x)`, exact also where `torch.nn.functional.softplus` cuts it off at x = 20."""
    return torch.logaddexp(torch.zeros_like(x), x)


def list_pairs(spans_or_pairs: Spans | Pairs, negatives: str, chosen: list[Tensor]) -> list[list[Pair]]:
    """For each layer its pairs and their negatives.

    Raises:
        ValueError: words of another batch shape, or negatives drawn for another number of layers.
    """
    B, T, _ = chosen[0].shape
    if isinstance(spans_or_pairs, Pairs):
        drawn = spans_or_pairs.negatives  # [P, K] or [L, P, K]
        if drawn.dim() == 2:
            drawn = drawn.expand(len(chosen), *drawn.shape)
        if len(drawn) != len(chosen):
            raise ValueError(f"negatives are drawn for {len(drawn)} layers, the loss is over {len(chosen)}.")
        anchors, positives = spans_or_pairs.anchor.tolist(), spans_or_pairs.positive.tolist()
        return [
            [Pair(i, j, [n for n in slots if n >= 0]) for i, j, slots in zip(anchors, positives, layer, strict=True)]
            for layer in drawn.tolist()
        ]

    mask = spans_or_pairs.attention_mask  # [B, T]
    if mask.shape != (B, T):
        raise ValueError(f"spans_or_pairs is for {list(mask.shape)} tokens, hidden_states for {[B, T]}.")
    valid = mask.flatten().nonzero().flatten().tolist()
    pairs = []
    for b, words in enumerate(spans_or_pairs.to_lists()):
        sequence = range(b * T, (b + 1) * T)
        candidates = [t for t in valid if t in sequence] if negatives == "sequence" else valid
        for start, end in words:
            word = range(b * T + start, b * T + end)
            outside = [t for t in candidates if t not in word]
            pairs += [Pair(i, j, outside) for i in word for j in word if i < j]
    return [pairs] * len(chosen)


def count_pairs(spans_or_pairs: Spans | Pairs) -> int:
    """`P`, as it divides the sum of a layer."""
    if isinstance(spans_or_pairs, Pairs):
        return len(spans_or_pairs.anchor)
    lengths = [end - start for words in spans_or_pairs.to_lists() for start, end in words]
    return sum(n * (n - 1) // 2 for n in lengths)
