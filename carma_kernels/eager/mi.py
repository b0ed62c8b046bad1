"""The MI loss against all negatives, and its gradient, from tiles of the anchors' rows of the Gram matrix.

With `s_ij` the similarity, `z_i` the log-sum-exp of anchor i's negatives (in the loss, but not in the softmax over the
negatives, with `match_negatives` added) and `sigma_ij = sigmoid(z_i - s_ij)`,

    loss        = sum over pairs of softplus(z_i - s_ij)
    d loss/d s_ij = W_ij = -sigma_ij                           for a positive j of i
                           exp(s_ij - z_i) sum_j' sigma_ij'    for a negative j of i

    d loss/d h_i = sum_j (W_ij + W_ji) r_i r_j h_j / tau - r_i^2 h_i sum_j (W_ij + W_ji) s_ij

(the dot product has r = 1 and no second term). `s` and `W` exist a tile at a time: the anchors of every group against
all their keys, of as many layers as fit; or some of the anchors, of one layer. What is done to a tile is done to all
its layers at once, what is done to hidden states part by part. The positives of an anchor are the slots right after its
own, so that they are a narrow band of the tile, as wide as the longest word.

Of few keys the whole matrix `W + W'` is made, its diagonal holding the second term: one product then gives the
gradient. Of many keys W is applied to the keys, and its transpose to the anchors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from carma_kernels.eager.layers import (
    add_products,
    add_rows,
    at,
    compute_dtype,
    launches_cost,
    products,
    softplus,
    tile_size,
)
from carma_kernels.spans import NO_WORD, ContrastTable

_FEW_KEYS = 96
"""On a CPU, up to so many, multiplying with every key costs less than gathering the anchors and adding to their
gradients."""


class Comparisons(NamedTuple):
    """A contrast table as it is worked with: of S groups, A anchors against V keys."""

    key_token: Tensor  # [S, V] int32, as in `ContrastTable`
    key_word: Tensor  # [S, V] int32
    anchor_word: Tensor  # [S, A] int32
    anchor_key: Tensor  # [S, A] int64, the anchor among the S*V keys
    positive_slot: Tensor  # [S, A, M] int64, among the group's keys; the anchor's own where it has fewer positives
    is_positive: Tensor  # [S, A, M] fp32, 1 or 0
    bias: Tensor  # [S, A, V] fp32, as in a tile of all anchors; [S, A, 0] where it is made with the tile

    @classmethod
    def of(cls, table: ContrastTable) -> Comparisons:
        """Work out where everything lies; on a CPU once, however often the same words are asked for.

        Not on another device, where a stream or a graph's capture may not have come to it when it is used again.
        """
        S, V, A = *table.key_token.shape, table.anchor_word.shape[1]
        is_watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        if is_watched or launches_cost(table.key_token.device):
            return cls._made(table, table.key_word.new_empty((S, A, 0), dtype=torch.float32))
        found = _MADE.get(table.key_token)
        if found is None:
            with torch.inference_mode(False):  # a backward may need them later
                is_small = S * A * V <= _SMALL_BIAS
                is_none = _is_none(table, slice(0, A), table.covers_batch) if is_small else torch.empty(S, A, 0)
                bias = _bias(is_none, torch.float32)
                found = _MADE[table.key_token] = cls._made(table, bias)[3:]  # the key would keep itself alive
        return cls(table.key_token, table.key_word, table.anchor_word, *found)

    @classmethod
    def _made(cls, table: ContrastTable, bias: Tensor) -> Comparisons:
        S, V = table.key_token.shape
        slot = table.anchor_slot.long()  # [S, A]
        first_key = V * torch.arange(S, device=slot.device)[:, None]  # [S, 1]
        is_positive = table.distance <= table.num_positives[:, :, None]  # [S, A, M]
        positive_slot = slot[:, :, None] + table.distance * is_positive
        return cls(
            table.key_token,
            table.key_word,
            table.anchor_word,
            slot + first_key,
            positive_slot,
            is_positive.float(),
            bias,
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """S, V and A."""
        return (*self.key_token.shape, self.anchor_word.shape[1])


_SMALL_BIAS = 1 << 18
"""Numbers: 1 MB for as long as the words are there."""
_MADE = WeakTensorKeyDictionary()
"""By the key tokens of a contrast table, what `Comparisons` has beside the table."""


def _is_none(table: ContrastTable | Comparisons, anchors: slice, covers_batch: bool) -> Tensor:
    """`[S, a, V]`: no negative, of the anchor's word or no key."""
    key_word = table.key_word[:, None]  # [S, 1, V]
    is_none = table.anchor_word[:, anchors, None] == key_word
    return is_none if covers_batch else is_none.logical_or_(key_word == NO_WORD)


def _bias(is_none: Tensor, dtype: torch.dtype) -> Tensor:
    """`[S, a, V]`: 0 for a negative, and for what is none so low that nothing is left of it."""
    return is_none.to(dtype).mul_(torch.finfo(torch.float32).min / 4)


class _Tile(NamedTuple):
    """Some anchors of every group against all their keys."""

    anchors: slice
    anchor_key: Tensor  # [S*a] the anchor among the S*V keys
    bias: Tensor  # [S, a, V], see `_bias`
    positive_slot: Tensor  # [S, a, M] the anchor's own where it has fewer positives
    is_positive: Tensor  # [S, a, M] 1 or 0
    matched: Tensor | None  # [S, a, 1] what match_negatives adds to z


class ContrastiveMI:
    """The MI term against all negatives."""

    def __init__(self, table: Comparisons, covers_batch: bool, cosine: bool, match_negatives: float | None) -> None:
        """Take a table, and whether its keys are the rows of the layers as they lie."""
        self.table = table
        self.covers_batch = covers_batch
        self.cosine = cosine
        self.sizes = table.sizes
        self.has_few_keys = self.sizes[1] <= _FEW_KEYS and not launches_cost(table.key_token.device)
        self._match_negatives = match_negatives
        self._whole: _Tile | None = None
        self._key_rows: Tensor | None = None

    def layers_at_once(self, layer: Tensor) -> int:
        """How many layers like this one `[B, T, D]` a tile may be of."""
        S, V, A = self.sizes
        of_layer = S * V * (V if self.has_few_keys else A)
        at_once: int = tile_size(layer.numel(), layer.device) // max(1, of_layer)
        return max(1, at_once)

    def run(
        self, layer: Tensor, places: slice, inverse_temperature: Tensor | float, kept: Tensor | None
    ) -> ContrastRun:
        """Of the layers at some places in the term, like this one `[B, T, D]`.

        `kept` `[l, S, A, V]` is where the forward leaves the similarities for the backward; None if it does not.
        """
        return ContrastRun(self, layer, places.stop - places.start, inverse_temperature, kept)

    def keys(self, rows: Tensor) -> Tensor:
        """`[l, S*V, D]` of `[l, N, D]`, a padding key being its group's first."""
        return rows if self.covers_batch else rows.index_select(1, self._rows_of_keys())

    def key_scale(self, inverse_norm: Tensor) -> Tensor:
        """`[l, S, 1, V]` of `[l, N]`."""
        if not self.covers_batch:
            inverse_norm = inverse_norm.index_select(1, self._rows_of_keys())
        S, V, _ = self.sizes
        return inverse_norm.view(-1, S, 1, V)

    def _rows_of_keys(self) -> Tensor:
        if self._key_rows is None:
            table = self.table
            is_key = table.key_word != NO_WORD
            self._key_rows = torch.where(is_key, table.key_token, table.key_token[:, :1]).view(-1)
        return self._key_rows

    def anchors_at_once(self, layer: Tensor) -> int:
        """How many anchors of a group a tile may hold, of one layer `[B, T, D]`."""
        S, V, A = self.sizes
        at_once: int = tile_size(layer.numel(), layer.device) // max(1, S * V)
        return min(A, max(1, at_once))

    def tiles(self, layer: Tensor) -> Iterator[_Tile]:
        """The anchors in pieces; if one holds all, it serves all layers."""
        A, step = self.sizes[2], self.anchors_at_once(layer)
        if step == A:
            self._whole = self._whole or self._tile(slice(0, A), layer.dtype)
            yield self._whole
        else:
            for start in range(0, A, step):
                yield self._tile(slice(start, min(start + step, A)), layer.dtype)

    def _tile(self, anchors: slice, dtype: torch.dtype) -> _Tile:
        table, dtype = self.table, compute_dtype(dtype)
        V, A = self.sizes[1:]
        is_made = dtype == torch.float32 and table.bias.shape[2] == V and anchors == slice(0, A)
        needs_none = not is_made or self._match_negatives is not None
        is_none = _is_none(table, anchors, self.covers_batch) if needs_none else None
        return _Tile(
            anchors,
            table.anchor_key[:, anchors].reshape(-1),
            table.bias if is_made or is_none is None else _bias(is_none, dtype),
            table.positive_slot[:, anchors],
            table.is_positive[:, anchors].to(dtype),
            None if is_none is None else self._matched(is_none, dtype),
        )

    def _matched(self, is_none: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`log(k / number of negatives)`; without negatives z stays next to the logarithm of nothing."""
        if self._match_negatives is None:
            return None
        number = is_none.shape[-1] - is_none.sum(-1, keepdim=True, dtype=dtype)  # [S, a, 1]
        return math.log(self._match_negatives) - number.clamp_min_(1).log_()


class ContrastRun:
    """The term of l layers after others: `add` their rows part by part, then ask for the losses or the gradients."""

    def __init__(
        self,
        term: ContrastiveMI,
        layer: Tensor,
        num_layers: int,
        inverse_temperature: Tensor | float,
        kept: Tensor | None,
    ) -> None:
        """Take what `ContrastiveMI.run` knows."""
        self._term, self._layer, self._num_layers, self._kept = term, layer, num_layers, kept
        self._inverse_temperature = inverse_temperature
        self._one_tile = term.anchors_at_once(layer) == term.sizes[2]
        self._both_ways = self._one_tile and term.has_few_keys
        self._rows: Tensor | None = None  # [1, N, D] of a layer whose anchors come in pieces
        self._scores: Tensor | None = None  # [l, S, A, V], products until they are scaled
        self.covers = term.covers_batch
        """Every row of the layers is a key, so that `write_gradient` can be used."""

    def add(self, place: slice, rows: Tensor) -> None:
        """Multiply the layers at `place` among the run's, `[m, N, D]`; all of them have to be added, in any order."""
        if not self._one_tile:
            self._rows = rows
            return
        (tile,) = self._term.tiles(self._layer)
        if self._scores is None:
            self._scores = self._kept
            if self._scores is None and len(rows) < self._num_layers:
                S, V, A = self._term.sizes
                self._scores = rows.new_empty((self._num_layers, S, A, V), dtype=compute_dtype(rows.dtype))
        out = None if self._scores is None else at(self._scores, place)
        multiplied = self._multiply(self._term.keys(rows), tile, out)
        if self._scores is None:
            self._scores = multiplied

    def forward(self, inverse_norm: Tensor) -> tuple[Tensor, Tensor]:
        """`z_i` `[l, S, A]`, and sums `[l]` of the pairs' losses over each layer, whose inverse norms are `[l, N]`."""
        self._key_scale = self._term.key_scale(inverse_norm)  # [l, S, 1, V]
        log_negatives, losses = [], []
        for tile in self._term.tiles(self._layer):
            score = self._score(tile)
            positive = self._positives(score, tile)
            biased = score.add_(tile.bias) if self._kept is None else score + tile.bias
            top = biased.amax(-1)
            share = biased.softmax(-1).amax(-1)  # of the largest in exp(z)
            z = top.sub_(share.log_())
            log_negatives.append(z)
            losses.append(softplus(self._gap(z, positive, tile)).mul_(tile.is_positive).sum((1, 2, 3)))
        return torch.cat(log_negatives, 2) if len(losses) > 1 else log_negatives[0], sum(losses[1:], losses[0])

    def weigh(
        self, inverse_norm: Tensor, log_negatives: Tensor, grad: Tensor, needs_work: bool, own: Tensor | None
    ) -> None:
        """Make ready for the gradients.

        Args:
            inverse_norm: `[l, N]`.
            log_negatives: `[l, S, A]`.
            grad: `[l]`, the gradient of the loss with respect to `forward`'s sums.
            needs_work: `work` will be asked for.
            own: `[l, 1, 1]` what of every key is added to its gradient, None for nothing.
        """
        self._key_scale = self._term.key_scale(inverse_norm)  # [l, S, 1, V]
        self._log_negatives = log_negatives
        self._grad = grad[:, None, None, None]
        self._works: list[Tensor] | None = [] if needs_work else None
        self._own = own
        self._projection: Tensor | None = None  # [l, S*V] sum of W_ij s_ij over all that a key is compared with
        self._weights: Tensor | None = None  # [l, S, A, V], or [l, S, V, V] of few keys
        if self._one_tile:
            (tile,) = self._term.tiles(self._layer)
            weight = self._weight(tile)
            self._weights = self._whole_matrix(weight, tile) if self._both_ways else self._scaled(weight, tile)

    @property
    def work(self) -> Tensor | None:
        """`sum W_ij s_ij`, once all gradients are written: the temperature's follows."""
        return sum(self._works[1:], self._works[0]) if self._works else None

    def write_gradient(self, place: slice, keys: Tensor, out: Tensor, *, adds: bool = False) -> None:
        """Write the gradients of the layers at `place` among the run's, or add them; keys and `out` `[m, S*V, D]`."""
        S, _, _ = self._term.sizes
        keys_in_groups, out_in_groups = _groups(keys.to(out.dtype), S), _groups(out, S)  # [m*S, V, D]
        if self._both_ways:
            assert self._weights is not None
            _multiply_into(out_in_groups, at(self._weights, place).flatten(0, 1), keys_in_groups, adds)
            return
        for number, tile in enumerate(self._term.tiles(self._layer)):
            anchors = keys.index_select(1, tile.anchor_key)  # [m, S*a, D]
            if self._one_tile:
                assert self._weights is not None
                weight = at(self._weights, place)
            else:
                self._scores = self._multiply(keys, tile, None, anchors)
                weight = self._scaled(self._weight(tile), tile)
            of_groups = weight.flatten(0, 1)  # [m*S, a, V]
            _multiply_into(out_in_groups, of_groups.mT, _groups(anchors.to(out.dtype), S), adds or number > 0)
            del anchors  # for the room that their gradients take
            add_products(out, tile.anchor_key, of_groups, keys_in_groups)
        coefficient = self._coefficient()
        if coefficient is not None:
            out.addcmul_(keys.to(out.dtype), at(coefficient, place)[..., None])

    def add_gradient(self, place: slice, rows: Tensor, out: Tensor) -> None:
        """Add the gradients of the layers at `place` among the run's to `out`; both `[m, N, D]`."""
        keys = self._term.keys(rows)
        if self.covers:
            self.write_gradient(place, keys, out, adds=True)
            return
        token = self._term.table.key_token.view(-1).long()  # no row comes twice
        if launches_cost(out.device):  # where `index_add_` would use atomics
            sums = out.index_select(1, token)
            self.write_gradient(place, keys, sums, adds=True)
            out.index_copy_(1, token, sums)
        else:
            gradient = torch.empty(keys.shape, dtype=out.dtype, device=out.device)
            self.write_gradient(place, keys, gradient)
            out.index_add_(1, token, gradient)

    def _multiply(self, keys: Tensor, tile: _Tile, out: Tensor | None, anchors: Tensor | None = None) -> Tensor:
        """The products `[m, S, a, V]` of the tile's anchors with the keys `[m, S*V, D]`."""
        S, V, _ = self._term.sizes
        if anchors is None:
            anchors = keys.index_select(1, tile.anchor_key)  # [m, S*a, D]
        out = None if out is None else out.flatten(0, 1)
        return products(_groups(anchors, S), _groups(keys, S), out).view(len(keys), S, -1, V)

    def _score(self, tile: _Tile) -> Tensor:
        """`s_ij` `[l, S, a, V]`."""
        if not self._one_tile:
            assert self._rows is not None
            self._scores = self._multiply(self._term.keys(self._rows), tile, None)
        assert self._scores is not None
        return self._scaled(self._scores, tile)

    def _scaled(self, weight: Tensor, tile: _Tile) -> Tensor:
        """In place: times `r_i r_j / tau`."""
        if not self._term.cosine:
            return weight.mul_(self._inverse_temperature)
        key_scale = self._key_scale
        anchor_scale = key_scale.flatten(1).index_select(1, tile.anchor_key).mul_(self._inverse_temperature)
        return weight.mul_(anchor_scale.view(*key_scale.shape[:2], -1, 1)).mul_(key_scale)

    @staticmethod
    def _positives(score: Tensor, tile: _Tile) -> Tensor:
        """Of the `s_ij` of a tile those of the positives, `[m, S, a, M]`."""
        return score.gather(-1, tile.positive_slot.expand(len(score), -1, -1, -1))

    @staticmethod
    def _gap(z: Tensor, positive: Tensor, tile: _Tile) -> Tensor:
        """`z_i - s_ij` of the positives, z matched if that was asked for; `[m, S, a, M]`."""
        return (z[..., None] if tile.matched is None else z[..., None] + tile.matched) - positive

    def _weight(self, tile: _Tile) -> Tensor:
        """`W_ij` `[l, S, a, V]`; adds up the projections and the work."""
        score = self._scaled(self._scores, tile) if self._kept is None else self._kept  # type: ignore[arg-type]
        # similarities are subtracted from each other before anything else: dot products may be in the thousands
        gap = self._gap(self._log_negatives[:, :, tile.anchors], self._positives(score, tile), tile)
        push = gap.sigmoid_().mul_(tile.is_positive).mul_(self._grad)  # [l, S, a, M]
        weight = (score + tile.bias).softmax(-1).mul_(push.sum(-1, keepdim=True))
        weight.scatter_(-1, tile.positive_slot.expand(push.shape), push.neg_())  # 0 at the anchor's own slot
        if self._works is not None or self._term.cosine:
            work = torch.mul(score, weight, out=self._scores)  # W_ij s_ij
            of_anchors = work.sum(-1)  # [l, S, a]
            if self._works is not None:
                self._works.append(of_anchors.sum())
            if self._term.cosine:
                projection = work.sum(2).flatten(1)  # [l, S*V]
                add_rows(projection, tile.anchor_key, of_anchors.flatten(1))
                self._projection = projection if self._projection is None else self._projection + projection
        self._scores = None
        return weight

    def _coefficient(self) -> Tensor | None:
        """`[l, S*V]` of each key itself in its own gradient; `[l, 1]` if it is the same for all; None for nothing."""
        own = None if self._own is None else self._own[..., 0]  # [l, 1]
        if self._projection is None:
            return own
        square = self._key_scale.flatten(1).square()
        if own is None:
            return square.mul_(self._projection).neg_()
        return torch.addcmul(own, self._projection, square, value=-1)

    def _whole_matrix(self, weight: Tensor, tile: _Tile) -> Tensor:
        """`[l, S, V, V]`: of every key in every key's gradient."""
        S, V, _ = self._term.sizes
        rows = weight.new_zeros(len(weight), S * V, V)
        rows.index_copy_(1, tile.anchor_key, weight.flatten(1, 2))
        rows = rows.view(-1, S, V, V)
        both = (rows + rows.mT).mul_(self._inverse_temperature)
        if self._term.cosine:
            both.mul_(self._key_scale.mT).mul_(self._key_scale)
        coefficient = self._coefficient()
        if coefficient is not None:
            both.diagonal(dim1=2, dim2=3).add_(coefficient.unflatten(1, (S, -1)))
        return both


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, adds: bool) -> None:
    """`left @ right` to `out`, or added to it."""
    if adds:
        out.baddbmm_(left, right)
    else:
        torch.bmm(left, right, out=out)


def _groups(rows: Tensor, S: int) -> Tensor:
    """`[l, S*n, D]` as `[l*S, n, D]`, which writes through."""
    return rows.view(len(rows) * S, -1, rows.shape[-1])
