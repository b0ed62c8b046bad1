"""The last step of the MI loss's gradient, from rows of M' H: their projection, and the stability loss's stencil."""

import triton
import triton.language as tl

from carma_kernels.kernels.mi import halves
from carma_kernels.kernels.stability import stencil_weights
from carma_kernels.kernels.tiles import layer_pointer, load_rows, rounded, stencil


@triton.jit
def write_gradient(
    gradient,  # [BLOCK_M, BLOCK_D] sum of M' h
    projection,  # [BLOCK_M] sum of M' and the dot products; COSINE
    rows,  # tokens, whether they are written, whether they are in the MI loss: [BLOCK_M] each
    layers,  # hidden_table, out_table, and the layer
    mi,  # where its upstream gradient lies, what that is multiplied by, inverse_temperature_ptr, range_scale_ptr
    stability,  # as `stencil_weights` takes it, less the layer
    tables,  # inverse_norm_ptr, stencil_mask_ptr
    place,  # of the layer in the loss, S, group, N, D, first column
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COSINE: tl.constexpr,
    RESCALE: tl.constexpr,
    STENCIL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """From the sums of M' h of some rows to their gradient, stored with the stencil."""
    token, is_own, is_key = rows
    _, _, layer = layers
    grad_sum_ptr, mi_factor, inverse_temperature_ptr, range_scale_ptr = mi
    inverse_norm_ptr, stencil_mask_ptr = tables
    state, S, group, N, D, width_start = place
    factor = mi_factor * tl.load(grad_sum_ptr) * tl.load(inverse_temperature_ptr)
    if RESCALE:
        factor /= tl.load(range_scale_ptr + state)
    if COSINE:
        inverse_norm = tl.load(inverse_norm_ptr + (state * S + group) * N + token)
        projection *= inverse_norm * inverse_norm
    is_read = is_key
    in_stability = is_key
    weights = (0.0, 0.0, 0.0)
    if STENCIL:
        in_stability = is_own
        if HAS_MASK:
            in_stability &= tl.load(stencil_mask_ptr + group * N + token) != 0
        is_read |= in_stability
        losses_ptr, scale_ptr, upstream, stability_start, num_steps = stability
        weights = stencil_weights(losses_ptr, scale_ptr, upstream, layer, stability_start, num_steps)
    offset = token[:, None].to(tl.int64) * D + group * N * D
    _write_rows(
        gradient,
        (is_own, is_read, is_key, in_stability, projection, offset),
        (factor, weights),
        layers,
        width_start,
        D,
        DTYPE,
        ALIGNMENT,
        COSINE,
        STENCIL,
        INTERPRETED,
        BLOCK_M,
        BLOCK_D,
        PIECES,
    )


@triton.jit
def _write_rows(
    gradient,  # [BLOCK_M, BLOCK_D] sum of M' h
    rows,  # whether to write, to read, in the MI loss, in the stability loss; projection; offset [BLOCK_M, 1]
    scales,  # of the MI loss's part, and the weights of the stencil
    layers,
    width_start,
    D,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COSINE: tl.constexpr,
    STENCIL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Store the rows, less their projection, with the stencil; those that take part in neither loss as zeros."""
    if PIECES > 1:
        left, right = halves(gradient, BLOCK_M, BLOCK_D)
        HALF: tl.constexpr = BLOCK_D // 2
        _write_rows(
            left,
            rows,
            scales,
            layers,
            width_start,
            D,
            DTYPE,
            ALIGNMENT,
            COSINE,
            STENCIL,
            INTERPRETED,
            BLOCK_M,
            HALF,
            PIECES // 2,
        )
        _write_rows(
            right,
            rows,
            scales,
            layers,
            width_start + HALF,
            D,
            DTYPE,
            ALIGNMENT,
            COSINE,
            STENCIL,
            INTERPRETED,
            BLOCK_M,
            HALF,
            PIECES // 2,
        )
    else:
        is_own, is_read, is_key, in_stability, projection, offset = rows
        factor, weights = scales
        before, after, own = weights
        hidden_table, out_table, layer = layers
        offs_d = width_start + tl.arange(0, BLOCK_D)
        in_width = (offs_d < D)[None, :]
        offset += offs_d[None, :]
        hidden_ptr = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT)
        hidden = load_rows(hidden_ptr, offset, is_read[:, None] & in_width)
        if COSINE:
            gradient -= projection[:, None] * hidden
        gradient = tl.where(is_key[:, None], gradient * factor, 0.0)
        if STENCIL:
            mask = in_stability[:, None] & in_width
            gradient += stencil(hidden, hidden_table, layer, offset, mask, before, after, own, DTYPE, ALIGNMENT)
        out_ptr = layer_pointer(out_table, layer, DTYPE, ALIGNMENT)
        tl.store(out_ptr + offset, rounded(gradient, DTYPE, INTERPRETED), mask=is_own[:, None] & in_width)
