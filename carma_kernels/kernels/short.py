"""The MI loss of short groups, with the stability loss on the way: a program holds whole rows of the score matrix.

A group is what an anchor is compared with: a sequence, or the batch. Its N tokens are at most `BLOCK_T`, and a program
has `BLOCK_M` of them, its rows, against all: nothing of the scores goes to memory. With `s_ij` the similarity, `z_i`
the log-sum-exp of anchor i's negatives and `sigma_ij = sigmoid(z_i - s_ij)` (there, z with `match_negatives`),

    M_ij = -sigma_ij                                             for tokens of one word, i the earlier
           exp(s_ij) (pull_i / exp(z_i) + pull_j / exp(z_j))     for tokens of different words, pull_i = sum_j sigma_ij

is the derivative of the loss with respect to `s_ij`, from both ends, hence symmetric, and

    d loss/d h_i = sum_j M_ij r_i r_j h_j / tau - r_i^2 h_i sum_j M_ij s_ij

with r the inverse norms (the dot product has r = 1 and no second term).
"""

import triton
import triton.language as tl

from carma_kernels.kernels.jit import kernel
from carma_kernels.kernels.stability import step_weights
from carma_kernels.kernels.tiles import (
    dot,
    gram_accumulator,
    has_layer,
    inverse_norm,
    layer_pointer,
    load_factor,
    load_rows,
    log_of_sum,
    mask_if,
    negatives_factor,
    neighbours,
    place_in_grid,
    rounded,
    softplus_sigmoid,
    stencil_of,
)


@triton.jit
def _relations(row, row_word, token, word):
    """Of rows and tokens: are they two tokens of one word, are they of different words, is the row the earlier."""
    valid = (row_word >= 0)[:, None] & (word >= 0)[None, :]
    same_word = row_word[:, None] == word[None, :]
    positive = valid & same_word & (row[:, None] != token[None, :])
    return positive, valid & (same_word == 0), row[:, None] < token[None, :]


@triton.jit
def _kinds(token, start, word_ptr, mask_ptr, N, STABILITY: tl.constexpr, HAS_MASK: tl.constexpr):
    """Of tokens of the group at `start`: their words, -1 for none; whether the stability loss takes them, or either."""
    is_token = token < N
    word = tl.load(word_ptr + start + token, mask=is_token, other=-1)
    in_stability = mask_if(is_token, STABILITY)
    if HAS_MASK:
        in_stability &= tl.load(mask_ptr + start + token, mask=is_token, other=0) != 0
    return word, in_stability, in_stability | (word >= 0)


@kernel("S", "N", "walked", "start", "mi_start", "num_mi", "stability_start", "num_steps")
def _short_forward_kernel(
    hidden_table,  # [L] of [S, N, D]
    word_ptr,  # [S, N] int32, -1 for padding
    mask_ptr,  # [S, N] uint8, rows in the sums of the stability loss
    inverse_temperature_ptr,  # 0-d
    inverse_norms_ptr,  # [num_mi, S, N] out
    state_ptr,  # [num_mi, 2, S, N] out: z' and the factor of the negatives' weights
    work_ptr,  # [num_mi, S, N] out, sum over j of W_ij s_ij
    mi_partials_ptr,  # [num_mi, S, BLOCK_T] out
    partials_ptr,  # [2 * walked + 1, S, BLOCK_T] out, see stability._stability_forward_kernel
    log_match,  # log of match_negatives
    S,
    N,
    D,
    walked,  # how many layers
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
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BUFFERS: tl.constexpr,
):
    """One pass over a group in a layer. Grid: layers walked, fastest, * blocks of the groups' rows.

    The next layer is read here, too: that of the same tokens is the next program's, and comes from the L2 cache.
    """
    BLOCKS: tl.constexpr = BLOCK_T // BLOCK_M
    at, _, block = place_in_grid(walked, 1)
    group = block // BLOCKS
    groups = S.to(tl.int64)
    layer = start + at
    in_mi = (layer >= mi_start) & (layer < mi_start + num_mi)
    in_stability = (layer >= stability_start) & (layer <= stability_start + num_steps)
    has_step = (layer >= stability_start) & (layer < stability_start + num_steps)

    token = tl.arange(0, BLOCK_T)
    word, _, is_read = _kinds(token, group * N, word_ptr, mask_ptr, N, STABILITY, HAS_MASK)
    row = (block % BLOCKS).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_word, takes_part, row_is_read = _kinds(row, group * N, word_ptr, mask_ptr, N, STABILITY, HAS_MASK)
    hidden = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT) + group * N * D
    if STABILITY:
        following = layer_pointer(hidden_table, layer + has_step.to(tl.int32), DTYPE, ALIGNMENT) + group * N * D
    gram = gram_accumulator(BLOCK_M, BLOCK_T, INTERPRETED)
    energy = tl.zeros((BLOCK_T,), tl.float32)
    change = tl.zeros((BLOCK_M,), tl.float32)
    for first in tl.range(0, D, BLOCK_D, num_stages=NUM_BUFFERS):
        column = first + tl.arange(0, BLOCK_D)[None, :]
        reads = is_read[:, None] & (column < D)
        row_reads = row_is_read[:, None] & (column < D)
        others = load_factor(hidden, token[:, None] * D + column, reads)  # [BLOCK_T, BLOCK_D]
        rows = others  # [BLOCK_M, BLOCK_D]
        if BLOCKS > 1:
            rows = load_factor(hidden, row[:, None] * D + column, row_reads)
        gram = dot(rows, tl.trans(others), gram, PRECISION, INTERPRETED)
        if COSINE or STABILITY:
            x = load_rows(hidden, token[:, None] * D + column, reads)  # [BLOCK_T, BLOCK_D]
            energy += tl.sum(x * x, 1)
        if STABILITY:
            if BLOCKS > 1:
                x = load_rows(hidden, row[:, None] * D + column, row_reads)  # [BLOCK_M, BLOCK_D]
            step_reads = mask_if(takes_part[:, None] & (column < D), has_step)
            step = load_rows(following, row[:, None] * D + column, step_reads) - x
            change += tl.sum(step * step, 1)

    gram = gram.to(tl.float32)
    # picked from all tokens' instead of added up again: a row's norm must have the same bits there
    row_energy = tl.sum(tl.where(row[:, None] == token[None, :], energy[None, :], 0.0), 1)  # [BLOCK_M]
    slot = group * BLOCK_T + row
    every = row >= 0
    if STABILITY:
        # the sums over the tokens are left to the next kernel
        width = groups * BLOCK_T
        sums = partials_ptr + slot
        tl.store(sums + at * width, tl.where(takes_part, row_energy, 0.0), mask=mask_if(every, in_stability))
        tl.store(sums + (walked + at + 1) * width, tl.where(takes_part, change, 0.0), mask=mask_if(every, has_step))
        tl.store(sums + 2 * walked.to(tl.int64) * width, takes_part.to(tl.float32), mask=mask_if(every, at == 0))

    positive, negative, earlier = _relations(row, row_word, token, word)
    positive &= earlier
    score = gram * tl.load(inverse_temperature_ptr)
    if COSINE:
        inverse = inverse_norm(row_energy)
        score *= inverse[:, None] * inverse_norm(energy)[None, :]
    negative_score = tl.where(negative, score, float("-inf"))
    largest = tl.max(negative_score, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp(negative_score - largest[:, None])  # of each negative in exp(z), up to a factor
    total = tl.sum(share, 1)
    matched = log_of_sum(largest, total)
    if MATCH:
        matched += log_match - tl.log(tl.maximum(tl.sum(negative.to(tl.float32), 1), 1.0))
    cost, sigma = softplus_sigmoid(matched[:, None] - score)
    pull = tl.sum(tl.where(positive, sigma, 0.0), 1)
    mi_layer = layer - mi_start
    cost = tl.sum(tl.where(positive, cost, 0.0), 1)
    tl.store(mi_partials_ptr + mi_layer * groups * BLOCK_T + slot, cost, mask=mask_if(every, in_mi))
    place = (mi_layer * groups + group) * N + row
    writes = mask_if(row < N, in_mi)
    state = state_ptr + mi_layer * groups * N + place
    tl.store(state, matched, mask=writes)
    tl.store(state + groups * N, negatives_factor(pull, matched, largest, total), mask=writes)
    if WORK:
        mean_score = tl.sum(share * tl.where(negative, score, 0.0), 1) / tl.where(total != 0, total, 1.0)
        work = tl.where(positive, sigma * (mean_score[:, None] - score), 0.0)
        tl.store(work_ptr + place, tl.sum(work, 1), mask=writes)
    if COSINE:
        tl.store(inverse_norms_ptr + place, inverse, mask=writes)


@triton.jit
def _load_state(state_ptr, stride, token, valid):
    """`z'` of tokens of a group, and the factor of their negatives' weights."""
    z = tl.load(state_ptr + token, mask=valid, other=0.0)
    return z, tl.load(state_ptr + stride + token, mask=valid, other=0.0)


@triton.jit
def _derivative(score, relations, row_state, token_state):
    """`M` of rows and tokens, `[BLOCK_M, BLOCK_T]`."""
    positive, negative, earlier = relations
    row_z, row_factor = row_state
    z, factor = token_state
    _, sigma = softplus_sigmoid(tl.where(earlier, row_z[:, None], z[None, :]) - score)
    # masked before the exponential: a positive's may overflow
    score = tl.where(negative, score, float("-inf"))
    weight = tl.exp(score - row_z[:, None]) * row_factor[:, None] + tl.exp(score - z[None, :]) * factor[None, :]
    return tl.where(positive, -sigma, weight)


@kernel(
    "S",
    "N",
    "L",
    "pieces",
    "mi_start",
    "num_mi",
    "stability_start",
    "num_steps",
    "grad_sums_stride",
    "mi_factor",
    "grad_losses_stride",
    "stability_factor",
)
def _short_backward_kernel(
    hidden_table,  # [L] of [S, N, D]
    out_table,  # [L] of [S, N, D], 0 for a layer without gradient
    word_ptr,  # [S, N] int32
    mask_ptr,  # [S, N] uint8
    inverse_temperature_ptr,  # 0-d
    inverse_norms_ptr,  # [num_mi, S, N]
    state_ptr,  # [num_mi, 2, S, N]
    grad_sums_ptr,  # [num_mi] upstream of the MI loss, with a stride; 0-d with one of 0
    grad_sums_stride,
    mi_factor,  # of what is upstream
    losses_ptr,  # [num_steps]
    scale_ptr,  # [num_steps]
    grad_losses_ptr,  # [num_steps] upstream of the stability loss, likewise
    grad_losses_stride,
    stability_factor,
    S,
    N,
    D,
    L,
    pieces,
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
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_BUFFERS: tl.constexpr,
):
    """Scores, their derivative M, then M times rows. Grid: layers, fastest, * pieces of D * blocks of the groups' rows.

    The stencil reads the layers before and after, which are the neighbouring programs' own.
    """
    BLOCKS: tl.constexpr = BLOCK_T // BLOCK_M
    layer, number, block = place_in_grid(L, pieces)
    piece = number.to(tl.int32)
    group = block // BLOCKS
    groups = S.to(tl.int64)
    mi_layer = layer - mi_start
    in_mi = (mi_layer >= 0) & (mi_layer < num_mi)
    if has_layer(out_table, layer) == 0:
        return

    token = tl.arange(0, BLOCK_T)
    word = tl.load(word_ptr + group * N + token, mask=mask_if(token < N, in_mi), other=-1)
    valid = word >= 0
    row = (block % BLOCKS).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_word, takes_part, is_read = _kinds(row, group * N, word_ptr, mask_ptr, N, STABILITY, HAS_MASK)
    in_loss = mask_if(row_word >= 0, in_mi)
    group_offset = group * N * D
    hidden = layer_pointer(hidden_table, layer, DTYPE, ALIGNMENT) + group_offset
    gram = gram_accumulator(BLOCK_M, BLOCK_T, INTERPRETED)
    for first in tl.range(0, tl.where(in_mi, D, 0), BLOCK_D, num_stages=NUM_BUFFERS):
        column = first + tl.arange(0, BLOCK_D)[None, :]
        others = load_factor(hidden, token[:, None] * D + column, valid[:, None] & (column < D))
        rows = others
        if BLOCKS > 1:
            rows = load_factor(hidden, row[:, None] * D + column, in_loss[:, None] & (column < D))
        gram = dot(rows, tl.trans(others), gram, PRECISION, INTERPRETED)
    gram = gram.to(tl.float32)

    place = (mi_layer * groups + group) * N
    state = state_ptr + mi_layer * groups * N + place
    row_state = _load_state(state, groups * N, row, in_loss)
    token_state = _load_state(state, groups * N, token, valid)
    inverse_temperature = tl.load(inverse_temperature_ptr)
    score = gram * inverse_temperature
    if COSINE:
        row_inverse = tl.load(inverse_norms_ptr + place + row, mask=in_loss, other=0.0)
        inverse = tl.load(inverse_norms_ptr + place + token, mask=valid, other=0.0)
        score *= row_inverse[:, None] * inverse[None, :]
    weight = _derivative(score, _relations(row, row_word, token, word), row_state, token_state)  # M

    factor = mi_factor * tl.load(grad_sums_ptr + mi_layer * grad_sums_stride, mask=in_mi, other=0.0)
    factor *= inverse_temperature
    row_factor = tl.where(in_loss, factor, 0.0)
    if COSINE:
        weight *= inverse[None, :]
        row_factor *= row_inverse
    if tl.float16 == DTYPE:  # the range of a half: a row's largest weight becomes 1
        largest = tl.max(tl.abs(weight), 1)
        largest = tl.where(largest > 0, largest, 1.0)
        weight /= largest[:, None]
        row_factor *= largest
    weight_rounded = rounded(weight, DTYPE, INTERPRETED)
    own = tl.zeros((BLOCK_M,), tl.float32)
    if COSINE:  # from the rounded weights, so that their errors cancel where all tokens are alike
        own = tl.sum(weight_rounded.to(tl.float32) * gram, 1) * row_factor * row_inverse * row_inverse

    if STABILITY:
        step = layer - stability_start
        upstream = (grad_losses_ptr, grad_losses_stride, stability_factor)
        before, pull_before = step_weights(losses_ptr, scale_ptr, upstream, step - 1, num_steps)
        after, pull_after = step_weights(losses_ptr, scale_ptr, upstream, step, num_steps)
        previous, following = neighbours(hidden_table, layer, before, after, DTYPE, ALIGNMENT)
        previous += group_offset
        following += group_offset
    out = layer_pointer(out_table, layer, DTYPE, ALIGNMENT) + group_offset
    columns = tl.cdiv(tl.cdiv(D, BLOCK_D), pieces) * BLOCK_D
    for first in tl.range(piece * columns, tl.minimum((piece + 1) * columns, D), BLOCK_D, num_stages=NUM_BUFFERS):
        column = first + tl.arange(0, BLOCK_D)[None, :]
        others = load_factor(hidden, token[:, None] * D + column, valid[:, None] & (column < D))
        zero = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        gradient = dot(weight_rounded, others, zero, PRECISION, INTERPRETED) * row_factor[:, None]
        offset = row[:, None] * D + column
        x = load_rows(hidden, offset, is_read[:, None] & (column < D))  # [BLOCK_M, BLOCK_D]
        if COSINE:
            gradient -= tl.where(in_loss[:, None], x * own[:, None], 0.0)
        if STABILITY:
            reads = takes_part[:, None] & (column < D)
            own_weight = -(pull_before + pull_after)
            gradient += stencil_of(x, previous, following, offset, reads, before, after, own_weight)
        tl.store(out + offset, rounded(gradient, DTYPE, INTERPRETED), mask=(row < N)[:, None] & (column < D))
