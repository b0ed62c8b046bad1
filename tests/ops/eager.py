"""The losses as one writes them in PyTorch: in the dtype of the hidden states, differentiated by autograd.

The yardstick of accuracy in half precision, not an oracle.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from carma_kernels import TokenSpans


def pairwise_similarity(hidden: Tensor, *, metric: str, temperature: Tensor | float) -> Tensor:
    """`[L, B, T, T]`."""
    if metric == "cosine":
        hidden = F.normalize(hidden, dim=-1)
    return hidden @ hidden.transpose(-1, -2) / temperature


def mi_loss(hidden: Tensor, spans: TokenSpans, *, negatives: str, metric: str, temperature: Tensor | float) -> Tensor:
    L, B, T, D = hidden.shape
    N = B * T
    sequence = torch.arange(N) // T
    token = torch.arange(N)
    word = torch.where(spans.word.flatten() < 0, -1 - token, spans.word.flatten())  # [N] padding in words of its own
    same_word = word[:, None] == word
    is_positive = same_word & (token > token[:, None])  # [N, N]
    is_negative = ~same_word & spans.attention_mask.flatten()
    if negatives == "sequence":
        is_negative &= sequence[:, None] == sequence
    anchors = is_positive.any(1)
    s = pairwise_similarity(hidden.reshape(L, N, D), metric=metric, temperature=temperature)[:, anchors]  # [L, A, N]
    z = s.masked_fill(~is_negative[anchors], -torch.inf).logsumexp(-1, keepdim=True)
    return F.softplus(z - s)[:, is_positive[anchors]].mean()


def stability_loss(hidden: Tensor) -> Tensor:
    """Of one tensor `[L, B, T, D]`, without a mask."""
    terms = [
        (after - before).square().mean() / (before.square().mean() + after.square().mean() + 1e-8)
        for before, after in pairwise(hidden)
    ]
    return torch.stack(terms).sum()
