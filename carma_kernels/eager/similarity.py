"""The pairwise similarity matrix, and its gradient.

    d/dh_i = sum_j (G_ij + G_ji) r_i r_j h_j / tau - r_i^2 h_i sum_j (G_ij + G_ji) s_ij

with `G` the upstream gradient (the dot product has r = 1 and no second term).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from carma_kernels._operators import forbid_double_backward
from carma_kernels._terms import Similarity
from carma_kernels.eager.layers import (
    LayerRows,
    compute_dtype,
    empty_gradients,
    inverse,
    inverse_norms,
    layer_views,
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
    problem = _Problem(
        hidden=[hidden] if isinstance(hidden, Tensor) else list(hidden),
        mask=mask,
        temperature=similarity.temperature if isinstance(similarity.temperature, Tensor) else None,
        temperature_value=1.0 if isinstance(similarity.temperature, Tensor) else similarity.temperature,
        cosine=similarity.cosine,
        range=[layers.start, layers.stop],
        out_dtype=out_dtype,
    )
    matrix: Tensor = _forward(*problem)
    return matrix


class _Problem(NamedTuple):
    """The operators' arguments, in the order of `_ARGUMENTS`."""

    hidden: list[Tensor]  # [L, B, T, D] alone, or L times [B, T, D]
    mask: Tensor | None  # [B, T]
    temperature: Tensor | None  # 0-d
    temperature_value: float  # if temperature is None
    cosine: bool
    range: list[int]
    out_dtype: torch.dtype

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """`[B, T, D]` each."""
        return layer_views(self.hidden)

    @property
    def inverse_temperature(self) -> Tensor | float:
        """`1/tau`."""
        temperature = self.temperature_value if self.temperature is None else self.temperature
        return inverse(temperature, compute_dtype(self.hidden[0].dtype))


_ARGUMENTS = (
    "Tensor[] hidden, Tensor? mask, Tensor? temperature, float temperature_value, bool cosine, int[] range, "
    "ScalarType out_dtype"
)


@torch.library.custom_op(
    "carma_kernels::torch_pairwise_similarity", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
def _forward(*arguments: Any) -> Tensor:
    problem = _Problem(*arguments)
    out = _empty_matrix(problem)
    B, T, D = problem.layers[0].shape
    with own_precision(out.device):
        rows = LayerRows(problem.layers)
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


@torch.library.custom_op(
    "carma_kernels::torch_pairwise_similarity_backward",
    mutates_args=(),
    schema=f"(Tensor grad, bool[] needs_grad, {_ARGUMENTS}) -> (Tensor[], Tensor)",
)
def _backward(grad: Tensor, needs_grad: list[bool], *arguments: Any) -> tuple[list[Tensor], Tensor]:
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
        rows = LayerRows(layers)
        scale = problem.inverse_temperature
        for place, layer in enumerate(range(*problem.range)):
            if layer not in receiver and problem.temperature is None:
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
def _(grad: Tensor, needs_grad: list[bool], *arguments: Any) -> tuple[list[Tensor], Tensor]:  # noqa: ARG001
    hidden = _Problem(*arguments).hidden
    return empty_gradients(hidden, needs_grad), hidden[0].new_zeros((), dtype=compute_dtype(hidden[0].dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    problem = _Problem(*inputs)
    ctx.problem = problem._replace(hidden=[], mask=None, temperature=None)
    ctx.has = (problem.mask is not None, problem.temperature is not None)
    optional = [tensor for tensor in (problem.mask, problem.temperature) if tensor is not None]
    ctx.save_for_backward(*optional, *problem.hidden)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = iter(ctx.saved_tensors)
    mask, temperature = (next(tensors) if present else None for present in ctx.has)
    problem = ctx.problem._replace(hidden=list(tensors), mask=mask, temperature=temperature)
    needs_hidden = list(ctx.needs_input_grad[0])
    gradients, work = _backward(grad, needs_hidden, *problem)
    each = [gradients.pop(0) if needed else None for needed in needs_hidden]
    grad_temperature = None
    if temperature is not None and ctx.needs_input_grad[2]:  # d s / d tau = -s / tau
        grad_temperature = (-work / temperature).to(temperature.dtype)
    return each, None, grad_temperature, *[None] * (len(problem) - 3)


_forward.register_autograd(_differentiate, setup_context=_setup_context)
forbid_double_backward(_backward, "pairwise_similarity")


def _scores(tokens: Tensor, cosine: bool, mask: Tensor | None, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities `[B, T, T]`, inverse norms `[B, T, 1]`, and the tokens `[B, T, D]` with 0 for masked ones."""
    valid = tokens if mask is None else tokens.masked_fill(~mask[:, :, None], 0.0)
    side = inverse_norms(norms(valid.flatten(0, 1))).view(*valid.shape[:2], 1)
    score = torch.bmm(valid, valid.transpose(1, 2)).mul_(scale)
    if cosine:
        score = score.mul_(side).mul_(side.transpose(1, 2))
    return score, side, valid
