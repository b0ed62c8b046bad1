"""Similarities of listed pairs of tokens, and their gradient, from one Gram matrix a layer.

    cosine:  s_ij = h_i.h_j r_i r_j,   r = 1 / max(|h|, 1e-8)        dot:  s_ij = h_i.h_j

A pair costs one number read from the matrix, instead of two gathered rows. With `W_ij` the sum of the upstream
gradients of all terms that compare anchor i with token j, and `u = 1/|h|` (0 for a zero vector),

    d/d h_i = sum_j (W_ij + W_ji) r_i r_j h_j - r_i u_i h_i sum_j (W_ij + W_ji) s_ij

(the dot product has r = 1 and no second term). `r` is clamped but differentiated as if it were not, which is what
`torch.nn.functional.cosine_similarity` does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORTEST = 1e-8
"""A norm in the cosine is clamped to it from below."""


class PairSimilarity(torch.autograd.Function):
    """`[B, T, D]` to the similarities `[M, 1+K]` of listed pairs.

    Args of `apply`:
        h: `[B, T, D]`.
        index: `[M, 1+K]` int64, of each pair the place `(b*A + a)*T + t` in `[B, A, T]`.
        anchors: `[A]` positions of the anchors, `a` to `t`; None if every position is one, A = T.
        cosine: or else the dot product.
        dtype: what similarities and norms are rounded to.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, index: Tensor, anchors: Tensor | None, cosine: bool, dtype: torch.dtype) -> Tensor:
        """Similarities in `dtype`."""
        with _own_precision(h.device.type):
            rows = _rows(h)  # [B, T, D]
            norm = torch.linalg.vector_norm(rows, dim=-1)  # [B, T]
            scale = _scale(norm, dtype)
            gram = torch.bmm(_of_anchors(rows, anchors), rows.mT)  # [B, A, T]
            if cosine:
                gram *= _of_anchors(scale, anchors)[:, :, None]
                gram *= scale[:, None]
            similarity = gram.view(-1).index_select(0, index.view(-1)).view(index.shape)
        ctx.save_for_backward(h, index, anchors, norm, scale, similarity)
        ctx.cosine = cosine
        return similarity.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of `h`."""
        h, index, anchors, norm, scale, similarity = ctx.saved_tensors
        B, T, _ = h.shape
        A = T if anchors is None else len(anchors)
        with _own_precision(h.device.type):
            rows, norm, scale = _without_unused(_rows(h), norm, scale, index, anchors)
            grad = grads[0].to(rows.dtype)  # [M, 1+K]
            weight = _sum_by_place(grad, index, B * A * T).view(B, A, T)
            weight_of_row: Tensor | None = None
            if ctx.cosine:
                pull = _sum_by_place(grad * similarity, index, B * A * T).view(B, A, T)
                along = _add_to_anchors(pull.sum(1), pull.sum(2), anchors)  # [B, T]
                weight_of_row = along * scale * torch.where(norm > 0, norm.reciprocal(), 0.0)
                weight *= _of_anchors(scale, anchors)[:, :, None]
                weight *= scale[:, None]
            if anchors is None:  # one product for both sides of the pairs, and the projection in its diagonal
                weight = weight + weight.mT
                if weight_of_row is not None:
                    weight.diagonal(dim1=1, dim2=2).sub_(weight_of_row)
                out = torch.bmm(weight, rows)
            else:
                out = torch.bmm(weight.mT, _of_anchors(rows, anchors))
                _add_to_anchors(out, torch.bmm(weight, rows), anchors)
                if weight_of_row is not None:
                    out.addcmul_(rows, weight_of_row[:, :, None], value=-1)
        return out.to(h.dtype), None, None, None, None


def _own_precision(device_type: str) -> AbstractContextManager[object]:
    """Keep an ambient autocast out; entering a context costs as much as a small layer's product, so only then."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _rows(h: Tensor) -> Tensor:
    """In fp32, or in fp64 for fp64."""
    return h if h.dtype == torch.float64 else h.float()


def _scale(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """`r`, of norms in `dtype`: fp16 knows no 1e-8, and has no cosine for a zero vector."""
    return norm.to(dtype).clamp_min(SHORTEST).to(norm.dtype).reciprocal()


def _of_anchors(of_tokens: Tensor, anchors: Tensor | None) -> Tensor:
    """`[B, T, ...]` to `[B, A, ...]`."""
    return of_tokens if anchors is None else of_tokens.index_select(1, anchors)


def _add_to_anchors(of_tokens: Tensor, of_anchors: Tensor, anchors: Tensor | None) -> Tensor:
    """Add `[B, A, ...]` to the anchors among `[B, T, ...]`, in place."""
    return of_tokens.add_(of_anchors) if anchors is None else of_tokens.index_add_(1, anchors, of_anchors)


def _sum_by_place(values: Tensor, index: Tensor, size: int) -> Tensor:
    """`[size]`, in each place the sum of its values, in a fixed order."""
    total = values.new_zeros(size)
    if values.device.type == "cpu":
        return total.index_add_(0, index.view(-1), values.reshape(-1))
    # sorts the places, where index_add_ on a GPU would add in whatever order the atomics come
    return total.index_put_((index.view(-1),), values.reshape(-1), accumulate=True)


def _without_unused(
    rows: Tensor, norm: Tensor, scale: Tensor, index: Tensor, anchors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, norms and `r` with 0, 1, 1 for what no pair looks at: a weight of 0 would not keep an inf or NaN out."""
    harmless = (norm * scale).isfinite()
    if rows.device.type == "cpu" and bool(harmless.all()):  # on a GPU, looking would mean waiting
        return rows, norm, scale
    B, T, _ = rows.shape
    A = T if anchors is None else len(anchors)
    compared = torch.zeros(B, A, T, dtype=torch.bool, device=rows.device)
    compared.view(-1).index_fill_(0, index.view(-1), True)
    as_anchor = torch.zeros_like(norm, dtype=torch.bool)
    used = compared.any(1) | _add_to_anchors(as_anchor, compared.any(2), anchors)  # [B, T]
    return torch.where(used[:, :, None], rows, 0.0), torch.where(used, norm, 1.0), torch.where(used, scale, 1.0)
