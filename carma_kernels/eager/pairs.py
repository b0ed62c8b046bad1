"""The MI loss for explicit pairs with their own negatives, and its gradient.

The formulas are those of `mi.py`, with the pair's `K` listed tokens as its negatives: slot 0 of a pair is the positive,
slots 1 .. K its negatives. Rows are gathered for some pairs at a time, at most as many numbers as the layer has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels.eager.layers import add_rows, inverse_norms
from carma_kernels.eager.mi import AnchorState


class _Gathered(NamedTuple):
    """The rows of some pairs; a slot without a token repeats the pair's anchor, so that it reads nothing foreign."""

    anchor_token: Tensor  # [p]
    other_token: Tensor  # [p*(1+K)]
    is_token: Tensor  # [p, 1+K]
    anchor: Tensor  # [p, D]
    other: Tensor  # [p, 1+K, D]
    anchor_scale: Tensor  # [p, 1]
    other_scale: Tensor  # [p, 1+K]


class ListedMI:
    """The MI term of some layers after others, for a list of pairs."""

    def __init__(self, anchor: Tensor, positive: Tensor, negatives: Tensor, cosine: bool) -> None:
        """Take the tensors of a `PairIndex`."""
        self._anchor = anchor
        self._positive = positive
        self._negatives = negatives
        self._cosine = cosine

    def layers_at_once(self, _size: int) -> int:
        """One: the rows gathered for it are as many as it has."""
        return 1

    def forward(
        self, rows: Sequence[Tensor], norm: Tensor, inverse_temperature: Tensor | float, first: int, _state: AnchorState
    ) -> Tensor:
        """Sums `[l]` of the pairs' losses over each of some layers.

        Args:
            rows: l times `[N, D]`, the layers.
            norm: `[l, N]`.
            inverse_temperature: a number, or 0-d.
            first: the first layer's place in the MI term, which picks its negatives from `[L, P, K]`.
        """
        loss = norm.new_zeros(len(rows))
        for at, of_layer in enumerate(rows):
            for gathered in self._gather(of_layer, norm[at], first + at):
                gap = self._gap(self._scores(gathered, inverse_temperature), gathered.is_token)[0]
                loss[at] += torch.logaddexp(gap, gap.new_zeros(())).sum()
        return loss

    def backward(
        self,
        rows: Sequence[Tensor],
        norm: Tensor,
        inverse_temperature: Tensor | float,
        first: int,
        _state: AnchorState,
        grad: Tensor,
        out: Sequence[Tensor],
    ) -> Tensor:
        """Add the layers' gradients to `out`, l times `[N, D]`; return `sum W s`: the temperature's follows."""
        total = norm.new_zeros(())
        for at, of_layer in enumerate(rows):
            for gathered in self._gather(of_layer, norm[at], first + at):
                total += self._add_gradient(gathered, inverse_temperature, grad[at], out[at])
        return total

    def _add_gradient(
        self, gathered: _Gathered, inverse_temperature: Tensor | float, grad: Tensor, out: Tensor
    ) -> Tensor:
        """Of some pairs of a layer; their `sum W s`."""
        score = self._scores(gathered, inverse_temperature)  # [p, 1+K]
        gap, share = self._gap(score, gathered.is_token)
        pull = gap.sigmoid()[:, None] * grad  # [p, 1]
        weight = torch.cat([-pull, share * pull], dim=1)  # [p, 1+K]
        work = weight * score
        weight *= inverse_temperature
        if self._cosine:
            weight *= gathered.anchor_scale * gathered.other_scale
        anchor_grad = torch.bmm(weight[:, None], gathered.other)[:, 0]  # [p, D]
        other_grad = weight[:, :, None] * gathered.anchor[:, None]  # [p, 1+K, D]
        if self._cosine:
            anchor_grad.addcmul_(gathered.anchor, work.sum(1, keepdim=True) * gathered.anchor_scale.square(), value=-1)
            other_grad.addcmul_(gathered.other, (work * gathered.other_scale.square())[:, :, None], value=-1)
        add_rows(out, gathered.anchor_token, anchor_grad)
        add_rows(out, gathered.other_token, other_grad.view(-1, out.shape[-1]))
        return work.sum()

    def _gather(self, rows: Tensor, norm: Tensor, place: int) -> Iterator[_Gathered]:
        negatives = self._negatives
        if negatives.dim() == 3:
            negatives = negatives[place]
        scale = inverse_norms(norm)
        P, K = negatives.shape
        step = max(1, rows.shape[0] // (2 + K))
        for start in range(0, P, step):
            some = slice(start, start + step)
            anchor_token = self._anchor[some]
            token = torch.cat([self._positive[some, None], negatives[some]], dim=1)  # [p, 1+K]
            is_token = token >= 0
            other_token = torch.where(is_token, token, anchor_token[:, None]).view(-1)
            yield _Gathered(
                anchor_token,
                other_token,
                is_token,
                rows.index_select(0, anchor_token),
                rows.index_select(0, other_token).view(*token.shape, -1),
                scale.index_select(0, anchor_token)[:, None],
                scale.index_select(0, other_token).view(token.shape),
            )

    def _scores(self, gathered: _Gathered, inverse_temperature: Tensor | float) -> Tensor:
        """`s` of every slot, `[p, 1+K]`."""
        score = torch.bmm(gathered.other, gathered.anchor[:, :, None])[:, :, 0]
        if self._cosine:
            score *= gathered.anchor_scale * gathered.other_scale
        return score.mul_(inverse_temperature)

    @staticmethod
    def _gap(score: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
        """`z - s_positive` of each pair `[p]`, and each negative's share of its pair's `exp(z)`, `[p, K]`."""
        negative = torch.where(is_token[:, 1:], score[:, 1:], -math.inf)
        z = negative.logsumexp(1, keepdim=True)
        share = torch.where(is_token[:, 1:], torch.exp(negative - z), 0.0)
        return z[:, 0] - score[:, 0], share
