"""The pairwise similarity matrix, and its gradient.

    d/dh_i = sum_j (G_ij + G_ji) r_i r_j h_j / tau - r_i^2 h_i sum_j (G_ij + G_ji) s_ij

with `G` the upstream gradient (the dot product has r = 1 and no second term).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from carma_kernels._operators import (
    SIMILARITY_SCHEMA,
    SimilarityArguments,
    empty_gradients,
    layer_views,
    register_gradient,
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
    matrix: Tensor = _forward(*similarity_arguments(hidden, layers, similarity, mask, out_dtype))
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


@library.custom_op(
    "carma_kernels::torch_pairwise_similarity", mutates_args=(), schema=f"({SIMILARITY_SCHEMA}) -> Tensor"
)
def _forward(*arguments: Any) -> Tensor:
    problem = _Problem(*arguments)
    out = _empty_matrix(problem)
    B, T, D = problem.layers[0].shape
    with own_precision(out.device):
        rows = LayerRows(problem.layers, at_once=1)
        scale = problem.inverse_temperature
        for place, layer in enumerate(range(*problem.range)):
            out[place].copy_(_scores(rows[layer].view(B, T, D), problem.cosine, problem.mask, scale)[0])
    return out


@_forward.register_fake
def _(*arguments: Any) -> Tensor:
    return _empty_matrix(_Problem(*arguments))


def _empty_matrix(problem: _Problem) -> Tensor:
    B, T, _ = problem.layers[0].shape
    return problem.hidden[0].new_empty((len(range(*problem.range)), B, T, T), dtype=problem.out_dtype)


@library.custom_op(
    "carma_kernels::torch_pairwise_similarity_backward",
    mutates_args=(),
    schema=(
        f"(Tensor grad, Tensor[] kept, bool[] needs_grad, bool needs_work, {SIMILARITY_SCHEMA}) -> (Tensor[], Tensor)"
    ),
)
def _backward(
    grad: Tensor,
    kept: list[Tensor],  # noqa: ARG001
    needs_grad: list[bool],
    needs_work: bool,
    *arguments: Any,
) -> tuple[list[Tensor], Tensor]:
    """The gradients of the hidden states that need one, and `-tau` times that of the temperature."""
    problem = _Problem(*arguments)
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
            upstream = grad[place].to(dtype)  # [B, T, T]
            if problem.mask is not None:  # zeroed, not multiplied: what arrives for masked entries may be anything
                upstream = torch.where(problem.mask[:, :, None] & problem.mask[:, None], upstream, 0.0)
            weight = upstream + upstream.transpose(1, 2)
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


@_backward.register_fake
def _(*upstream_and_arguments: Any) -> tuple[list[Tensor], Tensor]:
    needs_grad, _, *arguments = upstream_and_arguments[2:]
    hidden = _Problem(*arguments).hidden
    return empty_gradients(hidden, needs_grad), hidden[0].new_zeros((), dtype=compute_dtype(hidden[0].dtype))


register_gradient(_forward, _backward, SimilarityArguments, num_losses=1, function="pairwise_similarity")


def _scores(tokens: Tensor, cosine: bool, mask: Tensor | None, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities `[B, T, T]`, inverse norms `[B, T, 1]`, and the tokens `[B, T, D]` with 0 for masked ones."""
    valid = tokens if mask is None else tokens.masked_fill(~mask[:, :, None], 0.0)
    side = inverse_norms(norms(valid.flatten(0, 1))).view(*valid.shape[:2], 1)
    score = torch.bmm(valid, valid.transpose(1, 2)).mul_(scale)
    if cosine:
        score = score.mul_(side).mul_(side.transpose(1, 2))
    return score, side, valid
