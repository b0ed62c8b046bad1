"""The MI loss of listed pairs, each with its own `K` negatives, and its gradient.

A pair p with anchor i has 1+K slots: slot 0 holds its positive, the others its negatives, or no token. With s the
similarity of i to a slot's token and z the log-sum-exp over the negatives,

    cost     = softplus(z - s_0)
    d cost/ds = W = -sigmoid(z - s_0) for slot 0,  exp(s_k - z) sigmoid(z - s_0) for a negative

    d/dh_i = r_i / tau * sum of W r_j h_j  -  r_i^2 h_i sum of W s,    sums over the slots that touch i

where j is the other end of the slot's edge: the gradient of a token is a sum over the slots of which it is the anchor
or the token. An index, sorted once, lists these for every token, so that each row has one owner and one order of
summation (the dot product has r = 1 and no second term of d/dh_i).
"""

import triton
import triton.language as tl

from carma_kernels.kernels.jit import kernel
from carma_kernels.kernels.stability import stencil_weights
from carma_kernels.kernels.tiles import (
    has_layer,
    layer_pointer,
    load_rows,
    log_of_sum,
    mask_if,
    pid64,
    place_in_grid,
    rounded,
    softplus_sigmoid,
    stencil,
)


@kernel("first_layer", "N", "K", "stride_negatives_l")
def _pairs_forward_kernel(
    hidden_table,  # [L] addresses of [N, D]
    anchor_ptr,  # [P] int32
    positive_ptr,  # [P] int32
    negatives_ptr,  # [P, K] or [L, P, K] int32, -1 for no token
    inverse_norm_ptr,  # [L, N]
    inverse_temperature_ptr,  # 0-d
    cost_ptr,  # [L, P]
    score_ptr,  # [L, P, 1+K]: s of every slot
    summary_ptr,  # [L, P, 2]: z, and the sum of W s
    first_layer,
    N,
    D,
    K,
    stride_negatives_l,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,  # noqa: ARG001 (all kernels over layers take it)
    COSINE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One pair in one layer. Grid (P, L)."""
    pair = pid64(0)
    place = pid64(1)
    hidden_ptr = layer_pointer(hidden_table, first_layer + place, DTYPE, ALIGNMENT)
    anchor = tl.load(anchor_ptr + pair).to(tl.int64)
    scale = tl.load(inverse_temperature_ptr)
    if COSINE:
        inverse_norm_ptr += place * N
        scale *= tl.load(inverse_norm_ptr + anchor)
    row = place * tl.num_programs(0) + pair
    score_ptr += row * (K + 1)
    negatives_ptr += place * stride_negatives_l + pair * K

    positive_score = 0.0
    largest = float("-inf")
    total = 0.0  # of exp(s - largest) over the negatives
    weighted = 0.0  # of s exp(s - largest)
    for first in range(0, K + 1, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        token = tl.load(negatives_ptr + slot - 1, mask=(slot > 0) & (slot <= K), other=-1)
        token = tl.where(slot == 0, tl.load(positive_ptr + pair), token).to(tl.int64)
        is_token = token >= 0
        product = tl.zeros((BLOCK_K,), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            h_i = load_rows(hidden_ptr, anchor * D + d, d < D)
            h_j = load_rows(hidden_ptr, token[:, None] * D + d[None, :], is_token[:, None] & (d < D)[None, :])
            product += tl.sum(h_i[None, :] * h_j, 1)
        s = product * scale
        if COSINE:
            s *= tl.load(inverse_norm_ptr + token, mask=is_token, other=0.0)
        tl.store(score_ptr + slot, s, mask=slot <= K)

        is_negative = is_token & (slot > 0)
        positive_score += tl.sum(tl.where(slot == 0, s, 0.0), 0)
        negative_score = tl.where(is_negative, s, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(negative_score, 0))
        shift = tl.where(new_largest > float("-inf"), new_largest, 0.0)
        share = tl.exp(negative_score - shift)
        total = total * tl.exp(largest - shift) + tl.sum(share, 0)
        weighted = weighted * tl.exp(largest - shift) + tl.sum(s * share, 0)
        largest = new_largest

    has_negatives = total > 0
    z = log_of_sum(largest, total)
    cost, pull = softplus_sigmoid(z - positive_score)
    work = pull * (tl.where(has_negatives, weighted / tl.where(has_negatives, total, 1.0), 0.0) - positive_score)
    tl.store(cost_ptr + row, cost)
    tl.store(summary_ptr + row * 2, z)
    tl.store(summary_ptr + row * 2 + 1, work)


@kernel(
    "L",
    "N",
    "grad_sums_stride",
    "mi_factor",
    "grad_losses_stride",
    "stability_factor",
    "stability_start",
    "num_steps",
    "first_layer",
    "num_slots",
    "num_edges",
    "stride_start_l",
)
def _pairs_backward_kernel(
    hidden_table,  # [L] addresses of [N, D]
    out_table,  # [L] addresses of [N, D], 0 for no gradient
    start_ptr,  # [N+1] or [L, N+1] int64: where in the index the edges of a token start
    edge_ptr,  # index: pair * (1+K) + slot, int32
    other_ptr,  # index: the token at the other end, int32
    score_ptr,  # [L, P, 1+K]
    summary_ptr,  # [L, P, 2]
    inverse_norm_ptr,  # [L, N]
    inverse_temperature_ptr,  # 0-d
    grad_sums_ptr,  # [L] upstream of the MI loss, with a stride; 0-d with one of 0
    grad_sums_stride,
    mi_factor,  # of what is upstream
    losses_ptr,  # [num_steps] of the stability loss
    scale_ptr,  # [num_steps]
    grad_losses_ptr,  # [num_steps] upstream of the stability loss, likewise
    grad_losses_stride,
    stability_factor,
    stability_start,  # first layer of the stability loss
    num_steps,
    stability_mask_ptr,  # [N] uint8
    first_layer,
    L,
    N,
    D,
    num_slots,  # 1+K
    num_edges,  # P * (1+K)
    stride_start_l,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_STENCIL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A piece of one row of the gradient, stability included. Grid: blocks of D, fastest, * layers L * tokens N.

    Layers come before tokens, so that their stencils find the neighbouring layers in the L2 cache.
    """
    block, place, token = place_in_grid(tl.cdiv(D, BLOCK_D), L)
    layer = first_layer + place
    if not has_layer(out_table, layer):
        return
    hidden_ptr = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT)
    if COSINE:
        inverse_norm_ptr += place * N
    score_ptr += place * num_edges
    summary_ptr += place * (num_edges // num_slots) * 2
    start_ptr += place * stride_start_l + token
    start = tl.load(start_ptr)
    stop = tl.load(start_ptr + 1)
    d = block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    offset = token * D + d
    in_row = d < D

    x = tl.zeros((BLOCK_D,), tl.float32)  # sum of W r_j h_j
    work = 0.0  # sum of W s
    for n in range(start, stop):
        other = tl.load(other_ptr + n).to(tl.int64)
        weight, score = _edge(score_ptr, summary_ptr, tl.load(edge_ptr + n), num_slots)
        work += weight * score
        if COSINE:
            weight *= tl.load(inverse_norm_ptr + other)
        x += weight * load_rows(hidden_ptr, other * D + d, in_row)
    x *= tl.load(inverse_temperature_ptr)
    if COSINE:
        has_edges = start < stop  # padding and foreign tokens are not read
        r = tl.load(inverse_norm_ptr + token, mask=has_edges, other=0.0)
        x = r * (x - work * r * load_rows(hidden_ptr, offset, mask_if(in_row, has_edges)))
    x *= mi_factor * tl.load(grad_sums_ptr + place * grad_sums_stride)
    if HAS_STENCIL:
        takes_part = True
        if HAS_MASK:
            takes_part = tl.load(stability_mask_ptr + token) != 0
        upstream = (grad_losses_ptr, grad_losses_stride, stability_factor)
        before, after, own = stencil_weights(losses_ptr, scale_ptr, upstream, layer, stability_start, num_steps)
        mask = mask_if(in_row, takes_part)
        h = load_rows(hidden_ptr, offset, mask)
        x += stencil(h, hidden_table, layer, offset, mask, before, after, own, DTYPE, ALIGNMENT)
    out_ptr = layer_pointer(out_table, layer, DTYPE, ALIGNMENT)
    tl.store(out_ptr + offset, rounded(x, DTYPE, INTERPRETED), mask=in_row)


@triton.jit
def _edge(score_ptr, summary_ptr, edge, num_slots):
    """`W` and `s` of a slot that holds a token."""
    pair = edge // num_slots
    z = tl.load(summary_ptr + pair.to(tl.int64) * 2)
    positive_score = tl.load(score_ptr + pair * num_slots)
    _, pull = softplus_sigmoid(z - positive_score)
    score = tl.load(score_ptr + edge)
    if edge == pair * num_slots:  # noqa: SIM108 (Triton has no ternary for what is known at run time)
        weight = -pull
    else:
        weight = pull * tl.exp(score - z)
    return weight, score
