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
    joined,
    log_sum_exp_,
    softplus,
)


class _Gathered(NamedTuple):
    """The rows of some pairs; a slot without a token repeats the pair's anchor, so that it reads nothing foreign."""

    token: Tensor  # [l*p*(2+K)] among the l*N rows
    rows: Tensor  # [l*p, 2+K, D] in the compute dtype
    scale: Tensor  # [l*p, 2+K] inverse norms
    is_empty: Tensor  # [l*p, K] no negative


class ListedMI:
    """The MI term, for a list of pairs."""

    def __init__(self, anchor: Tensor, positive: Tensor, negatives: Tensor, cosine: bool) -> None:
        """Take the tensors of a `PairIndex`."""
        self.cosine = cosine
        self._anchor, self._positive, self._negatives = anchor, positive, negatives
        self._same: tuple[Tensor, Tensor] | None = None

    def run(
        self, _layer: Tensor, places: slice, inverse_temperature: Tensor | float, _kept: Tensor | None
    ) -> ListedRun:
        """Of the layers at some places in the term, which pick their negatives from `[L, P, K]`."""
        return ListedRun(self, places.start, inverse_temperature)

    def slots(self, places: slice) -> tuple[Tensor, Tensor]:
        """The tokens of every slot of the pairs `[1 or l, P, 2+K]`, and which negatives are none `[1 or l, P, K]`.

        Worked out once where all layers have the same.
        """
        if self._same is not None:
            return self._same
        negatives = self._negatives[None] if self._negatives.dim() == 2 else self._negatives[places]
        anchor, positive = (tokens[:, None].expand(len(negatives), -1, -1) for tokens in (self._anchor, self._positive))
        is_empty = negatives < 0
        slots = torch.cat([anchor, positive, torch.where(is_empty, anchor, negatives)], dim=2), is_empty
        if self._negatives.dim() == 2:
            self._same = slots
        return slots


class ListedRun:
    """The term of some layers after others: `add` their rows part by part, then ask for the losses or the gradients."""

    covers = False
    """Not every row has a gradient."""

    def __init__(self, term: ListedMI, first: int, inverse_temperature: Tensor | float) -> None:
        """Take what `ListedMI.run` knows; `first` is the place of the run's first layer in the term."""
        self._term, self._first, self._inverse_temperature = term, first, inverse_temperature
        self._parts: list[tuple[slice, Tensor]] = []

    def add(self, place: slice, rows: Tensor) -> None:
        """Take the layers at `place` among the run's, `[m, N, D]`."""
        self._parts.append((place, rows))

    def forward(self, inverse_norm: Tensor) -> tuple[Tensor, Tensor]:
        """No z `[l, 0, 0]`, and sums `[l]` of the pairs' losses over each layer, whose inverse norms are `[l, N]`."""
        sums = []
        for place, rows in self._parts:
            losses = []
            for gathered in self._gather(place, rows, inverse_norm[place]):
                gap, _ = self._gap(self._scores(gathered), gathered.is_empty)
                losses.append(softplus(gap).view(len(rows), -1).sum(1))
            sums.append(sum(losses[1:], losses[0]))
        return inverse_norm.new_empty(len(inverse_norm), 0, 0), joined(sums)

    def weigh(
        self, inverse_norm: Tensor, _log_negatives: Tensor, grad: Tensor, needs_work: bool, _own: Tensor | None
    ) -> None:
        """Make ready for the gradients; see `ContrastRun`."""
        self._inverse_norm, self._grad = inverse_norm, grad
        self._works: list[Tensor] | None = [] if needs_work else None

    @property
    def work(self) -> Tensor | None:
        """`sum W s`, once all gradients are written: the temperature's follows."""
        return sum(self._works[1:], self._works[0]) if self._works else None

    def add_gradient(self, place: slice, rows: Tensor, out: Tensor) -> None:
        """Add the gradients of the layers at `place` among the run's to `out`; both `[m, N, D]`."""
        grad = self._grad[place, None]  # [m, 1]
        for gathered in self._gather(place, rows, self._inverse_norm[place]):
            of_pairs = grad.expand(-1, len(gathered.rows) // len(grad)).reshape(-1, 1)  # [m*p, 1]
            work = self._turn_into_gradient(gathered, of_pairs)
            if self._works is not None:
                self._works.append(work.sum())
            add_repeated_rows(out.view(-1, out.shape[-1]), gathered.token, gathered.rows.flatten(0, 1))

    def _turn_into_gradient(self, gathered: _Gathered, grad: Tensor) -> Tensor:
        """Overwrite the rows of some pairs with their gradients; return each one's `W s`, summed, `[l*p, 1]`."""
        score = self._scores(gathered)  # [l*p, 1+K]
        gap, share = self._gap(score, gathered.is_empty)
        pull = gap.sigmoid_()[:, None] * grad  # [l*p, 1]
        weight = torch.cat([-pull, share.mul_(pull)], dim=1)  # [l*p, 1+K]
        work = score.mul_(weight)
        total = work.sum(1, keepdim=True)  # [l*p, 1]
        anchor, other = gathered.rows[:, :1], gathered.rows[:, 1:]  # [l*p, 1, D], [l*p, 1+K, D]
        weight *= self._inverse_temperature
        if self._term.cosine:
            weight *= self._scale_of_scores(gathered)
        anchor_grad = torch.bmm(weight[:, None], other)  # [l*p, 1, D]
        weight = weight[:, :, None]
        if self._term.cosine:
            square = gathered.scale.square()
            anchor_grad.addcmul_(anchor, (total * square[:, :1])[:, :, None], value=-1)
            other.mul_(work.mul_(square[:, 1:]).neg_()[:, :, None]).addcmul_(weight, anchor)
        else:
            torch.mul(weight, anchor, out=other)
        anchor.copy_(anchor_grad)
        return total

    def _gather(self, place: slice, rows: Tensor, inverse_norm: Tensor) -> Iterator[_Gathered]:
        """Of all the layers at `place` the rows of some pairs at a time."""
        l, N, D = rows.shape  # noqa: E741
        token, is_empty = self._term.slots(slice(self._first + place.start, self._first + place.stop))
        P, slots = token.shape[1:]
        token = token + torch.arange(0, l * N, N, dtype=token.dtype, device=token.device)[:, None, None]  # [l, P, 2+K]
        flat, scale = rows.reshape(-1, D), inverse_norm.view(-1)
        step = max(1, gathered_size(rows) // (l * slots * max(1, D)))
        for start in range(0, P, step):
            some = slice(start, start + step)
            of_some = token[:, some].reshape(-1)  # [l*p*(2+K)]
            yield _Gathered(
                of_some,
                flat.index_select(0, of_some).to(compute_dtype(rows.dtype)).view(-1, slots, D),
                scale.index_select(0, of_some).view(-1, slots),
                is_empty[:, some].expand(l, -1, -1).flatten(0, 1),
            )

    def _scores(self, gathered: _Gathered) -> Tensor:
        """`s` of the positive and every negative, `[l*p, 1+K]`."""
        rows = gathered.rows
        score = torch.bmm(rows[:, 1:], rows[:, 0, :, None])[:, :, 0]
        if self._term.cosine:
            score *= self._scale_of_scores(gathered)
        return score.mul_(self._inverse_temperature)

    @staticmethod
    def _scale_of_scores(gathered: _Gathered) -> Tensor:
        return gathered.scale[:, :1] * gathered.scale[:, 1:]

    @staticmethod
    def _gap(score: Tensor, is_empty: Tensor) -> tuple[Tensor, Tensor]:
        """`z - s_positive` of each pair `[l*p]`, and each negative's share of its pair's `exp(z)`, `[l*p, K]`."""
        z = log_sum_exp_(score[:, 1:].masked_fill(is_empty, -math.inf))
        share = (score[:, 1:] - z[:, None]).exp_().masked_fill_(is_empty, 0.0)
        return z - score[:, 0], share
