"""The pairwise similarity matrix, and its gradient.

    d/dh_i = sum_j (G_ij + G_ji) r_i r_j h_j / tau - r_i^2 h_i sum_j (G_ij + G_ji) s_ij

with `G` the upstream gradient (the dot product has r = 1 and no second term).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from carma_kernels._autograd import Operation
from carma_kernels._operators import (
    SIMILARITY_SCHEMA,
    SimilarityArguments,
    empty_gradients,
    layer_views,
    similarity_arguments,
)
from carma_kernels._terms import Similarity
from carma_kernels.eager.layers import (
    LayerRows,
    Receivers,
    compute_dtype,
    inverse,
    inverse_norms,
    layers_at_once,
    norms,
    own_precision,
    places,
    products,
    runs,
    tile_size,
)


def pairwise_similarity(
    hidden: Tensor | Sequence[Tensor],
    layers: range,
    similarity: Similarity,
    mask: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`[len(layers), B, T, T]` in `out_dtype`: see `carma_kernels.pairwise_similarity`."""
    (matrix,) = _operation(_Problem(*similarity_arguments(hidden, layers, similarity, mask, out_dtype)))
    return matrix


class _Problem(SimilarityArguments):
    """What the operators were asked."""

    __slots__ = ()

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """`[B, T, D]` each."""
        return layer_views(self.hidden)

    @property
    def invalid(self) -> Tensor | None:
        """The masked tokens `[B, T, 1]`."""
        return None if self.mask is None else ~self.mask[:, :, None]

    @property
    def inverse_temperature(self) -> Tensor | float:
        """`1/tau`."""
        temperature = self.temperature_value if self.temperature is None else self.temperature
        return inverse(temperature, compute_dtype(self.hidden[0].dtype))


def _forward(problem: _Problem) -> tuple[Tensor]:
    out = _empty_matrix(problem)
    B, T, _ = problem.layers[0].shape
    layers = range(*problem.range)
    with own_precision(out.device):
        rows = LayerRows(problem.hidden)
        scale = problem.inverse_temperature
        for run in runs(layers, _at_once(problem)):
            here = rows.rows(run, range(0))
            score, *_ = _scores(here.unflatten(1, (B, T)), problem.cosine, problem.invalid, scale)
            out[places(run, layers)].copy_(score)
    return (out,)


def _empty_matrix(problem: _Problem) -> Tensor:
    B, T, _ = problem.layers[0].shape
    return problem.hidden[0].new_empty((len(range(*problem.range)), B, T, T), dtype=problem.out_dtype)


def _backward(
    problem: _Problem,
    upstream: tuple[Tensor | None, ...],
    _kept: list[Tensor],
    needs_grad: list[bool],
    needs_work: bool,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the hidden states that need one, and `-tau` times that of the temperature."""
    (grad,) = upstream
    assert grad is not None
    first = problem.layers[0]
    B, T, _ = first.shape
    dtype = compute_dtype(first.dtype)
    gradients = empty_gradients(problem.hidden, needs_grad)
    for gradient in gradients:
        gradient.zero_()
    receivers = Receivers(problem.hidden, gradients, needs_grad)
    works: list[Tensor] = []  # sums of G s
    layers = range(*problem.range)
    with own_precision(grad.device):
        rows = LayerRows(problem.hidden)
        scale = problem.inverse_temperature
        for run in runs([layer for layer in layers if layer in receivers or needs_work], _at_once(problem)):
            here = rows.rows(run, range(0))
            score, side, valid = _scores(here.unflatten(1, (B, T)), problem.cosine, problem.invalid, scale)
            arriving = grad[places(run, layers)].to(dtype)  # [l, B, T, T]
            if problem.invalid is not None:  # zeroed, not multiplied: what arrives for masked entries may be anything
                arriving = arriving.masked_fill(problem.invalid | problem.invalid.transpose(1, 2), 0.0)
            weight = arriving + arriving.transpose(2, 3)
            projection = (weight * score).sum(-1, keepdim=True)  # [l, B, T, 1]
            works.append(projection.sum() / 2)
            if not any(layer in receivers for layer in run):
                continue
            room = receivers.room(run)
            if problem.cosine:
                weight *= side
                weight *= side.transpose(2, 3)
            valid = valid.to(dtype)
            of_tokens = room.unflatten(1, (B, T)).flatten(0, 1)  # [l*B, T, D]
            torch.bmm(weight.mul_(scale).flatten(0, 1), valid.flatten(0, 1), out=of_tokens)
            if problem.cosine:
                room.addcmul_(valid.flatten(1, 2), (projection * side.square()).flatten(1, 2), value=-1)
            receivers.receive(run, room)
    return gradients, sum(works, first.new_zeros((), dtype=dtype))


def _empty_backward(problem: _Problem, needs_grad: list[bool]) -> tuple[list[Tensor], Tensor]:
    hidden = problem.hidden
    return empty_gradients(hidden, needs_grad), hidden[0].new_zeros((), dtype=compute_dtype(hidden[0].dtype))


_operation = Operation(
    "torch_pairwise_similarity",
    "pairwise_similarity",
    SIMILARITY_SCHEMA,
    _Problem,
    forward=_forward,
    empty=lambda problem: (_empty_matrix(problem),),
    num_results=1,
    num_outputs=1,
    kept=(),
    backward=_backward,
    empty_backward=_empty_backward,
)


def _at_once(problem: _Problem) -> int:
    """How many layers to take together."""
    first = problem.layers[0]
    B, T, _ = first.shape
    return layers_at_once(first, tile_size(first.numel(), first.device) // max(1, B * T * T))


def _scores(
    tokens: Tensor, cosine: bool, invalid: Tensor | None, scale: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities `[l, B, T, T]`, inverse norms `[l, B, T, 1]`, and the tokens `[l, B, T, D]`, 0 for masked ones."""
    valid = tokens if invalid is None else tokens.masked_fill(invalid, 0.0)
    side = inverse_norms(norms(valid))[..., None]
    rows = valid.flatten(0, 1)
    score = products(rows, rows).unflatten(0, valid.shape[:2]).mul_(scale)
    if cosine:
        score = score.mul_(side).mul_(side.transpose(2, 3))
    return score, side, valid
