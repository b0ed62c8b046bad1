"""The MI loss against all negatives, and its gradient, from tiles of the anchors' rows of the Gram matrix.

With `s_ij` the similarity, `z_i` the log-sum-exp of anchor i's negatives (in the loss, but not in the softmax over the
negatives, with `match_negatives` added) and `sigma_ij = sigmoid(z_i - s_ij)`,

    loss        = sum over pairs of softplus(z_i - s_ij)
    d loss/d s_ij = W_ij = -sigma_ij                           for a positive j of i
                           exp(s_ij - z_i) sum_j' sigma_ij'    for a negative j of i

    d loss/d h_i = sum_j (W_ij + W_ji) r_i r_j h_j / tau - r_i^2 h_i sum_j (W_ij + W_ji) s_ij

(the dot product has r = 1 and no second term). `W` exists a tile at a time: some anchors of every group against all
their keys, of one layer, or of some layers at once whose tiles are small. The positives of an anchor are the slots
right after its own, so that they are a narrow band of the tile, as wide as the longest word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from carma_kernels.eager.layers import (
    add_products,
    compute_dtype,
    log_sum_exp_,
    products,
    put_sums,
    softplus,
    summands,
    tile_size,
)
from carma_kernels.spans import NO_WORD, ContrastTable


class AnchorState(NamedTuple):
    """What the backward needs of the forward, for each anchor of some layers, `[l, S, A]`."""

    log_negatives: Tensor  # z_i
    pull: Tensor  # sum of sigma_ij over the anchor's positives


class _Tile(NamedTuple):
    """Some anchors of every group against all their keys."""

    anchors: slice
    anchor_key: Tensor  # [S*a] the anchor among the S*V keys
    anchor_slot: Tensor  # [S, a, 1] among the group's keys
    is_none: Tensor  # [S, a, V] no negative: of the anchor's word, or no key
    positive_slot: Tensor  # [S, a, M] the anchor's own where it has fewer positives
    no_positive: Tensor  # [S, a, M]
    matched: Tensor | None  # [S, a, 1] what match_negatives adds to z


class ContrastiveMI:
    """The MI term of some layers after others, for one contrast table."""

    def __init__(self, table: ContrastTable, cosine: bool, match_negatives: float | None) -> None:
        """Take a table; what is compared with what is worked out when it is first needed."""
        self._table = table
        self._cosine = cosine
        self._match_negatives = match_negatives
        self._whole: _Tile | None = None
        self._key_rows: Tensor | None = None

    def layers_at_once(self, layer: Tensor) -> int:
        """How many layers like this one `[B, T, D]` to take together: their tiles no larger than one may be."""
        S, V = self._table.key_token.shape
        A = self._table.anchor_slot.shape[1]
        return max(1, tile_size(layer.numel(), layer.device) // max(1, S * A * V))

    def forward(
        self, rows: Tensor, inverse_norm: Tensor, inverse_temperature: Tensor | float, _first: int, state: AnchorState
    ) -> Tensor:
        """Sums `[l]` of the pairs' losses over each of some layers, whichever they are.

        Args:
            rows: `[l, N, D]`, the layers; only rows of groups that have an anchor are read.
            inverse_norm: `[l, N]`.
            inverse_temperature: a number, or 0-d.
            state: overwritten with what `backward` needs.
        """
        keys, key_scale = self._keys(rows, inverse_norm)
        losses = []
        for tile in self._tiles(rows):
            anchors, anchor_scale = self._anchors(tile, keys, key_scale)
            score = self._scores(anchors, keys, anchor_scale, key_scale, inverse_temperature)  # [l, S, a, V]
            positive = self._positives(score, tile)
            z = log_sum_exp_(score.masked_fill_(tile.is_none, -math.inf), out=state.log_negatives[:, :, tile.anchors])
            gap = self._gap(z, positive, tile)  # [l, S, a, M]
            losses.append(softplus(gap).sum((1, 2, 3)))
            torch.sum(gap.sigmoid_(), -1, out=state.pull[:, :, tile.anchors])
        return sum(losses[1:], losses[0])

    def backward(
        self,
        rows: Tensor,
        inverse_norm: Tensor,
        inverse_temperature: Tensor | float,
        _first: int,
        state: AnchorState,
        grad: Tensor,
        out: Tensor,
        needs_work: bool,
    ) -> Tensor | None:
        """Add the layers' gradients to `out` `[l, N, D]`; return `sum W_ij s_ij`: the temperature's follows.

        Args:
            rows, inverse_norm, inverse_temperature, state: as in `forward`.
            grad: `[l]`, the gradient of the loss with respect to `forward`'s sums.
            out: in the compute dtype.
            needs_work: return it.
        """
        keys, key_scale = self._keys(rows, inverse_norm)  # [l, S*V, D], [l, S, 1, V]
        l, S, _, V = key_scale.shape  # noqa: E741
        # the weights are fp32, and so is all that they are multiplied with
        wide_keys = keys.to(out.dtype)
        key_token = None if self._table.covers_batch else self._table.key_token.view(-1).long()
        key_grad = out if key_token is None else summands(out, key_token)  # [l, S*V, D]
        key_projection: Tensor | None = None  # [l, S, V], sum over anchors i of W_ij s_ij
        totals = []
        grad = grad[:, None, None, None]
        for tile in self._tiles(rows):
            anchors, anchor_scale = self._anchors(tile, keys, key_scale)
            score = self._scores(anchors, keys, anchor_scale, key_scale, inverse_temperature)
            z = state.log_negatives[:, :, tile.anchors]  # [l, S, a]
            pull = state.pull[:, :, tile.anchors, None] * grad  # [l, S, a, 1]
            # similarities are subtracted from each other before anything else: dot products may be in the thousands
            push = self._gap(z, self._positives(score, tile), tile).sigmoid_().mul_(-grad)  # [l, S, a, M]
            weight = (score - z[..., None]).exp_().masked_fill_(tile.is_none, 0.0)  # [l, S, a, V]
            weight *= pull
            weight.scatter_(-1, tile.positive_slot.expand(push.shape), push)  # 0 at the anchor's own slot
            work = score.mul_(weight)  # W_ij s_ij
            anchor_projection = work.sum(-1, keepdim=True)  # [l, S, a, 1]
            if needs_work:
                totals.append(anchor_projection.sum())
            projection = work.sum(2)
            key_projection = projection if key_projection is None else key_projection + projection
            if self._cosine:
                weight *= anchor_scale * inverse_temperature
                weight *= key_scale
                # the second term, at the anchor's own slot, whose weight is 0: half for either of its two products
                own = anchor_projection.mul_(anchor_scale.square_()).mul_(-0.5)
                weight.scatter_(-1, tile.anchor_slot.expand(own.shape), own)
            else:
                weight *= inverse_temperature
            of_groups = weight.flatten(0, 1)  # [l*S, a, V]
            anchors = anchors.to(out.dtype)
            _groups(key_grad, S).baddbmm_(of_groups.transpose(1, 2), _groups(anchors, S))
            del anchors  # for the room that their gradients take
            add_products(key_grad, tile.anchor_key, of_groups, _groups(wide_keys, S))
        if self._cosine:
            assert key_projection is not None
            own = (key_projection * key_scale[:, :, 0].square()).view(l, S * V, 1)
            key_grad.addcmul_(wide_keys, own, value=-1)
        if key_token is not None:
            put_sums(out, key_token, key_grad)
        return sum(totals[1:], totals[0]) if totals else None

    def _keys(self, rows: Tensor, inverse_norm: Tensor) -> tuple[Tensor, Tensor]:
        """The keys `[l, S*V, D]`, a padding key being its group's first, and their inverse norms `[l, S, 1, V]`."""
        table = self._table
        S, V = table.key_token.shape
        if table.covers_batch:
            return rows, inverse_norm.view(-1, S, 1, V)
        if self._key_rows is None:
            is_key = table.key_word != NO_WORD
            self._key_rows = torch.where(is_key, table.key_token, table.key_token[:, :1]).view(-1)
        scale = inverse_norm.index_select(1, self._key_rows).view(-1, S, 1, V)
        return rows.index_select(1, self._key_rows), scale

    @staticmethod
    def _anchors(tile: _Tile, keys: Tensor, key_scale: Tensor) -> tuple[Tensor, Tensor]:
        """The tile's anchors `[l, S*a, D]`, and their inverse norms `[l, S, a, 1]`."""
        scale = key_scale.flatten(1).index_select(1, tile.anchor_key)
        return keys.index_select(1, tile.anchor_key), scale.view(*key_scale.shape[:2], -1, 1)

    def _scores(
        self,
        anchors: Tensor,
        keys: Tensor,
        anchor_scale: Tensor,
        key_scale: Tensor,
        inverse_temperature: Tensor | float,
    ) -> Tensor:
        """`s_ij` `[l, S, a, V]`."""
        l, S, _, V = key_scale.shape  # noqa: E741
        score = products(_groups(anchors, S), _groups(keys, S)).view(l, S, -1, V)
        if not self._cosine:
            return score.mul_(inverse_temperature)
        return score.mul_(anchor_scale * inverse_temperature).mul_(key_scale)

    @staticmethod
    def _positives(score: Tensor, tile: _Tile) -> Tensor:
        """Of the `s_ij` of a tile those of the positives, `[l, S, a, M]`."""
        return score.gather(-1, tile.positive_slot.expand(len(score), -1, -1, -1))

    @staticmethod
    def _gap(z: Tensor, positive: Tensor, tile: _Tile) -> Tensor:
        """`z_i - s_ij` of the positives, z matched if that was asked for; -inf where there is none; `[l, S, a, M]`."""
        z = z[..., None] if tile.matched is None else z[..., None] + tile.matched
        return (z - positive).masked_fill_(tile.no_positive, -math.inf)

    def _tiles(self, rows: Tensor) -> Iterator[_Tile]:
        """The anchors in pieces; if one holds all, it serves all layers."""
        S, V = self._table.key_token.shape
        A = self._table.anchor_slot.shape[1]
        step = max(1, tile_size(rows[0].numel(), rows.device) // max(1, S * V))
        if step >= A:
            self._whole = self._whole or self._tile(slice(0, A), rows)
            yield self._whole
        else:
            for start in range(0, A, step):
                yield self._tile(slice(start, min(start + step, A)), rows)

    def _tile(self, anchors: slice, rows: Tensor) -> _Tile:
        table = self._table
        S, V = table.key_word.shape
        slot = table.anchor_slot[:, anchors, None].long()  # [S, a, 1]
        key_word = table.key_word[:, None]  # [S, 1, V]
        is_none = table.anchor_word[:, anchors, None] == key_word  # [S, a, V]
        if not table.covers_batch:
            is_none |= key_word == NO_WORD
        no_positive = table.distance > table.num_positives[:, anchors, None]  # [S, a, M]
        first_key = torch.arange(0, S * V, V, device=slot.device)[:, None]  # [S, 1]
        return _Tile(
            anchors,
            (slot[:, :, 0] + first_key).view(-1),
            slot,
            is_none,
            slot + table.distance.masked_fill(no_positive, 0),
            no_positive,
            self._matched(is_none, compute_dtype(rows.dtype)),
        )

    def _matched(self, is_none: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`log(k / number of negatives)`; without negatives z stays the logarithm of nothing."""
        if self._match_negatives is None:
            return None
        number = is_none.shape[-1] - is_none.sum(-1, keepdim=True, dtype=dtype)  # [S, a, 1]
        return math.log(self._match_negatives) - number.clamp_min_(1).log_()


def _groups(rows: Tensor, S: int) -> Tensor:
    """`[l, S*n, D]` as `[l*S, n, D]`, which writes through."""
    return rows.view(len(rows) * S, -1, rows.shape[-1])
