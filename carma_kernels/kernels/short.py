"""The MI loss of short groups, with the stability loss on the way: a program holds a group's whole score matrix.

A group is what an anchor is compared with: a sequence, or the batch. Its N tokens are at most `BLOCK_T`, so nothing of
the scores goes to memory. With `s_ij` the similarity, `z_i` the log-sum-exp of anchor i's negatives and
`sigma_ij = sigmoid(z_i - s_ij)` (there, z with `match_negatives`),

    M_ij = -sigma_ij                                             for tokens of one word, i the earlier
           exp(s_ij) (pull_i / exp(z_i) + pull_j / exp(z_j))     for tokens of different words, pull_i = sum_j sigma_ij

is the derivative of the loss with respect to `s_ij`, from both ends, hence symmetric, and

    d loss/d h_i = sum_j M_ij r_i r_j h_j / tau - r_i^2 h_i sum_j M_ij s_ij

with r the inverse norms (the dot product has r = 1 and no second term).
"""

import triton
import triton.language as tl

from carma_kernels.kernels.stability import step_weights
from carma_kernels.kernels.tiles import (
    dot,
    has_layer,
    inverse_norm,
    layer_pointer,
    load_rows,
    log_of_sum,
    negative_shift,
    neighbours,
    pid64,
    rounded,
    softplus_sigmoid,
    stencil_of,
)


@triton.jit
def _relations(word, BLOCK_T: tl.constexpr):
    """Of each two tokens (i, j): are they two tokens of one word, are they of different words, is i the earlier."""
    token = tl.arange(0, BLOCK_T)
    valid = (word >= 0)[:, None] & (word >= 0)[None, :]
    same_word = word[:, None] == word[None, :]
    positive = valid & same_word & (token[:, None] != token[None, :])
    return positive, valid & (same_word == 0), token[:, None] < token[None, :]


@triton.jit(do_not_specialize=["N", "start", "mi_start", "num_mi", "stability_start", "num_steps"])
def _short_forward_kernel(
    hidden_table,  # [L] of [S, N, D]
    word_ptr,  # [S, N] int32, -1 for padding
    mask_ptr,  # [S, N] uint8, rows in the sums of the stability loss
    inverse_temperature_ptr,  # 0-d
    inverse_norms_ptr,  # [num_mi, S, N] out
    state_ptr,  # [num_mi, 2, S, N] out: z for the positives, z - log pull for the negatives
    work_ptr,  # [num_mi, S, N] out, sum over j of W_ij s_ij
    mi_partials_ptr,  # [num_mi, S, BLOCK_T] out
    partials_ptr,  # [2 * walked + 1, S, BLOCK_T] out, see stability._stability_forward_kernel
    log_match,  # log of match_negatives
    N,
    D,
    start,  # first layer walked
    mi_start,  # first layer of the MI loss
    num_mi,
    stability_start,  # first layer of the stability loss
    num_steps,
    COSINE: tl.constexpr,
    MATCH: tl.constexpr,
    WORK: tl.constexpr,
    STABILITY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BUFFERS: tl.constexpr,
):
    """Grid: groups S x layers walked. One pass over the rows of a group in a layer."""
    group = pid64(0)
    groups = tl.num_programs(0)
    at = pid64(1)
    layer = start + at
    in_mi = (layer >= mi_start) & (layer < mi_start + num_mi)
    in_stability = (layer >= stability_start) & (layer <= stability_start + num_steps)
    has_step = (layer >= stability_start) & (layer < stability_start + num_steps)

    token = tl.arange(0, BLOCK_T)
    is_token = token < N
    word = tl.load(word_ptr + group * N + token, mask=is_token, other=-1)
    is_read = word >= 0
    if STABILITY:
        takes_part = is_token
        if HAS_MASK:
            takes_part &= tl.load(mask_ptr + group * N + token, mask=is_token, other=0) != 0
        is_read |= takes_part
    rows = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT) + group * N * D
    if STABILITY:
        next_rows = layer_pointer(hidden_table, layer + has_step.to(tl.int32), DTYPE, ALIGNMENT) + group * N * D
    gram = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    change = tl.zeros((BLOCK_T,), tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=NUM_BUFFERS):
        column = first + tl.arange(0, BLOCK_D)
        offset = token[:, None] * D + column[None, :]
        inside = is_read[:, None] & (column < D)[None, :]
        x = tl.load(rows + offset, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_D]
        gram = dot(x, tl.trans(x), gram, PRECISION, INTERPRETED)
        if STABILITY:
            step = load_rows(next_rows, offset, inside & has_step) - x.to(tl.float32)
            change += tl.sum(step * step, 1)

    diagonal = tl.where(token[:, None] == token[None, :], gram, 0.0)
    energy = tl.sum(diagonal, 1)  # [BLOCK_T]
    slot = group * BLOCK_T + token
    if STABILITY:
        # sums over the tokens are left to the next kernel: reducing a dot to a number does not compile for sm_100
        width = groups * BLOCK_T
        walked = tl.num_programs(1)
        sums = partials_ptr + slot
        tl.store(sums + at * width, tl.where(takes_part, energy, 0.0), mask=in_stability)
        tl.store(sums + (walked + at + 1) * width, tl.where(takes_part, change, 0.0), mask=has_step)
        tl.store(sums + 2 * walked.to(tl.int64) * width, takes_part.to(tl.float32), mask=at == 0)

    positive, negative, earlier = _relations(word, BLOCK_T)
    positive &= earlier
    score = gram * tl.load(inverse_temperature_ptr)
    if COSINE:
        inverse = inverse_norm(energy)
        score *= inverse[:, None] * inverse_norm(tl.sum(diagonal, 0))[None, :]
    negative_score = tl.where(negative, score, float("-inf"))
    largest = tl.max(negative_score, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp(negative_score - largest[:, None])  # of each negative in exp(z), up to a factor
    total = tl.sum(share, 1)
    z = log_of_sum(largest, total)
    matched = z
    if MATCH:
        matched += log_match - tl.log(tl.maximum(tl.sum(negative.to(tl.float32), 1), 1.0))
    cost, sigma = softplus_sigmoid(matched[:, None] - score)
    pull = tl.sum(tl.where(positive, sigma, 0.0), 1)
    mi_layer = layer - mi_start
    tl.store(mi_partials_ptr + mi_layer * groups * BLOCK_T + slot, tl.sum(tl.where(positive, cost, 0.0), 1), mask=in_mi)
    place = (mi_layer * groups + group) * N + token
    writes = is_token & in_mi
    state = state_ptr + mi_layer * groups * N + place
    tl.store(state, matched, mask=writes)
    tl.store(state + groups * N, negative_shift(z, pull), mask=writes)
    if WORK:
        work = pull * tl.sum(share * tl.where(negative, score, 0.0), 1) / tl.where(total > 0, total, 1.0)
        work -= tl.sum(tl.where(positive, sigma * score, 0.0), 1)
        tl.store(work_ptr + place, work, mask=writes)
    if COSINE:
        tl.store(inverse_norms_ptr + place, inverse, mask=writes)


@triton.jit(do_not_specialize=["N", "mi_start", "num_mi", "stability_start", "num_steps", "grad_losses_stride"])
def _short_backward_kernel(
    hidden_table,  # [L] of [S, N, D]
    out_table,  # [L] of [S, N, D], 0 for a layer without gradient
    word_ptr,  # [S, N] int32
    mask_ptr,  # [S, N] uint8
    inverse_temperature_ptr,  # 0-d
    inverse_norms_ptr,  # [num_mi, S, N]
    state_ptr,  # [num_mi, 2, S, N]
    grad_sums_ptr,  # [num_mi] upstream of the MI loss
    losses_ptr,  # [num_steps]
    scale_ptr,  # [num_steps]
    grad_losses_ptr,  # [num_steps] upstream of the stability loss, with a stride
    grad_losses_stride,
    N,
    D,
    mi_start,
    num_mi,
    stability_start,
    num_steps,
    COSINE: tl.constexpr,
    STABILITY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BUFFERS: tl.constexpr,
):
    """Grid: groups S x pieces of D x layers L. The scores again, their derivative M in registers, then M times rows."""
    group = pid64(0)
    groups = tl.num_programs(0)
    piece = tl.program_id(1)
    layer = pid64(2)
    mi_layer = layer - mi_start
    in_mi = (mi_layer >= 0) & (mi_layer < num_mi)
    if has_layer(out_table, layer) == 0:
        return

    token = tl.arange(0, BLOCK_T)
    is_token = token < N
    word = tl.load(word_ptr + group * N + token, mask=is_token & in_mi, other=-1)
    valid = word >= 0
    group_offset = group * N * D
    rows = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT) + group_offset
    gram = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for first in tl.range(0, tl.where(in_mi, D, 0), BLOCK_D, num_stages=NUM_BUFFERS):
        column = first + tl.arange(0, BLOCK_D)
        x = tl.load(rows + token[:, None] * D + column[None, :], mask=valid[:, None] & (column < D)[None, :], other=0.0)
        gram = dot(x, tl.trans(x), gram, PRECISION, INTERPRETED)

    place = (mi_layer * groups + group) * N + token
    state = state_ptr + mi_layer * groups * N + place
    z = tl.load(state, mask=valid, other=0.0)
    shift = tl.load(state + groups * N, mask=valid, other=float("inf"))
    inverse_temperature = tl.load(inverse_temperature_ptr)
    score = gram * inverse_temperature
    if COSINE:
        inverse = tl.load(inverse_norms_ptr + place, mask=valid, other=0.0)
        score *= inverse[:, None] * inverse[None, :]
    positive, negative, earlier = _relations(word, BLOCK_T)
    _, sigma = softplus_sigmoid(tl.where(earlier, z[:, None], z[None, :]) - score)
    # masked before the exponential: a positive's may overflow
    negative_score = tl.where(negative, score, float("-inf"))
    weight = tl.exp(negative_score - shift[:, None]) + tl.exp(negative_score - shift[None, :])
    weight = tl.where(positive, -sigma, weight)  # M [BLOCK_T, BLOCK_T]

    factor = tl.load(grad_sums_ptr + mi_layer, mask=in_mi, other=0.0) * inverse_temperature
    row_factor = tl.where(valid, factor, 0.0)
    if COSINE:
        weight *= inverse[None, :]
        row_factor *= inverse
    if tl.float16 == DTYPE:  # the range of a half: a row's largest weight becomes 1
        largest = tl.max(tl.abs(weight), 1)
        largest = tl.where(largest > 0, largest, 1.0)
        weight /= largest[:, None]
        row_factor *= largest
    weight_rounded = rounded(weight, DTYPE, INTERPRETED)
    own = tl.zeros((BLOCK_T,), tl.float32)
    if COSINE:  # from the rounded weights, so that their errors cancel where all tokens are alike
        own = tl.sum(weight_rounded.to(tl.float32) * gram, 1) * row_factor * inverse * inverse

    takes_part = is_token
    if HAS_MASK:
        takes_part &= tl.load(mask_ptr + group * N + token, mask=is_token, other=0) != 0
    if STABILITY:
        step = layer - stability_start
        before, pull_before = step_weights(
            losses_ptr, scale_ptr, grad_losses_ptr, grad_losses_stride, step - 1, num_steps
        )
        after, pull_after = step_weights(losses_ptr, scale_ptr, grad_losses_ptr, grad_losses_stride, step, num_steps)
        previous, following = neighbours(hidden_table, layer, before, after, DTYPE, ALIGNMENT)
        previous += group_offset
        following += group_offset
    out = layer_pointer(out_table, layer, DTYPE, ALIGNMENT) + group_offset
    pieces = tl.num_programs(1)
    columns = tl.cdiv(tl.cdiv(D, BLOCK_D), pieces) * BLOCK_D
    for first in tl.range(piece * columns, tl.minimum((piece + 1) * columns, D), BLOCK_D, num_stages=NUM_BUFFERS):
        column = first + tl.arange(0, BLOCK_D)
        is_column = (column < D)[None, :]
        offset = token[:, None] * D + column[None, :]
        others = tl.load(rows + offset, mask=valid[:, None] & is_column, other=0.0)  # [BLOCK_T, BLOCK_D]
        zero = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        gradient = dot(weight_rounded, others, zero, PRECISION, INTERPRETED) * row_factor[:, None]
        if COSINE:
            gradient -= others.to(tl.float32) * own[:, None]
        if STABILITY:
            reads = takes_part[:, None] & is_column
            x = load_rows(rows, offset, reads)
            own_weight = -(pull_before + pull_after)
            gradient += stencil_of(x, previous, following, offset, reads, before, after, own_weight)
        tl.store(out + offset, rounded(gradient, DTYPE, INTERPRETED), mask=is_token[:, None] & is_column)
