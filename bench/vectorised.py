"""The peers: CARMA's losses in good plain PyTorch, differentiated by autograd.

`exact_*` has this package's semantics, every token outside a word as its negatives. `sampled_*` has the published
semantics, draw for draw. Both take one matrix product a layer and index it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.published import MI_WEIGHT, STABILITY_WEIGHT
from bench.workloads import Case, Spans

TEMPERATURE = 0.1
"""The paper's tau."""


@dataclass(frozen=True)
class AnchorIndex:
    """The pairs of a batch by sequence, padded to A, the most anchors a sequence has."""

    sequence: Tensor  # [B, 1]
    anchor: Tensor  # [B, A] token position; 0 where padded
    is_negative: Tensor  # [B, A, T] bool
    pair_sequence: Tensor  # [P]
    pair_anchor: Tensor  # [P] position in A
    pair_positive: Tensor  # [P] token position


def index_anchors(case: Case) -> AnchorIndex:
    """What a collator would build once a batch."""
    device = case.attention_mask.device
    valid = case.attention_mask.cpu()  # [B, T]
    B, T = valid.shape
    words_of = [[(i, start, end) for start, end in words for i in range(start, end - 1)] for words in case.spans]
    A = max(map(len, words_of))
    anchor = torch.zeros(B, A, dtype=torch.long)
    is_negative = torch.zeros(B, A, T, dtype=torch.bool)
    pairs = []
    for b, anchors in enumerate(words_of):
        for a, (i, start, end) in enumerate(anchors):
            anchor[b, a] = i
            is_negative[b, a] = valid[b]
            is_negative[b, a, start:end] = False
            pairs += [(b, a, j) for j in range(i + 1, end)]
    pair_sequence, pair_anchor, pair_positive = torch.tensor(pairs).unbind(1)
    tensors = (torch.arange(B)[:, None], anchor, is_negative, pair_sequence, pair_anchor, pair_positive)
    return AnchorIndex(*(tensor.to(device) for tensor in tensors))


def exact_carma_loss(hidden_states: Sequence[Tensor], index: AnchorIndex) -> Tensor:
    """`gamma * L_MI + eta * L_Stability`, all negatives."""
    return MI_WEIGHT * exact_mi_loss(hidden_states, index) + STABILITY_WEIGHT * stability_loss(hidden_states)


def exact_mi_loss(hidden_states: Sequence[Tensor], index: AnchorIndex, *, temperature: float = TEMPERATURE) -> Tensor:
    """Mean over layers and pairs of `softplus(z_i - s_ij)`: anchors times tokens, no T x T matrix."""
    pair = (index.pair_sequence, index.pair_anchor)
    losses = []
    for h in hidden_states:
        unit = F.normalize(h, dim=-1, eps=1e-8)  # [B, T, D]
        s = unit[index.sequence, index.anchor] @ unit.mT / temperature  # [B, A, T]
        z = s.masked_fill(~index.is_negative, -torch.inf).logsumexp(-1)  # [B, A]
        losses.append(F.softplus(z[pair] - s[*pair, index.pair_positive]).mean())
    return torch.stack(losses).mean()


def metric_learning_carma_loss(case: Case) -> Callable[[Sequence[Tensor]], Tensor]:
    """`gamma * L_MI + eta * L_Stability` of a case, with `pytorch-metric-learning`'s NT-Xent on the same pairs.

    It takes the pairs and every anchor's negatives as lists of flat token indices.
    """
    from pytorch_metric_learning.losses import NTXentLoss  # the one peer that is not plain PyTorch

    index = index_anchors(case)
    B, T = case.attention_mask.shape
    device = case.attention_mask.device
    first = T * torch.arange(B, device=device)  # [B]
    anchor = first[:, None] + index.anchor  # [B, A]
    sequence, a, negative = index.is_negative.nonzero(as_tuple=True)
    listed = (
        anchor[index.pair_sequence, index.pair_anchor],
        first[index.pair_sequence] + index.pair_positive,
        anchor[sequence, a],
        first[sequence] + negative,
    )
    nt_xent = NTXentLoss(temperature=TEMPERATURE)

    def loss(hidden_states: Sequence[Tensor]) -> Tensor:
        mi = torch.stack([nt_xent(h.flatten(0, 1), indices_tuple=listed) for h in hidden_states]).mean()
        return MI_WEIGHT * mi + STABILITY_WEIGHT * stability_loss(hidden_states)

    return loss


def inf_cl_carma_loss(case: Case) -> Callable[[Sequence[Tensor]], Tensor]:
    """`gamma * L_MI + eta * L_Stability` of a case of one sequence, its sums over negatives by `inf_cl`.

    That library's kernels sum over every key of a matrix they do not hold; the tokens of the anchor's own word, which
    are no negatives, are taken away again.
    """
    from inf_cl import cal_flash_loss  # for CUDA alone

    index = index_anchors(case)
    valid = case.attention_mask[0].nonzero()[:, 0]  # [V]: valid tokens come first
    anchor = index.anchor[0]  # [A]
    a, own = (~index.is_negative[0, :, : len(valid)]).nonzero(as_tuple=True)  # every anchor with its word's tokens
    label = torch.zeros_like(anchor).scatter_(0, index.pair_anchor, index.pair_positive)  # [A], any of its positives
    head_dim = math.gcd(case.hidden_states[0].shape[-1], 256)

    def mi(h: Tensor) -> Tensor:
        unit = F.normalize(h[0].float(), dim=-1, eps=1e-8)  # [T, D]
        query, key = unit[anchor] / TEMPERATURE, unit[: len(valid)]  # [A, D], [V, D]
        every = cal_flash_loss(query, key, label, head_dim=head_dim) + (query * key[label]).sum(-1)  # [A]
        s = (query[a] * key[own]).sum(-1)
        of_word = torch.zeros_like(every).index_add(0, a, (s - every[a]).exp())  # shares of the sum
        z = every + torch.log1p(-of_word)  # [A]
        positive = (query[index.pair_anchor] * key[index.pair_positive]).sum(-1)  # [P]
        return F.softplus(z[index.pair_anchor] - positive).mean()

    def loss(hidden_states: Sequence[Tensor]) -> Tensor:
        return MI_WEIGHT * torch.stack([mi(h) for h in hidden_states]).mean() + STABILITY_WEIGHT * stability_loss(
            hidden_states
        )

    return loss


def sampled_carma_loss(hidden_states: Sequence[Tensor], spans: Spans) -> Tensor:
    """`gamma * L_MI + eta * L_Stability` with the published semantics."""
    return MI_WEIGHT * sampled_mi_loss(hidden_states, spans) + STABILITY_WEIGHT * stability_loss(hidden_states)


def sampled_mi_loss(
    hidden_states: Sequence[Tensor], spans: Spans, *, temperature: float = TEMPERATURE, num_negatives: int = 5
) -> Tensor:
    """The published MI loss: the Gram matrix of each sequence, with pairs and drawn negatives picked out of it."""
    B, T, _ = hidden_states[0].shape
    device = hidden_states[0].device
    pairs = [
        (i, j, start, end - start)
        for sample in spans
        for start, end in sample[:-1]
        for i in range(start, end)
        for j in range(i + 1, end)
    ]
    i, j, start, length = np.array(pairs).T  # [P]
    uniform = _draw_uniform((len(hidden_states), B, len(pairs), num_negatives))  # [L, B, P, K]
    drawn = (uniform * (T - length)[:, None]).astype(np.int64)
    drawn += (drawn >= start[:, None]) * length[:, None]  # step over the word
    negatives = torch.from_numpy(drawn).to(device)  # [L, B, P, K]
    anchor, positive = (torch.from_numpy(index.copy()).to(device) for index in (i, j))  # [P]
    sequence = torch.arange(B, device=device)[:, None, None]  # [B, 1, 1]

    losses = []
    for h, negative in zip(hidden_states, negatives, strict=True):
        unit = F.normalize(h, dim=-1, eps=1e-8)  # [B, T, D]
        s = unit @ unit.mT / temperature  # [B, T, T]
        e_positive = s[:, anchor, positive].exp()  # [B, P]
        e_negatives = s[sequence, anchor[:, None], negative].exp().sum(-1)  # [B, P]
        losses.append(-(e_positive / (e_positive + e_negatives)).log().mean())
    return torch.stack(losses).mean()


def _draw_uniform(shape: tuple[int, ...]) -> np.ndarray:
    """What as many calls of `random.random()` would give, and `random` left as they would leave it."""
    version, state, gauss = random.getstate()
    generator = np.random.RandomState()
    generator.set_state(("MT19937", state[:-1], state[-1]))
    uniform = generator.random_sample(shape)
    _, key, position, *_ = generator.get_state()
    random.setstate((version, (*key.tolist(), position), gauss))
    return uniform


def stability_loss(hidden_states: Sequence[Tensor], *, eps: float = 1e-8) -> Tensor:
    """As published, the size of each layer taken once."""
    sizes = [h.square().mean() for h in hidden_states]
    changes = [(following - current).square().mean() for current, following in pairwise(hidden_states)]
    terms = [change / (a + b + eps) for change, (a, b) in zip(changes, pairwise(sizes), strict=True)]
    return torch.stack(terms).sum()
