"""The gradient of the MI loss against all negatives of a group. Letters as in `carma_kernels.kernels.mi`.

    M             = W + W^T
    d loss/d h_i  = r_i / tau sum_j M_ij r_j h_j  -  r_i^2 h_i sum_j M_ij s_ij

(the dot product has r = 1 and no second term).

    weights       tiles of anchors x keys -> M' = M_ij r_i r_j, in the dtype of the hidden states, and the sums of
                  M'_ij h_i.h_j over its rows and columns. One dot product and the statistics of both its tokens give M
                  whole: nothing is transposed.
    gradient      rows of M' H: an anchor's over all keys, another token's over the anchors alone. Every row is written
                  once, with its projection and the stability loss's stencil.

The projection is made from M' as it was rounded; from the exact one, the error would grow with the mean similarity.
"""

import triton
import triton.language as tl

from carma_kernels.kernels.jit import kernel
from carma_kernels.kernels.mi import (
    MINUS_INFINITY,
    NO_ANCHOR,
    NO_WORD,
    gram,
    group_sizes,
    halves,
    may_hold_positives,
)
from carma_kernels.kernels.mi_rows import write_gradient
from carma_kernels.kernels.tiles import (
    dot,
    has_layer,
    layer_pointer,
    place_in_grid,
    rounded,
    softplus_sigmoid,
)

INFINITY = tl.constexpr(float("inf"))
LARGEST_HALF = tl.constexpr(65504.0)


@kernel(
    "first_layer",
    "first_state",
    "first_group",
    "first_anchor",
    "first_key",
    "num_layers",
    "S",
    "N",
    "A",
    aligned=("weight_ptr",),
)
def _mi_weights_kernel(
    hidden_table,  # [L] addresses of [S, N, D]
    out_table,  # [L] addresses of the gradients, 0 for none
    token_ptr,  # [S, R]
    word_ptr,  # [S, R]
    size_ptr,  # [S, 2]
    inverse_norm_ptr,  # [layers, S, N]
    inverse_temperature_ptr,  # 0-d
    anchor_state_ptr,  # [layers, S, 2, A]
    range_scale_ptr,  # [layers] what M' is multiplied by, where it would leave the range of fp16
    weight_ptr,  # [groups and layers of this launch, ROWS, COLUMNS] M'
    row_sum_ptr,  # [groups and layers of this launch, key blocks, ROWS] of M' and the dot products
    column_sum_ptr,  # [groups and layers of this launch, anchor blocks, COLUMNS]
    first_layer,
    first_state,
    first_group,
    first_anchor,
    first_key,
    num_layers,  # of this launch
    ROWS,
    COLUMNS,
    S,
    N,
    D,
    R,
    A,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COSINE: tl.constexpr,
    BOUNDED: tl.constexpr,
    RESCALE: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One tile of M'. Grid: tiles of the workspace, fastest, * its layers * its groups."""
    anchor_blocks = ROWS // BLOCK_M
    key_blocks = COLUMNS // BLOCK_N
    number, place, group_place = place_in_grid(anchor_blocks * key_blocks, num_layers)
    tile = number.to(tl.int32)
    anchor_block = tile % anchor_blocks
    key_block = tile // anchor_blocks
    anchor_start = first_anchor + anchor_block * BLOCK_M
    key_start = first_key + key_block * BLOCK_N
    group = first_group + group_place
    num_anchors, num_valid = group_sizes(size_ptr, group)
    layer = first_layer + place
    if (anchor_start >= num_anchors) | (key_start >= num_valid):
        return
    if not has_layer(out_table, layer):
        return
    hidden_ptr = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT) + group * N * D
    state = first_state + place
    anchor_state_ptr += (state * S + group) * 2 * A
    token_ptr += group * R
    word_ptr += group * R
    rank = anchor_start + tl.arange(0, BLOCK_M)
    is_anchor = rank < num_anchors
    anchor_token = tl.load(token_ptr + tl.minimum(rank, num_anchors - 1))
    key_token = tl.load(token_ptr + tl.minimum(key_start + tl.arange(0, BLOCK_N), num_valid - 1))
    dots = gram(hidden_ptr, anchor_token, key_token, D, EVEN_D, PRECISION, INTERPRETED, BLOCK_M, BLOCK_N, BLOCK_D)
    inverse_temperature = tl.load(inverse_temperature_ptr)
    norm_scale = tl.full((BLOCK_M,), 1.0, tl.float32)
    if COSINE:
        inverse_norm_ptr += (state * S + group) * N
        norm_scale = tl.load(inverse_norm_ptr + anchor_token)
    scale = norm_scale * inverse_temperature
    if RESCALE:
        norm_scale *= tl.load(range_scale_ptr + state)
    anchor_word = tl.where(is_anchor, tl.load(word_ptr + rank), NO_ANCHOR)
    z = tl.load(anchor_state_ptr + rank, mask=is_anchor, other=0.0)
    factor = tl.load(anchor_state_ptr + A + rank, mask=is_anchor, other=0.0)
    anchors = (scale, norm_scale, anchor_word, anchor_token, z, factor)
    tables = (token_ptr, word_ptr, inverse_norm_ptr)
    states = (anchor_state_ptr, anchor_state_ptr + A, num_anchors, inverse_temperature)
    matrix = group_place * num_layers + place
    row = anchor_block * BLOCK_M + tl.arange(0, BLOCK_M)
    column_start = key_block * BLOCK_N
    weight_ptr += matrix * ROWS * COLUMNS + column_start
    column_sum_ptr += (matrix * anchor_blocks + anchor_block) * COLUMNS + column_start
    out = (weight_ptr + row[:, None] * COLUMNS, column_sum_ptr)
    row_sum = _store_weights(
        dots, anchors, key_start, tables, states, out, COSINE, BOUNDED, INTERPRETED, BLOCK_M, BLOCK_N, PIECES
    )
    if COSINE:
        tl.store(row_sum_ptr + (matrix * key_blocks + key_block) * ROWS + row, row_sum)


@triton.jit
def _store_weights(
    dots,  # [BLOCK_M, BLOCK_N]
    anchors,  # scale, norm scale, word, token, z', factor of the negatives' weights: [BLOCK_M] each
    key_start,
    tables,
    states,  # the group's z' and factors, how many anchors have them, and 1/tau
    out,  # [BLOCK_M, 1] each row's first element of the tile, and the first column's sum
    COSINE: tl.constexpr,
    BOUNDED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Store a tile of M' and the sums of its columns; return those of its rows.

    Rows that are no anchors and columns that are no keys are zeros, so that the gradient's loops need no masks.
    """
    if PIECES > 1:
        left, right = halves(dots, BLOCK_M, BLOCK_N)
        HALF: tl.constexpr = BLOCK_N // 2
        row_sum = _store_weights(
            left, anchors, key_start, tables, states, out, COSINE, BOUNDED, INTERPRETED, BLOCK_M, HALF, PIECES // 2
        )
        key_start += HALF
        out = (out[0] + HALF, out[1] + HALF)
        row_sum += _store_weights(
            right, anchors, key_start, tables, states, out, COSINE, BOUNDED, INTERPRETED, BLOCK_M, HALF, PIECES // 2
        )
    else:
        scale, norm_scale, word, token, z, factor = anchors
        token_ptr, word_ptr, inverse_norm_ptr = tables
        z_ptr, factor_ptr, num_anchors, inverse_temperature = states
        weight_ptr, column_sum_ptr = out
        # each once, for both branches: what a compiler pass takes grows with the square of the loads and stores
        key = key_start + tl.arange(0, BLOCK_N)
        key_word = tl.load(word_ptr + key)
        key_token = tl.load(token_ptr + key)
        key_z = tl.load(z_ptr + key, mask=key < num_anchors, other=INFINITY)
        key_factor = tl.load(factor_ptr + key, mask=key < num_anchors, other=0.0)
        score = dots * scale[:, None]
        if COSINE:
            key_norm = tl.load(inverse_norm_ptr + key_token)
            score *= key_norm[None, :]
        rows = (word, token, z, factor)
        keys = (key_word, key_token, key_z, key_factor)
        # two whole branches: a correction of the weights at the positives would keep both in registers
        if may_hold_positives(word, key_word):
            weight = derivative(score, rows, keys, inverse_temperature, BOUNDED, True)
        else:
            weight = derivative(score, rows, keys, inverse_temperature, BOUNDED, False)
        weight *= norm_scale[:, None]
        if COSINE:
            weight *= key_norm[None, :]
        if weight_ptr.dtype.element_ty == tl.float16:
            weight = tl.clamp(weight, -LARGEST_HALF, LARGEST_HALF)
        stored = rounded(weight, weight_ptr.dtype.element_ty, INTERPRETED)
        offs_n = tl.arange(0, BLOCK_N)
        tl.store(weight_ptr + offs_n[None, :], stored)
        product = stored.to(tl.float32) * dots
        if COSINE:
            tl.store(column_sum_ptr + offs_n, tl.sum(product, 0))
        row_sum = tl.sum(product, 1)
    return row_sum


@triton.jit
def derivative(score, rows, keys, inverse_temperature, BOUNDED: tl.constexpr, POSITIVES: tl.constexpr):
    """`M_ij` of a piece, for words, tokens, z' and factors of its rows and keys; POSITIVES: there may be some."""
    word, token, z, factor = rows
    key_word, key_token, key_z, key_factor = keys
    same_word = word[:, None] == key_word[None, :]
    is_negative = (word != NO_ANCHOR)[:, None] & (key_word != NO_WORD)[None, :] & ~same_word
    exponent = tl.where(is_negative, score, MINUS_INFINITY)
    if BOUNDED:
        weight = tl.exp(exponent - inverse_temperature) * (factor[:, None] + key_factor[None, :])
    else:
        weight = tl.exp(exponent - z[:, None]) * factor[:, None]
        weight += tl.exp(exponent - key_z[None, :]) * key_factor[None, :]
    if POSITIVES:
        distance = key_token[None, :] - token[:, None]
        _, sigma = softplus_sigmoid(tl.where(distance > 0, z[:, None], key_z[None, :]) - score)
        weight = tl.where(same_word & (distance != 0), -sigma, weight)
    return weight


@kernel(
    "first_layer",
    "first_state",
    "first_group",
    "first_anchor",
    "first_key",
    "num_layers",
    "anchor_blocks",
    "row_blocks",
    "grad_sums_stride",
    "mi_factor",
    "grad_losses_stride",
    "stability_factor",
    "stability_start",
    "num_steps",
    "S",
    "N",
    aligned=("weight_ptr",),
)
def _mi_gradient_kernel(
    hidden_table,  # [L] addresses of [S, N, D]
    out_table,  # [L] addresses of the gradients, 0 for none
    token_ptr,  # [S, R]
    size_ptr,  # [S, 2]
    inverse_norm_ptr,  # [layers, S, N]
    inverse_temperature_ptr,  # 0-d
    grad_sums_ptr,  # [layers] upstream of the MI loss, with a stride; 0-d with one of 0
    grad_sums_stride,
    mi_factor,  # of what is upstream
    range_scale_ptr,  # [layers]
    weight_ptr,  # as in _mi_weights_kernel, and so on
    row_sum_ptr,
    column_sum_ptr,
    losses_ptr,  # [num_steps] of the stability loss
    scale_ptr,  # [num_steps]
    grad_losses_ptr,  # [num_steps] upstream of the stability loss, likewise
    grad_losses_stride,
    stability_factor,
    stability_start,  # first layer of the stability loss
    num_steps,
    stencil_mask_ptr,  # [S, N] uint8
    first_layer,
    first_state,
    first_group,
    first_anchor,
    first_key,
    num_layers,  # of this launch
    anchor_blocks,  # of rows; those after them are the other tokens'
    row_blocks,  # in all
    ROWS,
    COLUMNS,
    S,
    N,
    D,
    R,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COSINE: tl.constexpr,
    RESCALE: tl.constexpr,
    STENCIL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ANCHOR_BLOCK: tl.constexpr,  # of _mi_weights_kernel
    KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Some rows and columns of one gradient. Grid: blocks of D, fastest, * of rows * layers * groups of the workspace.

    Layers come before groups, so that their stencils find the neighbouring layers in the L2 cache. The workspace holds
    all keys of the anchors from `first_anchor` on, and all anchors of the keys from `first_key` on.
    """
    width_blocks = tl.cdiv(D, BLOCK_D)
    number, place, group_place = place_in_grid(width_blocks * row_blocks, num_layers)
    tile = number.to(tl.int32)
    block = tile // width_blocks
    width_start = tile % width_blocks * BLOCK_D
    group = first_group + group_place
    num_anchors, num_valid = group_sizes(size_ptr, group)
    layer = first_layer + place
    for_anchors = block < anchor_blocks
    start = tl.where(for_anchors, block, block - anchor_blocks) * BLOCK_M  # in the workspace
    rank_start = tl.where(for_anchors, first_anchor, first_key) + start
    has_anchors = for_anchors & (rank_start < num_anchors)
    has_others = (rank_start + BLOCK_M > num_anchors) & (rank_start < N) & (block >= anchor_blocks)
    if not (has_anchors | has_others):
        return
    if not has_layer(out_table, layer):
        return
    rank = rank_start + tl.arange(0, BLOCK_M)
    is_own = tl.where(for_anchors, rank < num_anchors, (rank >= num_anchors) & (rank < N))

    group_start = group * N * D
    hidden_ptr = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT) + group_start
    matrix = group_place * num_layers + place
    token_ptr += group * R
    weight_ptr += matrix * ROWS * COLUMNS
    row = start + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = width_start + tl.arange(0, BLOCK_D)
    gradient = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    projection = tl.zeros((BLOCK_M,), tl.float32)
    if for_anchors:
        # a step's tokens are loaded in the step before: a load that a load waits for would cut the pipeline short
        token = tl.load(token_ptr + tl.minimum(offs_k, num_valid - 1))
        for key_start in range(0, num_valid, BLOCK_K):
            key = key_start + offs_k
            weight = tl.load(weight_ptr + row[:, None] * COLUMNS + key[None, :])
            hidden = _load_columns(hidden_ptr, token, offs_d, D, EVEN_D)
            token = tl.load(token_ptr + tl.minimum(key + BLOCK_K, num_valid - 1))
            gradient = dot(weight, hidden, gradient, PRECISION, INTERPRETED)
        if COSINE:
            projection = _sum_rows(
                row_sum_ptr + matrix * (COLUMNS // KEY_BLOCK) * ROWS + row, tl.cdiv(num_valid, KEY_BLOCK), ROWS, BLOCK_M
            )
    else:
        if rank_start < num_valid:
            token = tl.load(token_ptr + tl.minimum(offs_k, num_anchors - 1))
            for anchor_start in range(0, num_anchors, BLOCK_K):
                anchor = anchor_start + offs_k
                weight = tl.load(weight_ptr + anchor[:, None] * COLUMNS + row[None, :])
                hidden = _load_columns(hidden_ptr, token, offs_d, D, EVEN_D)
                token = tl.load(token_ptr + tl.minimum(anchor + BLOCK_K, num_anchors - 1))
                gradient = dot(tl.trans(weight), hidden, gradient, PRECISION, INTERPRETED)
            if COSINE:
                projection = _sum_rows(
                    column_sum_ptr + matrix * (ROWS // ANCHOR_BLOCK) * COLUMNS + row,
                    tl.cdiv(num_anchors, ANCHOR_BLOCK),
                    COLUMNS,
                    BLOCK_M,
                )

    token = tl.load(token_ptr + tl.minimum(rank, N - 1))
    state = first_state + place
    write_gradient(
        gradient,
        projection,
        (token, is_own, is_own & (rank < num_valid)),
        (hidden_table, out_table, layer),
        (grad_sums_ptr + state * grad_sums_stride, mi_factor, inverse_temperature_ptr, range_scale_ptr),
        (losses_ptr, scale_ptr, (grad_losses_ptr, grad_losses_stride, stability_factor), stability_start, num_steps),
        (inverse_norm_ptr, stencil_mask_ptr),
        (state, S, group, N, D, width_start),
        DTYPE,
        ALIGNMENT,
        COSINE,
        RESCALE,
        STENCIL,
        HAS_MASK,
        INTERPRETED,
        BLOCK_M,
        BLOCK_D,
        PIECES,
    )


@triton.jit
def _load_columns(hidden_ptr, token, offs_d, D, EVEN_D: tl.constexpr):
    """Some tokens by a part of the width, `[tokens, BLOCK_D]`."""
    address = hidden_ptr + token[:, None].to(tl.int64) * D + offs_d[None, :]
    return tl.load(address) if EVEN_D else tl.load(address, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def _sum_rows(row_ptr, num_rows, stride, WIDTH: tl.constexpr):
    """Sum of some rows of a matrix, in order; `row_ptr` `[WIDTH]` points at the first one's elements."""
    total = tl.zeros((WIDTH,), tl.float32)
    for _ in range(num_rows):
        total += tl.load(row_ptr)
        row_ptr += stride
    return total
