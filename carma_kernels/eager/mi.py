"""The MI loss of one layer against all negatives, and its gradient, from tiles of the anchors' rows of the Gram matrix.

With `s_ij` the similarity, `z_i` the log-sum-exp of anchor i's negatives (in the loss, but not in the softmax over the
negatives, with `match_negatives` added) and `sigma_ij = sigmoid(z_i - s_ij)`,

    loss        = sum over pairs of softplus(z_i - s_ij)
    d loss/d s_ij = W_ij = -sigma_ij                           for a positive j of i
                           exp(s_ij - z_i) sum_j' sigma_ij'    for a negative j of i

    d loss/d h_i = sum_j (W_ij + W_ji) r_i r_j h_j / tau - r_i^2 h_i sum_j (W_ij + W_ji) s_ij

(the dot product has r = 1 and no second term). `W` exists a tile at a time: some anchors of every group against all
their keys, at most a quarter as many numbers as the layer has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels.eager.layers import add_rows, inverse_norms
from carma_kernels.spans import NO_WORD, ContrastTable


class AnchorState(NamedTuple):
    """What the backward needs of the forward, for each anchor `[S, A]`."""

    log_negatives: Tensor  # z_i
    pull: Tensor  # sum of sigma_ij over the anchor's positives


class _Tile(NamedTuple):
    """Some anchors of every group against all their keys; every token as its flat index."""

    anchors: slice
    anchor_token: Tensor  # [S*a]
    is_positive: Tensor  # [S, a, V]
    is_negative: Tensor  # [S, a, V]


class ContrastiveMI:
    """The MI term of one layer after the other, for one contrast table."""

    def __init__(self, table: ContrastTable, cosine: bool, match_negatives: float | None) -> None:
        """Take a table; the masks are made when they are first needed."""
        """Take a table; the masks are made when they are first needed."""
        self._table = table
        self._cosine = cosine
        self._match_negatives = match_negatives
        self._whole: list[_Tile] = []

    def forward(
        self, rows: Tensor, norm: Tensor, inverse_temperature: Tensor | float, _place: int, state: AnchorState
    ) -> Tensor:
        """Sum of the pairs' losses over one layer, whichever of them it is.

        Args:
            rows: `[N, D]`, the layer; only rows of groups that have an anchor are read.
            norm: `[N]`.
            inverse_temperature: a number, or 0-d.
            state: overwritten with what `backward` needs.
        """
        keys, key_scale = self._keys(rows, norm)
        loss = rows.new_zeros(())
        for tile in self._tiles(rows):
            anchors, anchor_scale = self._anchors(tile, rows, norm)
            score = self._scores(anchors, keys, anchor_scale, key_scale, inverse_temperature)  # [S, a, V]
            z = torch.where(tile.is_negative, score, -math.inf).logsumexp(-1)  # [S, a]
            gap = torch.where(tile.is_positive, self._matched(z, tile)[:, :, None] - score, -math.inf)  # [S, a, V]
            loss += torch.logaddexp(gap, gap.new_zeros(())).sum()
            state.log_negatives[:, tile.anchors] = z
            state.pull[:, tile.anchors] = gap.sigmoid_().sum(-1)
        return loss

    def backward(
        self,
        rows: Tensor,
        norm: Tensor,
        inverse_temperature: Tensor | float,
        _place: int,
        state: AnchorState,
        grad: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Add one layer's gradient to `out` `[N, D]`; return `sum_ij W_ij s_ij`, from which the temperature's follows.

        Args:
            grad: 0-d, the gradient of the loss with respect to `forward`'s sum.
        """
        keys, key_scale = self._keys(rows, norm)  # [S, V, D], [S, 1, V]
        S, V, D = keys.shape
        in_place = self._table.covers_batch
        key_grad = out.view(S, V, D) if in_place else torch.zeros_like(keys)
        key_projection = rows.new_zeros(S, V)  # sum over anchors i of W_ij s_ij
        total = rows.new_zeros(())
        for tile in self._tiles(rows):
            anchors, anchor_scale = self._anchors(tile, rows, norm)
            score = self._scores(anchors, keys, anchor_scale, key_scale, inverse_temperature)
            z = state.log_negatives[:, tile.anchors]  # [S, a]
            # similarities are subtracted from each other before anything else: dot products may be in the thousands
            weight = (score - z[:, :, None]).exp_().masked_fill_(~tile.is_negative, 0.0)  # [S, a, V]
            weight *= state.pull[:, tile.anchors, None]
            weight -= torch.where(tile.is_positive, self._matched(z, tile)[:, :, None] - score, -math.inf).sigmoid_()
            weight *= grad
            work = score.mul_(weight)  # W_ij s_ij
            anchor_projection = work.sum(-1)  # [S, a]
            total += anchor_projection.sum()
            key_projection += work.sum(1)
            weight *= inverse_temperature
            if self._cosine:
                weight *= anchor_scale
                weight *= key_scale
            key_grad.baddbmm_(weight.transpose(1, 2), anchors)
            anchor_grad = torch.bmm(weight, keys)  # [S, a, D]
            if self._cosine:
                anchor_grad.addcmul_(anchors, (anchor_projection[:, :, None] * anchor_scale.square()), value=-1)
            add_rows(out, tile.anchor_token, anchor_grad.view(-1, D))
        if self._cosine:
            key_grad.addcmul_(keys, (key_projection[:, None] * key_scale.square()).transpose(1, 2), value=-1)
        if not in_place:
            add_rows(out, self._table.key_token.view(-1), key_grad.view(-1, D))
        return total

    def _keys(self, rows: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The keys `[S, V, D]` and their inverse norms `[S, 1, V]`."""
        S, V = self._table.key_token.shape
        if self._table.covers_batch:
            return rows.view(S, V, -1), inverse_norms(norm).view(S, 1, V)
        token = self._table.key_token.view(-1)
        return rows.index_select(0, token).view(S, V, -1), inverse_norms(norm.index_select(0, token)).view(S, 1, V)

    def _anchors(self, tile: _Tile, rows: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """The tile's anchors `[S, a, D]` and their inverse norms `[S, a, 1]`."""
        S = tile.is_negative.shape[0]
        token = tile.anchor_token
        return (
            rows.index_select(0, token).view(S, -1, rows.shape[-1]),
            inverse_norms(norm.index_select(0, token)).view(S, -1, 1),
        )

    def _scores(
        self,
        anchors: Tensor,
        keys: Tensor,
        anchor_scale: Tensor,
        key_scale: Tensor,
        inverse_temperature: Tensor | float,
    ) -> Tensor:
        """`s_ij` `[S, a, V]`."""
        score = torch.bmm(anchors, keys.transpose(1, 2))
        score *= anchor_scale * inverse_temperature if self._cosine else inverse_temperature
        return score.mul_(key_scale) if self._cosine else score

    def _matched(self, z: Tensor, tile: _Tile) -> Tensor:
        """`z_i + log(k / number of negatives)` if asked for; without negatives z stays the logarithm of nothing."""
        if self._match_negatives is None:
            return z
        return z + math.log(self._match_negatives) - tile.is_negative.sum(-1, dtype=z.dtype).clamp_min(1).log()

    def _tiles(self, rows: Tensor) -> Iterator[_Tile]:
        """The anchors in pieces of at most a quarter of the layer's numbers; if one holds all, it serves all layers."""
        S, V = self._table.key_token.shape
        A = self._table.anchor_slot.shape[1]
        step = max(1, rows.numel() // (4 * max(1, S * V)))
        if step >= A:
            self._whole = self._whole or [self._tile(slice(0, A))]
            yield from self._whole
        else:
            for start in range(0, A, step):
                yield self._tile(slice(start, min(start + step, A)))

    def _tile(self, anchors: slice) -> _Tile:
        table = self._table
        slot = table.anchor_slot[:, anchors, None]  # [S, a, 1]
        key_word = table.key_word[:, None]  # [S, 1, V]
        same_word = table.anchor_word[:, anchors, None] == key_word  # [S, a, V]
        later = torch.arange(key_word.shape[-1], device=slot.device) > slot
        token = table.key_token.gather(1, slot[:, :, 0].long())  # [S, a]
        return _Tile(anchors, token.view(-1), same_word & later, ~same_word & (key_word != NO_WORD))
