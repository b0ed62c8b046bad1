"""The published CARMA losses, restated: what every other implementation is compared with.

After the code of the paper (arXiv 2502.11066; github.com/nura-j/CARMA, `src/optm_losses.py`, commit 0106af6): the same
values, the same draws from Python's `random` and the same cost, in our own words. Also the same faults: every sample's
pairs are evaluated on every sequence of the batch, padding is drawn as a negative, exp may overflow.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.workloads import Spans

MI_WEIGHT = 0.5
STABILITY_WEIGHT = 0.2


def carma_loss(hidden_states: Sequence[Tensor], spans: Spans) -> Tensor:
    """`gamma * L_MI + eta * L_Stability` with the weights of the published commands."""
    return MI_WEIGHT * mi_loss(hidden_states, spans) + STABILITY_WEIGHT * stability_loss(hidden_states)


def mi_loss(
    hidden_states: Sequence[Tensor], spans: Spans, *, temperature: float = 0.1, num_negatives: int = 5
) -> Tensor:
    """Mean over layers of the mean over pairs of `-log(e^p / (e^p + sum_k e^{n_k}))`.

    Args:
        hidden_states: L tensors `[B, T, D]`.
        spans: for each sample its words; each sample's last word is left out.
        temperature: tau.
        num_negatives: K, drawn anew for every layer, sequence and pair.
    """
    words = [(start, end) for sample in spans for start, end in sample[:-1] if end - start > 1]
    layer_losses = [_layer_loss(h, words, temperature, num_negatives) for h in hidden_states]
    return torch.stack(layer_losses).mean()


def _layer_loss(h: Tensor, words: list[tuple[int, int]], temperature: float, num_negatives: int) -> Tensor:
    B, T, D = h.shape
    anchors, positives = [], []  # P tensors [D], P = B * the pairs of all samples
    rows, columns = [], []  # of the negatives, P*K numbers
    for b in range(B):
        for start, end in words:
            for i, j in _pairs_of(end - start):
                anchors.append(h[b][start:end][i])
                positives.append(h[b][start:end][j])
                outside = [(b, t) for t in range(T) if not start <= t < end]
                drawn = sorted(random.choices(outside, k=num_negatives))
                rows.extend(row for row, _ in drawn)
                columns.extend(column for _, column in drawn)
    anchor = torch.stack(anchors)  # [P, D]
    positive = torch.stack(positives)  # [P, D]
    negatives = h[rows, columns].view(-1, num_negatives, D)  # [P, K, D]

    to_positive = F.cosine_similarity(anchor, positive, dim=-1) / temperature  # [P]
    to_negatives = F.cosine_similarity(anchor.unsqueeze(1), negatives, dim=-1) / temperature  # [P, K]
    e_positive = to_positive.exp()
    return -(e_positive / (e_positive + to_negatives.exp().sum(1))).log().mean()


@cache
def _pairs_of(length: int) -> Tensor:
    """Positions `i < j` within a word of `length` tokens, `[pairs, 2]`."""
    return torch.combinations(torch.arange(length), r=2)


def stability_loss(hidden_states: Sequence[Tensor], *, eps: float = 1e-8) -> Tensor:
    """`sum_l m((h_{l+1} - h_l)^2) / (m(h_l^2) + m(h_{l+1}^2) + eps)`, `m` the mean, padding included."""
    total = hidden_states[0].new_zeros(())
    for current, following in pairwise(hidden_states):
        change = torch.mean((following - current) ** 2)
        total = total + change / (torch.mean(current**2) + torch.mean(following**2) + eps)
    return total
