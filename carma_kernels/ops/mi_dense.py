"""Host side of the MI loss of long groups with `torch.bmm` for its products: a candidate, see `launch.LONG_PATH`.

Forward, of each layer, three launches for each piece of anchors whose dot products the workspace holds; backward the
same three, the last of which makes the weights M', and four for each part of D that the workspace holds beside these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from carma_kernels import _runtime
from carma_kernels._ranks import RankTable
from carma_kernels.kernels import launch, mi_dense
from carma_kernels.ops.layers import LayerTable, ScaledSimilarity, Upstream, ceil_div, constants
from carma_kernels.ops.mi import _pieces, _Problem, _range_scale, contrast_state_shapes
from carma_kernels.ops.stability import StabilityGradient

SHORTEST = 512
"""Tokens of a group from which on its products may be left to the library."""

KEPT_BYTES = 2**30
"""What the dot products that are kept from forward to backward may take: much, to be measured with."""

_STATISTICS_BLOCK = 4
"""Anchors of a program, few: it reads whole rows of dot products."""

_PIECE_STEP = 64
"""Pieces of anchors begin at multiples of it, and so at blocks of every kernel."""

_ALIGNED = 16
"""Elements from a row to the next are a multiple of it, whatever the sizes."""


def takes_dense(num_tokens: int) -> bool:
    """Whether groups of so many tokens are computed so."""
    return launch.LONG_PATH != "tiles" and num_tokens >= SHORTEST


def dense_state_shapes(pairs: RankTable, text: Tensor, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two fp32 tensors that the forward fills for the backward.

    What `contrast_state_shapes` has, the first as one dimension, in which the dots of some layers follow if they are
    to be kept.
    """
    shape, sums = contrast_state_shapes(pairs, num_layers, _STATISTICS_BLOCK)
    size = math.prod(shape)
    if launch.LONG_PATH == "kept":
        S, A = pairs.num_negatives.shape
        layer = S * A * _aligned(text.numel() // S)
        size = _aligned(size) + layer * min(num_layers, KEPT_BYTES // (4 * layer))
    return (size,), sums


def dense_forward(
    hidden: LayerTable,
    layers: range,
    pairs: RankTable,
    text: Tensor,
    similarity: ScaledSimilarity,
    inverse_norms: Tensor | None,
    state: tuple[Tensor, Tensor],
) -> Tensor:
    """The pairs' losses, summed over blocks of anchors: `[len(layers), blocks]` fp32.

    Args:
        hidden, layers, pairs, similarity, inverse_norms: as for `contrast_forward`. There is a pair.
        text: `[B, T]` int32, the word of each token as it lies.
        state: of `dense_state_shapes`, overwritten.
    """
    return _DenseMI(hidden, layers, pairs, text, similarity, inverse_norms, state).forward()


def dense_backward(
    hidden: LayerTable,
    layers: range,
    pairs: RankTable,
    text: Tensor,
    similarity: ScaledSimilarity,
    inverse_norms: Tensor | None,
    state: tuple[Tensor, Tensor],
    grad_sums: Upstream,
    stability: StabilityGradient,
    out: LayerTable | None,
    needs_work: bool,
) -> Tensor | None:
    """Write the gradient of each of `layers`, the stability loss's included; see `contrast_backward`."""
    if out is not None:
        _DenseMI(hidden, layers, pairs, text, similarity, inverse_norms, state).backward(grad_sums, stability, out)
    return state[1][:, 0].sum(-1) if needs_work else None


@dataclass(frozen=True)
class _Window:
    """Weights that are held at a time, and the ranks whose gradient is made of them."""

    groups: range
    rows: range  # ranks
    keys: range
    written: range
    writes_rows: bool  # `keys` are all
    writes_keys: bool  # of those that are no rows: `rows` are all


@dataclass(frozen=True)
class _Weights:
    """M' of a window, and the sums of its products with the dots."""

    matrix: Tensor  # [groups, rows, >= keys] in the dtype of the hidden states
    row_sum: Tensor  # [groups, blocks of keys, rows] fp32
    column_sum: Tensor  # [groups, blocks of rows, >= keys] fp32


@dataclass(frozen=True)
class _DenseMI:
    """A problem, and how it is cut up: forward and backward alike, so that equal products have equal bits."""

    hidden: LayerTable
    layers: range
    pairs: RankTable
    text: Tensor
    similarity: ScaledSimilarity
    inverse_norms: Tensor | None
    state: tuple[Tensor, Tensor]

    @cached_property
    def sizes(self) -> _Problem:
        return _Problem(self.hidden, self.pairs, self.similarity)

    # ---- how much at a time

    @cached_property
    def element(self) -> int:
        """Bytes of a hidden state's element."""
        return self.hidden.present.element_size()

    @cached_property
    def weight_bytes(self) -> int:
        """Of the weights of a group."""
        return self.sizes.A * _aligned(self.sizes.N) * self.element

    @cached_property
    def groups(self) -> int:
        """So many whose weights fit into half of the workspace, at least one."""
        return max(1, min(self.sizes.S, self.sizes.budget // 2 // self.weight_bytes))

    @cached_property
    def anchors(self) -> int:
        """So many whose dots and rows fit into the rest."""
        rest = self.sizes.budget - min(self.groups * self.weight_bytes, self.sizes.budget // 2)
        return rest // (self.groups * (4 * _aligned(self.sizes.N) + self.element * _aligned(self.sizes.D)))

    def windows(self) -> Iterator[_Window]:
        """The backward in parts that fit."""
        A, N = self.sizes.A, self.sizes.N
        for groups in _pieces(range(self.sizes.S), self.groups):
            if 2 * self.weight_bytes <= self.sizes.budget:
                yield _Window(groups, range(A), range(N), range(N), True, True)
            else:  # the weights between anchors and other keys are made twice
                for rows in self.anchor_pieces():
                    yield _Window(groups, rows, range(N), rows, True, False)
                most = self.sizes.budget // 2 // (self.element * (A + _aligned(self.sizes.D)))
                for keys in _pieces(range(A, N), most, _ALIGNED):
                    yield _Window(groups, range(A), keys, keys, False, True)

    def factors(self, window: _Window) -> range:
        """The ranks that its weights are multiplied with."""
        return range(self.sizes.N if window.writes_rows else self.sizes.A)

    def widths(self, window: _Window) -> Iterator[range]:
        """Parts of D whose factors and products fit beside the weights."""
        step = max(self.sizes.configuration(name).constants["BLOCK_D"] for name in ("dense_gather", "dense_rows"))
        rest = self.sizes.budget - len(window.groups) * len(window.rows) * _aligned(len(window.keys)) * self.element
        column = len(window.groups) * (len(self.factors(window)) * self.element + len(window.written) * 4)
        return _pieces(range(self.sizes.D), rest // column, step)

    def anchor_pieces(self) -> Iterator[range]:
        return _pieces(range(self.sizes.A), self.anchors, _PIECE_STEP)

    # ---- dot products

    def new_dots(self, groups: range, rows: range, num_columns: int) -> Tensor:
        """Room for them, `[groups, rows, columns]`, a little more of the latter."""
        return self.state[1].new_empty((len(groups), len(rows), _aligned(num_columns)))

    def kept_dots(self, place: int, groups: range, anchors: range) -> Tensor | None:
        """Where those of a layer are kept, `[groups, anchors, columns]`; None if they are not."""
        S, A, columns = self.sizes.S, self.sizes.A, _aligned(self.sizes.N)
        first = _aligned(len(self.layers) * S * 2 * A) + place * S * A * columns
        if first + S * A * columns > self.state[0].numel():
            return None
        whole = self.state[0][first : first + S * A * columns].view(S, A, columns)
        return whole[groups.start : groups.stop, anchors.start : anchors.stop]

    def multiply_tokens(self, place: int, groups: range, anchors: range, dots: Tensor) -> None:
        """Fill `dots` with those of some anchors and all tokens, as they lie."""
        layer = self.hidden.layers[self.layers[place]]
        assert layer is not None
        tokens = layer.detach().view(self.sizes.S, self.sizes.N, self.sizes.D)[groups.start : groups.stop]
        _multiply(self.gathered(place, groups, anchors, range(self.sizes.D)), tokens.mT, dots)

    def gathered(self, place: int, groups: range, ranks: range, width: range) -> Tensor:
        """Some columns of the tokens of some ranks, zeros for padding: `[groups, ranks, width]`."""
        configuration = self.sizes.configuration("dense_gather")
        BLOCK_M, BLOCK_D = configuration.constants["BLOCK_M"], configuration.constants["BLOCK_D"]
        rows = self.hidden.present.new_empty((len(groups), len(ranks), _aligned(len(width))))
        _runtime.launch(
            mi_dense._dense_gather_kernel,
            (ceil_div(len(ranks), BLOCK_M) * ceil_div(len(width), BLOCK_D) * len(groups),),
            self.hidden.addresses,
            self.pairs.token,
            self.pairs.size,
            rows,
            self.layers[place],
            groups.start,
            ranks.start,
            len(ranks),
            width.start // BLOCK_D,
            len(width),
            self.sizes.N,
            self.sizes.D,
            self.sizes.R,
            rows.stride(1),
            **constants(self.hidden),
            **configuration.options,
        )
        return rows[:, :, : len(width)]

    # ---- forward

    def forward(self) -> Tensor:
        """The losses of blocks of anchors; `state` is filled."""
        losses = self.state[1].new_empty((len(self.layers), self.state[1].shape[2]))
        for place in range(len(self.layers)):
            for groups in _pieces(range(self.sizes.S), self.groups):
                for anchors in self.anchor_pieces():
                    dots = self.kept_dots(place, groups, anchors)
                    if dots is None:
                        dots = self.new_dots(groups, anchors, self.sizes.N)
                    self.multiply_tokens(place, groups, anchors, dots)
                    self.launch_statistics(place, groups, anchors, dots, losses)
        return losses

    def launch_statistics(self, place: int, groups: range, anchors: range, dots: Tensor, losses: Tensor) -> None:
        """From some anchors' dots to what they leave."""
        matched = self.similarity.match_negatives
        _runtime.launch(
            mi_dense._dense_statistics_kernel,
            (ceil_div(len(anchors), _STATISTICS_BLOCK) * len(groups),),
            dots,
            self.text,
            self.pairs.token,
            self.pairs.size,
            self.pairs.first_pair,
            self.pairs.num_negatives,
            self.inverse_norms,
            self.similarity.inverse_temperature,
            *self.state,
            losses,
            0.0 if matched is None else math.log(matched),
            place,
            groups.start,
            anchors.start,
            len(anchors),
            _rows_of(dots),
            self.sizes.S,
            self.sizes.N,
            self.sizes.R,
            self.sizes.A,
            dots.stride(1),
            COSINE=self.similarity.cosine,
            BOUNDED=self.similarity.bounded,
            MATCH=matched is not None,
            BLOCK_A=_STATISTICS_BLOCK,
            **self.sizes.configuration("dense_statistics").options,
        )

    # ---- backward

    def backward(self, grad_sums: Upstream, stability: StabilityGradient, out: LayerTable) -> None:
        """Write the gradients of `layers`, where there is room for one."""
        scale = None
        if self.similarity.cosine and self.hidden.present.dtype == torch.float16:
            scale = _range_scale(self.state[1], self.pairs)
        for place, layer in enumerate(self.layers):
            if out.layers[layer] is not None:
                for window in self.windows():
                    weights = self.weights(place, window, scale)
                    self.write_rows(place, window, weights, scale, (grad_sums, stability), out)

    def weights(self, place: int, window: _Window, scale: Tensor | None) -> _Weights:
        """Of a window of a layer."""
        configuration = self.sizes.configuration("dense_weights")
        BLOCK_M, BLOCK_N = configuration.constants["BLOCK_M"], configuration.constants["BLOCK_N"]
        num_groups, num_rows, columns = len(window.groups), len(window.rows), _aligned(len(window.keys))
        weight = self.hidden.present.new_empty((num_groups, num_rows, columns))
        row_sum = self.state[1].new_empty((num_groups, ceil_div(columns, BLOCK_N), num_rows))
        column_sum = self.state[1].new_empty((num_groups, ceil_div(num_rows, BLOCK_M), columns))
        is_whole = len(window.keys) == self.sizes.N
        keys = None  # the gathered ones
        for piece in _pieces(window.rows, self.anchors, _PIECE_STEP):
            dots, gathered = self.kept_dots(place, window.groups, piece), False
            if dots is None:
                dots, gathered = self.new_dots(window.groups, piece, len(window.keys)), not is_whole
                if is_whole:
                    self.multiply_tokens(place, window.groups, piece, dots)
                else:
                    width = range(self.sizes.D)
                    keys = self.gathered(place, window.groups, window.keys, width) if keys is None else keys
                    _multiply(self.gathered(place, window.groups, piece, width), keys.mT, dots)
            _runtime.launch(
                mi_dense._dense_weights_kernel,
                (ceil_div(len(piece), BLOCK_M) * ceil_div(columns, BLOCK_N) * num_groups,),
                dots,
                self.pairs.token,
                self.pairs.word,
                self.pairs.size,
                self.inverse_norms,
                self.similarity.inverse_temperature,
                self.state[0],
                scale,
                weight,
                row_sum,
                column_sum,
                place,
                window.groups.start,
                window.rows.start,
                window.keys.start,
                piece.start - window.rows.start,
                len(piece),
                _rows_of(dots),
                num_rows,
                len(window.keys),
                self.sizes.S,
                self.sizes.N,
                self.sizes.R,
                self.sizes.A,
                dots.stride(1),
                columns,
                COSINE=self.similarity.cosine,
                BOUNDED=self.similarity.bounded,
                RESCALE=scale is not None,
                GATHERED=gathered,
                INTERPRETED=constants(self.hidden)["INTERPRETED"],
                **configuration.options,
            )
        return _Weights(weight, row_sum, column_sum)

    def write_rows(
        self,
        place: int,
        window: _Window,
        weights: _Weights,
        scale: Tensor | None,
        upstream: tuple[Upstream, StabilityGradient],
        out: LayerTable,
    ) -> None:
        """The gradient of a window's ranks, in as many parts of D as the workspace holds."""
        grad_sums, stability = upstream
        configuration = self.sizes.configuration("dense_rows")
        BLOCK_M, BLOCK_D = configuration.constants["BLOCK_M"], configuration.constants["BLOCK_D"]
        blocks = self.sizes.configuration("dense_weights").constants
        for width in self.widths(window):
            factors = self.gathered(place, window.groups, self.factors(window), width)
            product = self.product(window, weights.matrix, factors)
            _runtime.launch(
                mi_dense._dense_rows_kernel,
                (ceil_div(len(window.written), BLOCK_M) * ceil_div(len(width), BLOCK_D) * len(window.groups),),
                product,
                self.hidden.addresses,
                out.addresses,
                self.pairs.token,
                self.pairs.size,
                self.inverse_norms,
                self.similarity.inverse_temperature,
                *grad_sums.arguments,
                scale,
                weights.row_sum,
                weights.column_sum,
                *stability.arguments,
                self.layers[place],
                place,
                window.groups.start,
                window.written.start,
                len(window.written),
                window.rows.start,
                window.keys.start,
                len(window.rows),
                width.start // BLOCK_D,
                len(width),
                self.sizes.S,
                self.sizes.N,
                self.sizes.D,
                self.sizes.R,
                self.sizes.A,
                weights.matrix.stride(1),
                product.stride(1),
                COSINE=self.similarity.cosine,
                RESCALE=scale is not None,
                STENCIL=stability.num_steps > 0,
                HAS_MASK=stability.num_steps > 0 and stability.mask is not None,
                ROW_BLOCK=blocks["BLOCK_M"],
                KEY_BLOCK=blocks["BLOCK_N"],
                **constants(self.hidden, out),
                **configuration.options,
            )

    def product(self, window: _Window, weight: Tensor, factors: Tensor) -> Tensor:
        """`M' h` of the window's ranks, `[groups, written, width]` fp32, a little more of the latter."""
        width = factors.shape[2]
        product = self.state[1].new_empty((len(window.groups), len(window.written), _aligned(width)))
        num_rows, num_keys = len(window.rows), len(window.keys)
        if window.writes_keys:
            # from a multiple on, for the alignment; rows that are among them are written once more
            first = num_rows // _ALIGNED * _ALIGNED if window.writes_rows else 0
            _multiply(weight[:, :, first:num_keys].mT, factors[:, :num_rows], product[:, first:, :width])
        if window.writes_rows:
            _multiply(weight[:, :, :num_keys], factors, product[:, :num_rows, :width])
        return product


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`a @ b` in fp32, into as many columns of `out` as there are: `[groups, .., ..]` each.

    Autocast leaves a product with an `out` alone.
    """
    out = out[:, :, : b.shape[2]]
    if not out.numel():
        return
    if not a.is_cuda:  # in fp64: a dot product's last digit must not depend on where in the matrix it is
        out.copy_(torch.bmm(a.double(), b.double()))
    elif a.dtype == torch.float32:
        torch.bmm(a, b, out=out)
    else:
        torch.bmm(a, b, torch.float32, out=out)


def _rows_of(dots: Tensor) -> int:
    """From a group to the next."""
    return dots.stride(0) // dots.stride(1)


def _aligned(elements: int) -> int:
    return ceil_div(elements, _ALIGNED) * _ALIGNED
