"""The pairwise similarity matrix, and its gradient.

    d/dh_i = sum_j (G_ij + G_ji) r_i r_j h_j / tau - r_i^2 h_i sum_j (G_ij + G_ji) s_ij

with `G` the upstream gradient (the dot product has r = 1 and no second term).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from carma_kernels._terms import Similarity
from carma_kernels.eager.layers import (
    LayerRows,
    compute_dtype,
    inverse,
    inverse_norms,
    layer_views,
    norms,
    own_precision,
)


def pairwise_similarity(
    hidden: Tensor | Sequence[Tensor],
    layers: range,
    similarity: Similarity,
    mask: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`[len(layers), B, T, T]` in `out_dtype`: see `carma_kernels.pairwise_similarity`."""
    tensors = (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)
    stacked = isinstance(hidden, Tensor)
    matrix: Tensor = _PairwiseSimilarity.apply(
        (layers, stacked, similarity.cosine, mask, out_dtype), similarity.temperature, *tensors
    )
    return matrix


class _PairwiseSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[range, bool, bool, Tensor | None, torch.dtype],
        temperature: Tensor | float,
        *hidden: Tensor,
    ) -> Tensor:
        chosen, stacked, cosine, mask, out_dtype = options
        layers = layer_views(hidden, stacked)
        B, T, _ = layers[0].shape
        out = torch.empty(len(chosen), B, T, T, dtype=out_dtype, device=layers[0].device)
        with own_precision(out.device):
            rows = LayerRows(layers)
            scale = inverse(temperature, compute_dtype(layers[0].dtype))
            for place, layer in enumerate(chosen):
                out[place].copy_(_scores(rows[layer].view(B, T, -1), cosine, mask, scale)[0])
        ctx.options = options
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(*([temperature] if isinstance(temperature, Tensor) else []), *hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chosen, stacked, cosine, mask, _ = ctx.options
        hidden = list(ctx.saved_tensors)
        temperature = hidden.pop(0) if ctx.temperature is None else ctx.temperature
        layers = layer_views(tuple(hidden), stacked)
        B, T, D = layers[0].shape
        dtype = compute_dtype(layers[0].dtype)
        gradients = [
            torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) if needed else None
            for tensor, needed in zip(hidden, ctx.needs_input_grad[2:], strict=True)
        ]
        work = torch.zeros((), dtype=dtype, device=grad.device)  # sum of G s over layers
        with own_precision(grad.device):
            rows = LayerRows(layers)
            scale = inverse(temperature, dtype)
            for place, layer in enumerate(chosen):
                gradient = gradients[0] if stacked else gradients[layer]
                if gradient is None and not ctx.needs_input_grad[1]:
                    continue
                tokens = rows[layer].view(B, T, D)
                score, side, valid = _scores(tokens, cosine, mask, scale)
                upstream = grad[place].to(dtype)  # [B, T, T]
                if mask is not None:  # zeroed, not multiplied: what arrives for masked entries may be anything
                    upstream = torch.where(mask[:, :, None] & mask[:, None], upstream, 0.0)
                weight = upstream + upstream.transpose(1, 2)
                projection = (weight * score).sum(-1, keepdim=True)  # [B, T, 1]
                work += projection.sum() / 2
                if gradient is None:
                    continue
                if cosine:
                    weight = weight * side * side.transpose(1, 2)
                out = torch.bmm(weight * scale, valid)
                if cosine:
                    out.addcmul_(valid, projection * side.square(), value=-1)
                (gradient[layer] if stacked else gradient).copy_(out)
        grad_temperature = None
        if ctx.needs_input_grad[1]:  # d s / d tau = -s / tau
            grad_temperature = (-work * scale).to(temperature.dtype)
        return None, grad_temperature, *gradients


def _scores(tokens: Tensor, cosine: bool, mask: Tensor | None, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities `[B, T, T]`, inverse norms `[B, T, 1]`, and the tokens `[B, T, D]` with 0 for masked ones."""
    valid = tokens if mask is None else tokens.masked_fill(~mask[:, :, None], 0.0)
    side = inverse_norms(norms(valid.view(-1, valid.shape[-1]))).view(*valid.shape[:2], 1)
    score = torch.bmm(valid, valid.transpose(1, 2)).mul_(scale)
    if cosine:
        score = score.mul_(side).mul_(side.transpose(1, 2))
    return score, side, valid
