"""The MI loss against all negatives, and its gradient, from tiles of the anchors' rows of the Gram matrix.

With `s_ij` the similarity, `z_i` the log-sum-exp of anchor i's negatives (in the loss, but not in the softmax over the
negatives, with `match_negatives` added) and `sigma_ij = sigmoid(z_i - s_ij)`,

    loss        = sum over pairs of softplus(z_i - s_ij)
    d loss/d s_ij = W_ij = -sigma_ij                           for a positive j of i
                           exp(s_ij - z_i) sum_j' sigma_ij'    for a negative j of i

    d loss/d h_i = sum_j (W_ij + W_ji) r_i r_j h_j / tau - r_i^2 h_i sum_j (W_ij + W_ji) s_ij

(the dot product has r = 1 and no second term). `W` exists a tile at a time: some anchors of every group against all
their keys, at most a quarter as many numbers as a layer has. Layers whose tiles fit into that together are taken
together: with a small batch, most of the time goes into starting operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels.eager.layers import add_rows, inverse_norms
from carma_kernels.spans import NO_WORD, ContrastTable


class AnchorState(NamedTuple):
    """What the backward needs of the forward, for each anchor of some layers, `[l, S, A]`."""

    log_negatives: Tensor  # z_i
    pull: Tensor  # sum of sigma_ij over the anchor's positives


class _Tile(NamedTuple):
    """Some anchors of every group against all their keys; every token as its flat index."""

    anchors: slice
    anchor_slot: Tensor  # [S, a, 1] among the group's keys
    anchor_token: Tensor  # [S*a]
    is_positive: Tensor  # [S, a, V]
    is_negative: Tensor  # [S, a, V]


class ContrastiveMI:
    """The MI term of some layers after others, for one contrast table."""

    def __init__(self, table: ContrastTable, cosine: bool, match_negatives: float | None) -> None:
        """Take a table; the masks are made when they are first needed."""
        self._table = table
        self._cosine = cosine
        self._match_negatives = match_negatives
        self._whole: list[_Tile] = []

    def layers_at_once(self, size: int) -> int:
        """How many layers of so many numbers to take together: their tiles no larger than a single layer's may be."""
        S, V = self._table.key_token.shape
        A = self._table.anchor_slot.shape[1]
        return max(1, _tile_size(size) // max(1, S * A * V))

    def forward(
        self, rows: Sequence[Tensor], norm: Tensor, inverse_temperature: Tensor | float, _first: int, state: AnchorState
    ) -> Tensor:
        """Sums `[l]` of the pairs' losses over each of some layers, whichever they are.

        Args:
            rows: l times `[N, D]`, the layers; only rows of groups that have an anchor are read.
            norm: `[l, N]`.
            inverse_temperature: a number, or 0-d.
            state: overwritten with what `backward` needs.
        """
        keys, key_scale = self._keys(rows, norm)
        loss = norm.new_zeros(len(rows))
        for tile in self._tiles(rows[0]):
            anchors, anchor_scale = self._anchors(tile, rows, norm)
            score = self._scores(anchors, keys, anchor_scale, key_scale, inverse_temperature)  # [l, S, a, V]
            z = torch.where(tile.is_negative, score, -math.inf).logsumexp(-1)  # [l, S, a]
            gap = torch.where(tile.is_positive, self._matched(z, tile)[..., None] - score, -math.inf)  # [l, S, a, V]
            loss += torch.logaddexp(gap, gap.new_zeros(())).sum((1, 2, 3))
            state.log_negatives[:, :, tile.anchors] = z
            state.pull[:, :, tile.anchors] = gap.sigmoid_().sum(-1)
        return loss

    def backward(
        self,
        rows: Sequence[Tensor],
        norm: Tensor,
        inverse_temperature: Tensor | float,
        _first: int,
        state: AnchorState,
        grad: Tensor,
        out: Sequence[Tensor],
    ) -> Tensor:
        """Add the layers' gradients to `out`, l times `[N, D]`; return `sum W_ij s_ij`: the temperature's follows.

        Args:
            grad: `[l]`, the gradient of the loss with respect to `forward`'s sums.
        """
        keys, key_scale = self._keys(rows, norm)  # l times [S, V, D], [l, S, 1, V]
        S, V, D = keys[0].shape
        in_place = self._table.covers_batch
        key_grads = [of_layer.view(S, V, D) if in_place else torch.zeros_like(keys[0]) for of_layer in out]
        key_projection = norm.new_zeros(len(rows), S, V)  # sum over anchors i of W_ij s_ij
        total = norm.new_zeros(())
        for tile in self._tiles(rows[0]):
            anchors, anchor_scale = self._anchors(tile, rows, norm)
            score = self._scores(anchors, keys, anchor_scale, key_scale, inverse_temperature)
            z = state.log_negatives[:, :, tile.anchors]  # [l, S, a]
            # similarities are subtracted from each other before anything else: dot products may be in the thousands
            weight = (score - z[..., None]).exp_().masked_fill_(~tile.is_negative, 0.0)  # [l, S, a, V]
            weight *= state.pull[:, :, tile.anchors, None]
            weight -= torch.where(tile.is_positive, self._matched(z, tile)[..., None] - score, -math.inf).sigmoid_()
            weight *= grad[:, None, None, None]
            work = score.mul_(weight)  # W_ij s_ij
            anchor_projection = work.sum(-1, keepdim=True)  # [l, S, a, 1]
            total += anchor_projection.sum()
            key_projection += work.sum(2)
            weight *= inverse_temperature
            if self._cosine:
                weight *= anchor_scale
                weight *= key_scale
                # the second term, at the anchor's own slot, whose weight is 0: half for either of its two products
                slot = tile.anchor_slot.expand(len(rows), -1, -1, -1)
                weight.scatter_(-1, slot, anchor_projection * anchor_scale.square() / -2)
            for key, anchor, of_layer, key_grad, to in zip(keys, anchors, weight, key_grads, out, strict=True):
                key_grad.baddbmm_(of_layer.transpose(1, 2), anchor)
                add_rows(to, tile.anchor_token, torch.bmm(of_layer, key).view(-1, D))
        if self._cosine:
            own = (key_projection * key_scale[:, :, 0].square())[..., None]  # [l, S, V, 1]
            for key, of_layer, key_grad in zip(keys, own, key_grads, strict=True):
                key_grad.addcmul_(key, of_layer, value=-1)
        if not in_place:
            for key_grad, to in zip(key_grads, out, strict=True):
                add_rows(to, self._table.key_token.view(-1), key_grad.view(-1, D))
        return total

    def _keys(self, rows: Sequence[Tensor], norm: Tensor) -> tuple[list[Tensor], Tensor]:
        """The keys, for each layer `[S, V, D]`, and their inverse norms `[l, S, 1, V]`."""
        S, V = self._table.key_token.shape
        if self._table.covers_batch:
            return [of_layer.view(S, V, -1) for of_layer in rows], inverse_norms(norm).view(-1, S, 1, V)
        token = self._table.key_token.view(-1)
        scale = inverse_norms(norm.index_select(1, token))
        return [of_layer.index_select(0, token).view(S, V, -1) for of_layer in rows], scale.view(-1, S, 1, V)

    def _anchors(self, tile: _Tile, rows: Sequence[Tensor], norm: Tensor) -> tuple[list[Tensor], Tensor]:
        """The tile's anchors, for each layer `[S, a, D]`, and their inverse norms `[l, S, a, 1]`."""
        S, a, _ = tile.is_negative.shape
        token = tile.anchor_token
        scale = inverse_norms(norm.index_select(1, token))
        return [of_layer.index_select(0, token).view(S, a, -1) for of_layer in rows], scale.view(-1, S, a, 1)

    def _scores(
        self,
        anchors: Sequence[Tensor],
        keys: Sequence[Tensor],
        anchor_scale: Tensor,
        key_scale: Tensor,
        inverse_temperature: Tensor | float,
    ) -> Tensor:
        """`s_ij` `[l, S, a, V]`."""
        score = anchor_scale.new_empty(*anchor_scale.shape[:3], key_scale.shape[-1])
        for anchor, key, of_layer in zip(anchors, keys, score, strict=True):
            torch.bmm(anchor, key.transpose(1, 2), out=of_layer)
        score *= anchor_scale * inverse_temperature if self._cosine else inverse_temperature
        return score.mul_(key_scale) if self._cosine else score

    def _matched(self, z: Tensor, tile: _Tile) -> Tensor:
        """`z_i + log(k / number of negatives)` if asked for; without negatives z stays the logarithm of nothing."""
        if self._match_negatives is None:
            return z
        return z + math.log(self._match_negatives) - tile.is_negative.sum(-1, dtype=z.dtype).clamp_min(1).log()

    def _tiles(self, rows: Tensor) -> Iterator[_Tile]:
        """The anchors in pieces; if one holds all, it serves all layers."""
        S, V = self._table.key_token.shape
        A = self._table.anchor_slot.shape[1]
        step = max(1, _tile_size(rows.numel()) // max(1, S * V))
        if step >= A:
            self._whole = self._whole or [self._tile(slice(0, A))]
            yield from self._whole
        else:
            for start in range(0, A, step):
                yield self._tile(slice(start, min(start + step, A)))

    def _tile(self, anchors: slice) -> _Tile:
        table = self._table
        slot = table.anchor_slot[:, anchors, None].long()  # [S, a, 1]
        key_word = table.key_word[:, None]  # [S, 1, V]
        same_word = table.anchor_word[:, anchors, None] == key_word  # [S, a, V]
        later = torch.arange(key_word.shape[-1], device=slot.device) > slot
        token = table.key_token.gather(1, slot[:, :, 0])  # [S, a]
        return _Tile(anchors, slot, token.view(-1), same_word & later, ~same_word & (key_word != NO_WORD))


def _tile_size(layer_size: int) -> int:
    """Numbers in a tile at most: a quarter of the layer's."""
    return layer_size // 4
