"""The MI loss of long groups with its matrix products left to the vendor's library: what is before, between and after.

A candidate beside `mi` and `mi_backward` (see `launch.LONG_PATH`), with their letters and formulas. Of each layer:

    gather        the anchors' rows
    product       anchors x the tokens as they lie -> dots, in fp32
    statistics    rows of dots -> each anchor's z' and factor, the loss and the sums: all that `mi` leaves
    product       backward, the same dots again, unless they were kept
    weights       dots -> M' in rank space, as `mi_backward` has it, and the sums of M' dots over its rows and columns
    gather        tokens in rank space, with zeros for padding: a product reads everything
    product       M' x these -> sum of M' h, in fp32
    rows          this, less its projection, with the stability loss's stencil -> rows of the gradient

M' has a row for every rank below A, the most anchors that a group has. In a group with fewer, some rows so belong to
tokens that are no anchors; they get what the columns of such tokens have, their weights with the group's anchors.
"""

import triton
import triton.language as tl

from carma_kernels.kernels.jit import kernel
from carma_kernels.kernels.mi import (
    MINUS_INFINITY,
    NO_ANCHOR,
    NO_WORD,
    add_scores,
    group_sizes,
    matched_log_sum,
    may_hold_positives,
    store_statistics,
)
from carma_kernels.kernels.mi_backward import INFINITY, LARGEST_HALF, derivative
from carma_kernels.kernels.mi_rows import write_gradient
from carma_kernels.kernels.tiles import layer_pointer, place_in_grid, rounded, softplus_sigmoid


@triton.jit
def _sum_blocks(block_ptr, num_blocks, stride, WIDTH: tl.constexpr):
    """Sum of what blocks have left, `block_ptr` `[WIDTH]` points at the first's; some at a time, they are many."""
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, num_blocks, 16):
        block = start + tl.arange(0, 16)
        offset = block[:, None].to(tl.int64) * stride
        total += tl.sum(tl.load(block_ptr[None, :] + offset, mask=(block < num_blocks)[:, None], other=0.0), 0)
    return total


@kernel("layer", "first_group", "first_rank", "num_ranks", "first_block", "width", "N", aligned=("out_ptr",))
def _dense_gather_kernel(
    hidden_table,  # [L] addresses of [S, N, D]
    token_ptr,  # [S, R]
    size_ptr,  # [S, 2]
    out_ptr,  # [groups of this launch, num_ranks, STRIDE]
    layer,
    first_group,
    first_rank,
    num_ranks,
    first_block,  # of D, in blocks
    width,  # so many columns of D from there on, or fewer where D ends
    N,
    D,
    R,
    STRIDE,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,  # noqa: ARG001
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some columns of some ranks' tokens; zeros for padding. Grid: blocks of D, fastest, * of ranks * groups."""
    block, row_block, place = place_in_grid(tl.cdiv(width, BLOCK_D), tl.cdiv(num_ranks, BLOCK_M))
    group = first_group + place
    _, num_valid = group_sizes(size_ptr, group)
    row = row_block.to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = first_rank + row
    is_own = row < num_ranks
    token = tl.load(token_ptr + group * R + rank, mask=is_own, other=0)
    offs_d = (first_block + block.to(tl.int32)) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = (offs_d < D)[None, :]
    hidden_ptr = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT) + group * N * D
    is_read = (is_own & (rank < num_valid))[:, None] & in_width
    hidden = tl.load(hidden_ptr + token[:, None].to(tl.int64) * D + offs_d[None, :], mask=is_read, other=0.0)
    out_ptr += (place * num_ranks + row)[:, None] * STRIDE
    column = block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.store(out_ptr + column[None, :], hidden, mask=is_own[:, None] & in_width)


@kernel("state", "first_group", "first_anchor", "num_rows", "dots_rows", "S", "N", "A", aligned=("dots_ptr",))
def _dense_statistics_kernel(
    dots_ptr,  # [groups of this launch, dots_rows, STRIDE] anchors from first_anchor on x tokens as they lie
    text_ptr,  # [S, N] word of each token as it lies
    token_ptr,  # [S, R]
    size_ptr,  # [S, 2]
    first_pair_ptr,  # [S, A+1]
    num_negatives_ptr,  # [S, A]
    inverse_norm_ptr,  # [layers, S, N]
    inverse_temperature_ptr,  # 0-d
    anchor_state_ptr,  # [layers, S, 2, A]
    sums_ptr,  # [layers, 2, S * anchor blocks]
    loss_ptr,  # [layers, S * anchor blocks]
    log_match,  # log(match_negatives)
    state,  # the layer among the loss's
    first_group,
    first_anchor,
    num_rows,
    dots_rows,
    S,
    N,
    R,
    A,
    STRIDE,
    COSINE: tl.constexpr,
    BOUNDED: tl.constexpr,
    MATCH: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some anchors' statistics. Grid: blocks of anchors, fastest, * groups."""
    block, place, _ = place_in_grid(tl.cdiv(num_rows, BLOCK_A), tl.num_programs(0))
    group = first_group + place
    num_anchors, _ = group_sizes(size_ptr, group)
    row = block.to(tl.int32) * BLOCK_A + tl.arange(0, BLOCK_A)
    rank = first_anchor + row
    is_anchor = (rank < num_anchors) & (row < num_rows)
    token = tl.load(token_ptr + group * R + rank, mask=is_anchor, other=0)
    text_ptr += group * N
    word = tl.where(is_anchor, tl.load(text_ptr + token), NO_ANCHOR)
    inverse_temperature = tl.load(inverse_temperature_ptr)
    norm = tl.full((BLOCK_A,), 1.0, tl.float32)
    if COSINE:
        inverse_norm_ptr += (state.to(tl.int64) * S + group) * N
        norm = tl.load(inverse_norm_ptr + token)
    scale = norm * inverse_temperature
    dots_ptr += (place * dots_rows + tl.minimum(row, num_rows - 1)) * STRIDE

    none = tl.zeros((BLOCK_A,), tl.float32)
    so_far = (none + MINUS_INFINITY, none, none)
    for start in range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        # what is read between N and STRIDE is nobody's; a limit of N would make loads of single numbers
        dots = tl.load(dots_ptr[:, None] + column[None, :], mask=(column < STRIDE)[None, :], other=0.0)
        key_word = tl.load(text_ptr + column, mask=column < N, other=NO_WORD)
        dots = tl.where((key_word != NO_WORD)[None, :], dots, 0.0)  # of padding they may be no numbers
        score = dots * scale[:, None]
        if COSINE:
            score *= tl.load(inverse_norm_ptr + column, mask=column < N, other=0.0)[None, :]
        is_negative = (key_word != NO_WORD)[None, :] & (word[:, None] != key_word[None, :])
        so_far = add_scores(score, is_negative, so_far, inverse_temperature, BOUNDED)
    maximum, total, slope = so_far
    if BOUNDED:
        maximum = none + inverse_temperature
    mean_score = slope / tl.where(total > 0, total, 1.0)

    num_negatives_ptr += group * A + rank
    matched = matched_log_sum(maximum, total, num_negatives_ptr, is_anchor, log_match, MATCH)
    first_pair_ptr += group * (A + 1) + rank
    first_pair = tl.load(first_pair_ptr, mask=is_anchor, other=0)
    num_positives = tl.load(first_pair_ptr + 1, mask=is_anchor, other=0) - first_pair
    loss = tl.zeros((BLOCK_A,), tl.float32)
    pull = tl.zeros((BLOCK_A,), tl.float32)
    work = tl.zeros((BLOCK_A,), tl.float32)
    for distance in range(1, tl.max(num_positives, 0) + 1):  # a word's tokens lie side by side
        exists = distance <= num_positives
        score = tl.load(dots_ptr + token + distance, mask=exists, other=0.0) * scale
        if COSINE:
            score *= tl.load(inverse_norm_ptr + token + distance, mask=exists, other=0.0)
        cost, sigma = softplus_sigmoid(matched - score)
        loss += tl.where(exists, cost, 0.0)
        pull += tl.where(exists, sigma, 0.0)
        work += tl.where(exists, sigma * (mean_score - score), 0.0)

    anchor_state_ptr += (state.to(tl.int64) * S + group) * 2 * A + rank
    group_blocks = tl.cdiv(A, BLOCK_A)
    blocks = S * group_blocks
    sums_ptr += state.to(tl.int64) * 2 * blocks + group * group_blocks + first_anchor // BLOCK_A + block
    loss_ptr += state.to(tl.int64) * blocks + group * group_blocks + first_anchor // BLOCK_A + block
    norms = tl.where(is_anchor, norm, 0.0)
    out = (anchor_state_ptr, sums_ptr, loss_ptr)
    store_statistics(out, A, rank < A, blocks, (matched, maximum, total), (loss, pull, work, norms), BOUNDED)


@kernel(
    "state",
    "first_group",
    "first_row",
    "first_key",
    "piece_start",
    "piece_rows",
    "dots_rows",
    "num_rows",
    "num_keys",
    "S",
    "N",
    "A",
    aligned=("weight_ptr",),
)
def _dense_weights_kernel(
    dots_ptr,  # [groups of this launch, dots_rows, DOTS_STRIDE] the piece's rows x tokens, or, GATHERED, x the keys
    token_ptr,  # [S, R]
    word_ptr,  # [S, R]
    size_ptr,  # [S, 2]
    inverse_norm_ptr,  # [layers, S, N]
    inverse_temperature_ptr,  # 0-d
    anchor_state_ptr,  # [layers, S, 2, A]
    range_scale_ptr,  # [layers]
    weight_ptr,  # [groups of this launch, num_rows, STRIDE] M' of ranks from first_row x ranks from first_key
    row_sum_ptr,  # [groups of this launch, key blocks, num_rows] of M' and the dot products
    column_sum_ptr,  # [groups of this launch, row blocks, STRIDE]
    state,  # the layer among the loss's
    first_group,
    first_row,
    first_key,
    piece_start,  # of the rows, counted from first_row: whose dots there are
    piece_rows,
    dots_rows,
    num_rows,
    num_keys,
    S,
    N,
    R,
    A,
    DOTS_STRIDE,
    STRIDE,
    COSINE: tl.constexpr,
    BOUNDED: tl.constexpr,
    RESCALE: tl.constexpr,
    GATHERED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of M', zeros where there are no weights. Grid: blocks of keys, fastest, * of the piece's rows * groups."""
    key_block, row_block, place = place_in_grid(tl.cdiv(STRIDE, BLOCK_N), tl.cdiv(piece_rows, BLOCK_M))
    group = first_group + place
    num_anchors, num_valid = group_sizes(size_ptr, group)
    token_ptr += group * R
    word_ptr += group * R
    dots_row = row_block.to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = piece_start + dots_row
    rank = first_row + row
    column = key_block.to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)
    key = first_key + column
    in_piece = dots_row < piece_rows
    is_row = in_piece & (rank < num_valid)
    is_key = (column < num_keys) & (key < num_valid)
    token = tl.load(token_ptr + rank, mask=is_row, other=0)
    key_token = tl.load(token_ptr + key, mask=is_key, other=0)
    word = tl.load(word_ptr + rank, mask=is_row, other=NO_ANCHOR)
    key_word = tl.load(word_ptr + key, mask=is_key, other=NO_WORD)
    is_weight = is_row[:, None] & is_key[None, :]
    dots_ptr += (place * dots_rows + dots_row)[:, None] * DOTS_STRIDE
    dots = tl.load(dots_ptr + (column if GATHERED else key_token)[None, :], mask=is_weight, other=0.0)
    inverse_temperature = tl.load(inverse_temperature_ptr)
    norm = tl.full((BLOCK_M,), 1.0, tl.float32)
    score = dots * inverse_temperature
    if COSINE:
        inverse_norm_ptr += (state.to(tl.int64) * S + group) * N
        norm = tl.load(inverse_norm_ptr + token)
        key_norm = tl.load(inverse_norm_ptr + key_token)
        score = dots * (norm * inverse_temperature)[:, None] * key_norm[None, :]
    if RESCALE:
        norm *= tl.load(range_scale_ptr + state)
    anchor_state_ptr += (state.to(tl.int64) * S + group) * 2 * A
    is_anchor = is_row & (rank < num_anchors)
    is_key_anchor = is_key & (key < num_anchors)
    z = tl.load(anchor_state_ptr + rank, mask=is_anchor, other=INFINITY)
    key_z = tl.load(anchor_state_ptr + key, mask=is_key_anchor, other=INFINITY)
    factor = tl.load(anchor_state_ptr + A + rank, mask=is_anchor, other=0.0)
    key_factor = tl.load(anchor_state_ptr + A + key, mask=is_key_anchor, other=0.0)
    rows = (word, token, z, factor)
    keys = (key_word, key_token, key_z, key_factor)
    if may_hold_positives(word, key_word):
        weight = derivative(score, rows, keys, inverse_temperature, BOUNDED, True)
    else:
        weight = derivative(score, rows, keys, inverse_temperature, BOUNDED, False)
    weight *= norm[:, None]
    if COSINE:
        weight *= key_norm[None, :]
    if weight_ptr.dtype.element_ty == tl.float16:
        weight = tl.clamp(weight, -LARGEST_HALF, LARGEST_HALF)
    stored = rounded(weight, weight_ptr.dtype.element_ty, INTERPRETED)
    in_memory = column < STRIDE
    weight_ptr += (place * num_rows + row)[:, None] * STRIDE + column[None, :]
    tl.store(weight_ptr, stored, mask=in_piece[:, None] & in_memory[None, :])
    if COSINE:
        product = stored.to(tl.float32) * dots
        row_sum_ptr += (place * tl.cdiv(STRIDE, BLOCK_N) + key_block) * num_rows
        tl.store(row_sum_ptr + row, tl.sum(product, 1), mask=in_piece)
        column_sum_ptr += (place * tl.cdiv(num_rows, BLOCK_M) + piece_start // BLOCK_M + row_block) * STRIDE
        tl.store(column_sum_ptr + column, tl.sum(product, 0), mask=in_memory)


@kernel(
    "layer",
    "state",
    "first_group",
    "first_rank",
    "num_ranks",
    "first_row",
    "first_key",
    "num_rows",
    "first_block",
    "width",
    "grad_sums_stride",
    "mi_factor",
    "grad_losses_stride",
    "stability_factor",
    "stability_start",
    "num_steps",
    "S",
    "N",
    "A",
    aligned=("product_ptr",),
)
def _dense_rows_kernel(
    product_ptr,  # [groups of this launch, num_ranks, WIDTH_STRIDE] sum of M' h of ranks from first_rank on
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
    row_sum_ptr,  # as in _dense_weights_kernel, and so on
    column_sum_ptr,
    losses_ptr,  # [num_steps] of the stability loss
    scale_ptr,  # [num_steps]
    grad_losses_ptr,  # [num_steps] upstream of the stability loss, likewise
    grad_losses_stride,
    stability_factor,
    stability_start,  # first layer of the stability loss
    num_steps,
    stencil_mask_ptr,  # [S, N] uint8
    layer,
    state,
    first_group,
    first_rank,
    num_ranks,
    first_row,
    first_key,
    num_rows,
    first_block,  # of D, in blocks
    width,
    S,
    N,
    D,
    R,
    A,
    STRIDE,
    WIDTH_STRIDE,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COSINE: tl.constexpr,
    RESCALE: tl.constexpr,
    STENCIL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROW_BLOCK: tl.constexpr,  # of _dense_weights_kernel
    KEY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Some rows and columns of the gradient. Grid: blocks of D, fastest, * of ranks * groups."""
    block, row_block, place = place_in_grid(tl.cdiv(width, BLOCK_D), tl.cdiv(num_ranks, BLOCK_M))
    group = first_group + place
    _, num_valid = group_sizes(size_ptr, group)
    row = row_block.to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = first_rank + row
    is_own = row < num_ranks
    column = block.to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    width_start = (first_block + block.to(tl.int32)) * BLOCK_D
    in_width = width_start + tl.arange(0, BLOCK_D) < D
    product_ptr += (place * num_ranks + row)[:, None] * WIDTH_STRIDE
    gradient = tl.load(product_ptr + column[None, :], mask=is_own[:, None] & in_width[None, :], other=0.0)
    projection = tl.zeros((BLOCK_M,), tl.float32)
    if COSINE:
        by_row = rank < A
        key_blocks = tl.cdiv(STRIDE, KEY_BLOCK)
        row_blocks = tl.cdiv(num_rows, ROW_BLOCK)
        row_sum_ptr += place * key_blocks * num_rows + tl.where(is_own & by_row, rank - first_row, 0)
        column_sum_ptr += place * row_blocks * STRIDE + tl.where(is_own & ~by_row, rank - first_key, 0)
        # a block is mostly all of one kind
        some_by_row = first_rank + row_block * BLOCK_M < A
        some_by_column = first_rank + (row_block + 1) * BLOCK_M > A
        row_sum = _sum_blocks(row_sum_ptr, tl.where(some_by_row, key_blocks, 0), num_rows, BLOCK_M)
        column_sum = _sum_blocks(column_sum_ptr, tl.where(some_by_column, row_blocks, 0), STRIDE, BLOCK_M)
        projection = tl.where(by_row, row_sum, column_sum)
    token = tl.load(token_ptr + group * R + rank, mask=is_own, other=0)
    write_gradient(
        gradient,
        projection,
        (token, is_own, is_own & (rank < num_valid)),
        (hidden_table, out_table, layer),
        (grad_sums_ptr + state * grad_sums_stride, mi_factor, inverse_temperature_ptr, range_scale_ptr),
        (losses_ptr, scale_ptr, (grad_losses_ptr, grad_losses_stride, stability_factor), stability_start, num_steps),
        (inverse_norm_ptr, stencil_mask_ptr),
        (state.to(tl.int64), S, group, N, D, width_start),
        DTYPE,
        ALIGNMENT,
        COSINE,
        RESCALE,
        STENCIL,
        HAS_MASK,
        INTERPRETED,
        BLOCK_M,
        BLOCK_D,
        1,
    )
