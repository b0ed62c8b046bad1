"""Host side of the MI loss against all negatives of a group: the general path, for groups beyond a single tile.

Forward, two launches for all layers: scores of tiles of anchors x keys, then each anchor's statistics. Backward, two
launches a workspace: the weights M' of as many layers as it holds, then their rows of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from carma_kernels import _runtime
from carma_kernels._ranks import RANK_ALIGNMENT, RankTable
from carma_kernels.kernels import launch, mi, mi_backward
from carma_kernels.ops.layers import (
    LayerTable,
    ScaledSimilarity,
    Upstream,
    ceil_div,
    constants,
    mi_precision,
    target,
)
from carma_kernels.ops.stability import StabilityGradient

WORKSPACE_BYTES = 128 * 2**20
"""What the forward's partial sums and the backward's weights may take, or the bytes of one layer if these are more."""

_STATISTICS_BLOCK = 128
_INT32_MAX = 2**31 - 1


def contrast_state_shapes(
    pairs: RankTable, num_layers: int, block: int = _STATISTICS_BLOCK
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two fp32 tensors that the forward fills for the backward.

    For each anchor its `z` (with `match_negatives`) and the factor of its negatives' weights, `[L, S, 2, A]`; and sums
    over blocks of anchors, of `W s` and of the inverse norms, `[L, 2, blocks]`.
    """
    S, A = pairs.num_negatives.shape
    return (num_layers, S, 2, A), (num_layers, 2, S * ceil_div(A, block))


def contrast_forward(
    hidden: LayerTable,
    layers: range,
    pairs: RankTable,
    similarity: ScaledSimilarity,
    inverse_norms: Tensor | None,
    state: tuple[Tensor, Tensor],
) -> Tensor:
    """The pairs' losses, summed over blocks of anchors: `[len(layers), blocks]` fp32.

    Args:
        hidden: L layers.
        layers: those of the loss.
        pairs: the groups; S groups of `B*T // S` tokens.
        similarity: what is compared how.
        inverse_norms: `[len(layers), B*T]` fp32, for the cosine.
        state: of `contrast_state_shapes`, overwritten.
    """
    problem = _Problem(hidden, pairs, similarity)
    anchor_state, sums = state
    loss = sums.new_empty((len(layers), sums.shape[2]))  # [L_mi, blocks]
    if problem.A == 0:
        return loss
    scores = problem.configuration("mi_scores")
    key_blocks = ceil_div(problem.N, scores.constants["BLOCK_N"])
    num_partials = 1 if similarity.bounded else 3
    layer_size = problem.S * key_blocks * num_partials * problem.A + pairs.num_pairs
    for chunk in _pieces(range(len(layers)), problem.budget // (4 * layer_size)):
        partial = sums.new_empty((problem.S, len(chunk), key_blocks, num_partials, problem.A))
        pair_score = sums.new_empty((len(chunk), pairs.num_pairs))
        _runtime.launch(
            mi._mi_scores_kernel,
            (ceil_div(problem.A, scores.constants["BLOCK_M"]) * key_blocks * len(chunk) * problem.S,),
            hidden.addresses,
            pairs.token,
            pairs.word,
            pairs.size,
            pairs.first_pair,
            inverse_norms,
            similarity.inverse_temperature,
            pair_score,
            partial,
            layers.start + chunk.start,
            chunk.start,
            len(chunk),
            problem.S,
            problem.N,
            problem.D,
            problem.R,
            problem.A,
            pairs.num_pairs,
            BOUNDED=similarity.bounded,
            **problem.dot_constants(scores),
            **constants(hidden),
            **scores.options,
        )
        _runtime.launch(
            mi._mi_statistics_kernel,
            (ceil_div(problem.A, _STATISTICS_BLOCK) * len(chunk) * problem.S,),
            pairs.size,
            pairs.first_pair,
            pairs.num_negatives,
            pairs.token,
            inverse_norms,
            similarity.inverse_temperature,
            pair_score,
            partial,
            anchor_state,
            sums,
            loss,
            0.0 if similarity.match_negatives is None else math.log(similarity.match_negatives),
            chunk.start,
            len(chunk),
            problem.S,
            problem.N,
            problem.R,
            problem.A,
            pairs.num_pairs,
            COSINE=similarity.cosine,
            BOUNDED=similarity.bounded,
            MATCH=similarity.match_negatives is not None,
            KEY_BLOCK=scores.constants["BLOCK_N"],
            BLOCK_A=_STATISTICS_BLOCK,
        )
    return loss


def contrast_backward(
    hidden: LayerTable,
    layers: range,
    pairs: RankTable,
    similarity: ScaledSimilarity,
    inverse_norms: Tensor | None,
    state: tuple[Tensor, Tensor],
    grad_sums: Upstream,
    stability: StabilityGradient,
    out: LayerTable | None,
    needs_work: bool,
) -> Tensor | None:
    """Write the gradient of each of `layers`, the stability loss's included.

    Args:
        hidden, layers, pairs, similarity, inverse_norms: as in `contrast_forward`.
        state: as that left it.
        grad_sums: what arrives for each layer's sum over the pairs.
        stability: of the stability loss; without any step if there is none.
        out: L layers, None among them where no gradient is wanted. Every row of those in `layers` is written.
        needs_work: whether the temperature needs a gradient.

    Returns:
        `sum_ij W_ij s_ij` of each layer, `[len(layers)]`, if it is needed.
    """
    anchor_state, sums = state
    if out is not None and any(out.layers[layer] is not None for layer in layers):
        problem = _Problem(hidden, pairs, similarity)
        scale = _range_scale(sums, pairs) if similarity.cosine and hidden.present.dtype == torch.float16 else None
        weights, gradient = problem.configuration("mi_weights"), problem.configuration("mi_gradient")
        ANCHOR_BLOCK, KEY_BLOCK = weights.constants["BLOCK_M"], weights.constants["BLOCK_N"]
        BLOCK_M = gradient.constants["BLOCK_M"]
        ROW_STEP = max(ANCHOR_BLOCK, BLOCK_M)
        for window in problem.windows(len(layers), ROW_STEP):
            matrices = (len(window.groups), len(window.layers))
            rows = ceil_div(len(window.anchors), ROW_STEP) * ROW_STEP
            columns = len(window.keys)
            weight = hidden.present.new_empty((*matrices, rows, columns))
            row_sum = sums.new_empty((*matrices, columns // KEY_BLOCK, rows))
            column_sum = sums.new_empty((*matrices, rows // ANCHOR_BLOCK, columns))
            first = (
                layers.start + window.layers.start,
                window.layers.start,
                window.groups.start,
                window.anchors.start,
                window.keys.start,
                len(window.layers),
            )
            blocks = rows // ANCHOR_BLOCK * (columns // KEY_BLOCK)
            if blocks:
                _runtime.launch(
                    mi_backward._mi_weights_kernel,
                    (blocks * math.prod(matrices),),
                    hidden.addresses,
                    out.addresses,
                    pairs.token,
                    pairs.word,
                    pairs.size,
                    inverse_norms,
                    similarity.inverse_temperature,
                    anchor_state,
                    scale,
                    weight,
                    row_sum,
                    column_sum,
                    *first,
                    rows,
                    columns,
                    problem.S,
                    problem.N,
                    problem.D,
                    problem.R,
                    problem.A,
                    BOUNDED=similarity.bounded,
                    RESCALE=scale is not None,
                    **problem.dot_constants(weights),
                    **constants(hidden, out),
                    **weights.options,
                )
            anchor_blocks = rows // BLOCK_M if window.writes_anchors else 0
            other_blocks = ceil_div(min(window.keys.stop, problem.N) - window.keys.start, BLOCK_M)
            row_blocks = anchor_blocks + (other_blocks if window.writes_others else 0)
            width_blocks = ceil_div(problem.D, gradient.constants["BLOCK_D"])
            _runtime.launch(
                mi_backward._mi_gradient_kernel,
                (width_blocks * row_blocks * math.prod(matrices),),
                hidden.addresses,
                out.addresses,
                pairs.token,
                pairs.size,
                inverse_norms,
                similarity.inverse_temperature,
                *grad_sums.arguments,
                scale,
                weight,
                row_sum,
                column_sum,
                *stability.arguments,
                *first,
                anchor_blocks,
                row_blocks,
                rows,
                columns,
                problem.S,
                problem.N,
                problem.D,
                problem.R,
                RESCALE=scale is not None,
                STENCIL=stability.num_steps > 0,
                HAS_MASK=stability.num_steps > 0 and stability.mask is not None,
                ANCHOR_BLOCK=ANCHOR_BLOCK,
                KEY_BLOCK=KEY_BLOCK,
                **problem.dot_constants(gradient),
                **constants(hidden, out),
                **gradient.options,
            )
    return sums[:, 0].sum(-1) if needs_work else None


@dataclass(frozen=True)
class _Window:
    """Weights that are held at a time, and the rows of the gradient that are made of them."""

    layers: range  # counted from the loss's first
    groups: range
    anchors: range  # ranks
    keys: range
    writes_anchors: bool  # the gradient of `anchors`: `keys` are all of them
    writes_others: bool  # and of those of `keys` that are no anchors: `anchors` are all of them


class _Problem:
    """Sizes of a problem, and what follows from them."""

    def __init__(self, hidden: LayerTable, pairs: RankTable, similarity: ScaledSimilarity) -> None:
        B, T, self.D = hidden.shape
        self.S, self.R = pairs.token.shape
        self.A = pairs.num_negatives.shape[1]
        self.N = B * T // self.S
        self._dtype = hidden.present.dtype
        self._cosine = similarity.cosine
        self._precision = mi_precision(hidden.present, similarity.cosine)
        self._target = target(hidden.present.device)
        if pairs.num_pairs > _INT32_MAX:
            raise ValueError(f"spans_or_pairs makes {pairs.num_pairs} pairs; more than 2^31 - 1 cannot be numbered.")

    @property
    def budget(self) -> int:
        """Bytes of workspace; so few that the kernels can number the weights of a group in int32."""
        layer = self.S * self.N * self.D * self._dtype.itemsize
        return min(max(WORKSPACE_BYTES, layer), _INT32_MAX * self._dtype.itemsize)

    def configuration(self, kernel: str) -> launch.Configuration:
        """How a kernel is launched."""
        configuration = launch.choose(kernel, self._target, self.N, self._dtype.itemsize)
        assert configuration is not None, f"the launch table has no {kernel} for {self._target}"
        return configuration

    def dot_constants(self, configuration: launch.Configuration) -> dict[str, bool | str]:
        """The compile-time constants of kernels with dot products over D or tiles of it."""
        return {
            "COSINE": self._cosine,
            "EVEN_D": self.D % configuration.constants["BLOCK_D"] == 0,
            "PRECISION": self._precision,
        }

    def windows(self, num_layers: int, row_step: int) -> Iterator[_Window]:
        """The backward in parts that fit into the workspace: layers; or groups of one; or anchors and keys of one."""
        layers, groups, anchors, keys = range(num_layers), range(self.S), range(self.A), range(self.R)
        row_bytes = self.R * self._dtype.itemsize
        group_bytes = max(1, ceil_div(self.A, row_step) * row_step * row_bytes)
        if group_bytes * self.S <= self.budget:
            for chunk in _pieces(layers, self.budget // (group_bytes * self.S)):
                yield _Window(chunk, groups, anchors, keys, True, True)
        elif group_bytes <= self.budget:
            for layer in _pieces(layers, 1):
                for chunk in _pieces(groups, self.budget // group_bytes):
                    yield _Window(layer, chunk, anchors, keys, True, True)
        else:  # the weights between anchors and other keys are made twice
            column_bytes = group_bytes // self.R
            first_key = self.A // RANK_ALIGNMENT * RANK_ALIGNMENT if self.S == 1 else 0
            for layer in _pieces(layers, 1):
                for group in _pieces(groups, 1):
                    for chunk in _pieces(anchors, self.budget // row_bytes, row_step):
                        yield _Window(layer, group, chunk, keys, True, False)
                    for chunk in _pieces(range(first_key, self.R), self.budget // column_bytes, RANK_ALIGNMENT):
                        if chunk.start < self.N:
                            yield _Window(layer, group, anchors, chunk, False, True)


def _pieces(whole: range, most: int, step: int = 1) -> Iterator[range]:
    """Consecutive parts of at most `most` numbers, or a little more: starts are multiples of `step` apart."""
    length = max(most // step, 1) * step
    for start in range(whole.start, whole.stop, length):
        yield range(start, min(start + length, whole.stop))


def _range_scale(sums: Tensor, pairs: RankTable) -> Tensor:
    """`1 / mean(r)^2` over each layer's anchors, `[L_mi]`: with it M' is about as large as W.

    A mean of squared norms instead would be that of a single token a thousand times as long as the others.
    """
    mean = sums[:, 1].sum(-1) / pairs.size[:, 0].sum().clamp_min(1)
    return torch.where(mean > 0, mean.square().reciprocal(), 1.0)
