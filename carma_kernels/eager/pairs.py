"""The MI loss of explicit pairs with their own negatives, and its gradient.

The formulas are those of `mi.py`, with the pair's `K` listed tokens as its negatives. Slot 0 of a pair is its anchor,
slot 1 the positive, slots 2 .. K+1 the negatives. Rows are gathered for some pairs at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels.eager.layers import (
    add_repeated_rows,
    compute_dtype,
    gathered_size,
    log_sum_exp_,
    softplus,
)
from carma_kernels.eager.mi import AnchorState


class _Gathered(NamedTuple):
    """The rows of some pairs; a slot without a token repeats the pair's anchor, so that it reads nothing foreign."""

    token: Tensor  # [l*p*(2+K)] among the l*N rows
    rows: Tensor  # [l*p, 2+K, D] in the compute dtype
    scale: Tensor  # [l*p, 2+K] inverse norms
    is_empty: Tensor  # [l*p, K] no negative


class ListedMI:
    """The MI term of some layers after others, for a list of pairs."""

    def __init__(self, anchor: Tensor, positive: Tensor, negatives: Tensor, cosine: bool) -> None:
        """Take the tensors of a `PairIndex`."""
        self._anchor = anchor
        self._positive = positive
        self._negatives = negatives
        self._cosine = cosine
        self._same: tuple[Tensor, Tensor] | None = None

    def layers_at_once(self, layer: Tensor) -> int:
        """As many as there are: the rows gathered for them are no more than their own, fewer pairs at a time."""
        return layer.numel()

    def forward(
        self, rows: Tensor, inverse_norm: Tensor, inverse_temperature: Tensor | float, first: int, _state: AnchorState
    ) -> Tensor:
        """Sums `[l]` of the pairs' losses over each of some layers.

        Args:
            rows: `[l, N, D]`, the layers.
            inverse_norm: `[l, N]`.
            inverse_temperature: a number, or 0-d.
            first: the first layer's place in the MI term, which picks its negatives from `[L, P, K]`.
        """
        losses = []
        for gathered in self._gather(rows, inverse_norm, first):
            gap, _ = self._gap(self._scores(gathered, inverse_temperature), gathered.is_empty)
            losses.append(softplus(gap).view(len(rows), -1).sum(1))
        return sum(losses[1:], losses[0])

    def backward(
        self,
        rows: Tensor,
        inverse_norm: Tensor,
        inverse_temperature: Tensor | float,
        first: int,
        _state: AnchorState,
        grad: Tensor,
        out: Tensor,
        needs_work: bool,
    ) -> Tensor | None:
        """Add the layers' gradients to `out` `[l, N, D]`; return `sum W s`: the temperature's follows."""
        totals = []
        for gathered in self._gather(rows, inverse_norm, first):
            of_pairs = grad[:, None].expand(-1, len(gathered.rows) // len(grad)).reshape(-1, 1)  # [l*p, 1]
            work = self._turn_into_gradient(gathered, inverse_temperature, of_pairs)
            if needs_work:
                totals.append(work.sum())
            add_repeated_rows(out.view(-1, out.shape[-1]), gathered.token, gathered.rows.flatten(0, 1))
        return sum(totals[1:], totals[0]) if totals else None

    def _turn_into_gradient(self, gathered: _Gathered, inverse_temperature: Tensor | float, grad: Tensor) -> Tensor:
        """Overwrite the rows of some pairs with their gradients; return each one's `W s`, summed, `[l*p, 1]`."""
        score = self._scores(gathered, inverse_temperature)  # [l*p, 1+K]
        gap, share = self._gap(score, gathered.is_empty)
        pull = gap.sigmoid_()[:, None] * grad  # [l*p, 1]
        weight = torch.cat([-pull, share.mul_(pull)], dim=1)  # [l*p, 1+K]
        work = score.mul_(weight)
        total = work.sum(1, keepdim=True)  # [l*p, 1]
        anchor, other = gathered.rows[:, :1], gathered.rows[:, 1:]  # [l*p, 1, D], [l*p, 1+K, D]
        weight *= inverse_temperature
        if self._cosine:
            weight *= self._scale_of_scores(gathered)
        anchor_grad = torch.bmm(weight[:, None], other)  # [l*p, 1, D]
        weight = weight[:, :, None]
        if self._cosine:
            square = gathered.scale.square()
            anchor_grad.addcmul_(anchor, (total * square[:, :1])[:, :, None], value=-1)
            other.mul_(work.mul_(square[:, 1:]).neg_()[:, :, None]).addcmul_(weight, anchor)
        else:
            torch.mul(weight, anchor, out=other)
        anchor.copy_(anchor_grad)
        return total

    def _gather(self, rows: Tensor, inverse_norm: Tensor, place: int) -> Iterator[_Gathered]:
        """Of all layers the rows of some pairs at a time."""
        l, N, D = rows.shape  # noqa: E741
        negatives = self._negatives[None] if self._negatives.dim() == 2 else self._negatives[place : place + l]
        P, K = negatives.shape[1:]
        token, is_empty = self._slots(negatives)  # [1 or l, P, 2+K], [1 or l, P, K]
        token = token + torch.arange(0, l * N, N, dtype=token.dtype, device=token.device)[:, None, None]  # [l, P, 2+K]
        flat, scale = rows.reshape(-1, D), inverse_norm.view(-1)
        step = max(1, gathered_size(rows) // (l * (2 + K) * max(1, D)))
        for start in range(0, P, step):
            some = slice(start, start + step)
            of_some = token[:, some].reshape(-1)  # [l*p*(2+K)]
            yield _Gathered(
                of_some,
                flat.index_select(0, of_some).to(compute_dtype(rows.dtype)).view(-1, 2 + K, D),
                scale.index_select(0, of_some).view(-1, 2 + K),
                is_empty[:, some].expand(l, -1, -1).flatten(0, 1),
            )

    def _slots(self, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of every slot of the pairs, and which negatives are none; once where all layers have the same."""
        if self._same is not None:
            return self._same
        anchor, positive = (tokens[:, None].expand(len(negatives), -1, -1) for tokens in (self._anchor, self._positive))
        is_empty = negatives < 0
        slots = torch.cat([anchor, positive, torch.where(is_empty, anchor, negatives)], dim=2), is_empty
        if self._negatives.dim() == 2:
            self._same = slots
        return slots

    def _scores(self, gathered: _Gathered, inverse_temperature: Tensor | float) -> Tensor:
        """`s` of the positive and every negative, `[l*p, 1+K]`."""
        rows = gathered.rows
        score = torch.bmm(rows[:, 1:], rows[:, 0, :, None])[:, :, 0]
        if self._cosine:
            score *= self._scale_of_scores(gathered)
        return score.mul_(inverse_temperature)

    @staticmethod
    def _scale_of_scores(gathered: _Gathered) -> Tensor:
        return gathered.scale[:, :1] * gathered.scale[:, 1:]

    @staticmethod
    def _gap(score: Tensor, is_empty: Tensor) -> tuple[Tensor, Tensor]:
        """`z - s_positive` of each pair `[l*p]`, and each negative's share of its pair's `exp(z)`, `[l*p, K]`."""
        z = log_sum_exp_(score[:, 1:].masked_fill(is_empty, -math.inf))
        share = (score[:, 1:] - z[:, None]).exp_().masked_fill_(is_empty, 0.0)
        return z - score[:, 0], share
