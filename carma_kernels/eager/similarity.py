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
    compute_dtype,
    inverse,
    inverse_norms,
    norms,
    own_precision,
    receiving_layers,
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
    def inverse_temperature(self) -> Tensor | float:
        """`1/tau`."""
        temperature = self.temperature_value if self.temperature is None else self.temperature
        return inverse(temperature, compute_dtype(self.hidden[0].dtype))


def _forward(problem: _Problem) -> tuple[Tensor]:
    out = _empty_matrix(problem)
    B, T, D = problem.layers[0].shape
    with own_precision(out.device):
        rows = LayerRows(problem.layers, at_once=1)
        scale = problem.inverse_temperature
        for place, layer in enumerate(range(*problem.range)):
            out[place].copy_(_scores(rows[layer].view(B, T, D), problem.cosine, problem.mask, scale)[0])
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
    layers = problem.layers
    B, T, D = layers[0].shape
    dtype = compute_dtype(layers[0].dtype)
    gradients = empty_gradients(problem.hidden, needs_grad)
    for gradient in gradients:
        gradient.zero_()
    receiver = receiving_layers(problem.hidden, gradients, needs_grad)
    work = layers[0].new_zeros((), dtype=dtype)  # sum of G s over layers
    with own_precision(grad.device):
        rows = LayerRows(layers, at_once=1)
        scale = problem.inverse_temperature
        for place, layer in enumerate(range(*problem.range)):
            if layer not in receiver and not needs_work:
                continue
            score, side, valid = _scores(rows[layer].view(B, T, D), problem.cosine, problem.mask, scale)
            arriving = grad[place].to(dtype)  # [B, T, T]
            if problem.mask is not None:  # zeroed, not multiplied: what arrives for masked entries may be anything
                arriving = torch.where(problem.mask[:, :, None] & problem.mask[:, None], arriving, 0.0)
            weight = arriving + arriving.transpose(1, 2)
            projection = (weight * score).sum(-1, keepdim=True)  # [B, T, 1]
            work += projection.sum() / 2
            if layer not in receiver:
                continue
            if problem.cosine:
                weight *= side
                weight *= side.transpose(1, 2)
            out = torch.bmm(weight.mul_(scale), valid)
            if problem.cosine:
                out.addcmul_(valid, projection * side.square(), value=-1)
            receiver[layer].copy_(out)
    return gradients, work


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


def _scores(tokens: Tensor, cosine: bool, mask: Tensor | None, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities `[B, T, T]`, inverse norms `[B, T, 1]`, and the tokens `[B, T, D]` with 0 for masked ones."""
    valid = tokens if mask is None else tokens.masked_fill(~mask[:, :, None], 0.0)
    side = inverse_norms(norms(valid.flatten(0, 1))).view(*valid.shape[:2], 1)
    score = torch.bmm(valid, valid.transpose(1, 2)).mul_(scale)
    if cosine:
        score = score.mul_(side).mul_(side.transpose(1, 2))
    return score, side, valid
